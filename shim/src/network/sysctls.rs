//! Sysctls that were set in the pod's network namespace, for example by CNI's tuning plugin. They
//! are copied to the guest, because containers under runc see them.
//!
//! A value counts as set when it differs from the default of a new namespace. The defaults are read
//! once per boot of the node and kept in the directory of run-time state. If they change later, a
//! few values are copied that nobody set in the pod's namespace, which does no harm: runc's
//! containers see the same values.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, unshare};

use crate::host::private;

/// Directory of sysctls; `net` beneath it shows the namespace of the reading thread.
const ROOT: &str = "/proc/sys";

/// Sysctls that are copied at most: far more than anybody sets.
const CHANGED_MAX: usize = 256;

/// Longest value, in bytes.
const VALUE_BYTES_MAX: usize = 256;

/// Deepest directory beneath `net`.
const DEPTH_MAX: usize = 4;

/// Sysctls that are not copied: counters, actions, secrets, and what is set in other ways.
const OTHERS: [&str; 8] = [
    // The guest gets it with the interface's description.
    "mtu",
    // Write-only action.
    "flush",
    // The current count, and sizes of this kernel's table.
    "nf_conntrack_count",
    "nf_conntrack_buckets",
    "nf_conntrack_max",
    "nf_conntrack_expect_max",
    // Secrets of this namespace.
    "stable_secret",
    "tcp_fastopen_key",
];

/// Path beneath `/proc/sys` and value.
pub(super) type Sysctls = BTreeMap<String, String>;

/// Returns the sysctls of a new network namespace, which are kept in a file in `run_dir`.
pub(super) fn defaults(run_dir: &Path) -> io::Result<Sysctls> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let kept = run_dir.join(format!(
        ".net-defaults-{}",
        fs::read_to_string(BOOT_ID)?.trim()
    ));
    if let Some(known) = fs::read(&kept)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
    {
        return Ok(known);
    }
    let read = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        read(&[])
    });
    let found = read
        .join()
        .map_err(|_| io::Error::other("the thread in a new namespace panicked"))??;
    private::make_directory(run_dir)?;
    private::replace(&kept, &serde_json::to_vec(&found)?)?;
    Ok(found)
}

/// Reads the sysctls of this thread's network namespace and of these interfaces.
pub(super) fn read(interfaces: &[&str]) -> io::Result<Sysctls> {
    let mut found = Sysctls::new();
    read_beneath(Path::new(ROOT), "net", interfaces, 0, &mut found)?;
    Ok(found)
}

fn read_beneath(
    root: &Path,
    directory: &str,
    interfaces: &[&str],
    depth: usize,
    found: &mut Sysctls,
) -> io::Result<()> {
    for entry in fs::read_dir(root.join(directory))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{directory}/{name}");
        if entry.file_type()?.is_dir() {
            let of_interfaces = directory.ends_with("/conf") || directory.ends_with("/neigh");
            let wanted =
                ["all", "default"].contains(&name.as_str()) || interfaces.contains(&name.as_str());
            if depth < DEPTH_MAX && (!of_interfaces || wanted) {
                read_beneath(root, &path, interfaces, depth + 1, found)?;
            }
        } else if !OTHERS.contains(&name.as_str())
            // Some are write-only.
            && let Ok(value) = fs::read_to_string(entry.path())
            && value.len() <= VALUE_BYTES_MAX
        {
            found.insert(path, value.trim().to_owned());
        }
    }
    Ok(())
}

/// Returns the sysctls that differ from the defaults. Those of an interface are compared with the
/// defaults of a new interface.
pub(super) fn changed(here: Sysctls, defaults: &Sysctls) -> Sysctls {
    let by_itself = |path: &str| {
        let known = defaults.get(path);
        known.or_else(|| defaults.get(&of_a_new_interface(path)?.display().to_string()))
    };
    here.into_iter()
        .filter(|(path, value)| by_itself(path).is_none_or(|default| default != value))
        .take(CHANGED_MAX)
        .collect()
}

/// `net/ipv4/conf/eth0/x` as `net/ipv4/conf/default/x`.
fn of_a_new_interface(path: &str) -> Option<PathBuf> {
    let path = Path::new(path);
    let kind = path.parent()?.parent()?;
    Some(kind.join("default").join(path.file_name()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysctls(pairs: &[(&str, &str)]) -> Sysctls {
        let owned = |(path, value): &(&str, &str)| ((*path).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn what_somebody_set_is_carried_and_nothing_else() {
        let defaults = sysctls(&[
            ("net/ipv4/tcp_keepalive_time", "7200"),
            ("net/ipv4/ip_forward", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
        ]);
        let here = sysctls(&[
            ("net/ipv4/tcp_keepalive_time", "611"),
            ("net/ipv4/ip_forward", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/eth0.7/rp_filter", "2"),
            ("net/ipv4/conf/eth1/rp_filter", "0"),
        ]);
        let expected = sysctls(&[
            ("net/ipv4/tcp_keepalive_time", "611"),
            ("net/ipv4/conf/eth0.7/rp_filter", "2"),
        ]);
        assert_eq!(changed(here, &defaults), expected);
    }

    #[test]
    fn directories_of_other_interfaces_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        for path in [
            "net/core/somaxconn",
            "net/ipv4/conf/all/rp_filter",
            "net/ipv4/conf/eth0/rp_filter",
            "net/ipv4/conf/tap0/rp_filter",
            "net/ipv6/conf/eth0/mtu",
            "net/ipv6/conf/eth0/stable_secret",
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "1\n").unwrap();
        }
        let mut found = Sysctls::new();
        read_beneath(root.path(), "net", &["eth0"], 0, &mut found).unwrap();
        let paths: Vec<_> = found.keys().map(String::as_str).collect();
        let expected = [
            "net/core/somaxconn",
            "net/ipv4/conf/all/rp_filter",
            "net/ipv4/conf/eth0/rp_filter",
        ];
        assert_eq!(paths, expected);
        assert_eq!(found["net/core/somaxconn"], "1");
    }

    #[test]
    fn a_new_namespace_is_read_once_and_kept() {
        let run_dir = tempfile::tempdir().unwrap();
        let found = match defaults(run_dir.path()) {
            Ok(found) => found,
            Err(error) => {
                println!("skipped: a network namespace: {error}");
                return;
            }
        };
        assert!(found.contains_key("net/core/somaxconn"), "{found:?}");
        let kept = fs::read_dir(run_dir.path()).unwrap().next().unwrap();
        fs::write(kept.unwrap().path(), r#"{"net/core/x":"7"}"#).unwrap();
        let again = defaults(run_dir.path()).unwrap();
        assert_eq!(again, sysctls(&[("net/core/x", "7")]));
    }
}
