//! Names of sysctls, and the namespaces that they belong to.

use oci_spec::runtime::LinuxNamespaceType;

/// The file of a sysctl beneath `/proc/sys`. As sysctl(8) reads names: the first separator decides,
/// and the other character stands for itself, so that interfaces with a dot in their name can be
/// named.
pub(crate) fn path(name: &str) -> Option<String> {
    if name
        .chars()
        .any(|character| character.is_whitespace() || character.is_control())
    {
        return None;
    }
    let path = match name.find(['.', '/']) {
        Some(first) if name.as_bytes()[first] == b'.' => name
            .chars()
            .map(|character| match character {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    };
    path.split('/')
        .all(|part| !part.is_empty() && part != "." && part != "..")
        .then_some(path)
}

/// namespaces(7), ipc_namespaces(7): which namespace a path beneath `/proc/sys` belongs to.
pub(crate) fn namespace(path: &str) -> Option<LinuxNamespaceType> {
    const IPC: [&str; 9] = [
        "msgmax",
        "msgmnb",
        "msgmni",
        "sem",
        "shmall",
        "shmmax",
        "shmmni",
        "shm_rmid_forced",
        "auto_msgmni",
    ];
    if path.starts_with("net/") {
        return Some(LinuxNamespaceType::Network);
    }
    if path.starts_with("fs/mqueue/") {
        return Some(LinuxNamespaceType::Ipc);
    }
    match path.strip_prefix("kernel/")? {
        "domainname" | "hostname" => Some(LinuxNamespaceType::Uts),
        name if IPC.contains(&name) => Some(LinuxNamespaceType::Ipc),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sysctls_are_named_as_sysctl_does() {
        for (name, expected) in [
            ("net.ipv4.ip_forward", Some("net/ipv4/ip_forward")),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                Some("net/ipv4/conf/eth0.1/forwarding"),
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                Some("net/ipv4/conf/eth0.1/forwarding"),
            ),
            ("kernel", Some("kernel")),
            ("../../etc/passwd", None),
            ("net..ipv4", None),
            ("/proc", None),
            ("a/../b", None),
            ("a b", None),
            ("", None),
        ] {
            assert_eq!(super::path(name).as_deref(), expected, "{name:?}");
        }
    }
}
