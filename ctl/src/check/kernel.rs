//! What the host's kernel offers beside KVM.

use std::fs::OpenOptions;

use io_uring::IoUring;
use nix::sys::memfd::{MFdFlags, memfd_create};
use pericarp_runtime_config::{HugePages, Settings};

use super::Host;
use super::finding::Report;
use super::program::version;

/// Volumes are shared with the guest by mount_setattr(2), which came with Linux 5.12.
const MOUNT_SETATTR_RELEASE: (u32, u32, u32) = (5, 12, 0);
/// Idmapped mounts of tmpfs came with Linux 6.3.
const IDMAP_TMPFS_RELEASE: (u32, u32, u32) = (6, 3, 0);

/// Whether the kernel has a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    /// Loaded, or part of the kernel.
    Present,
    /// The kernel loads it when it is needed.
    Loadable,
    /// Not among the kernel's modules.
    Missing,
    /// The list of modules is not there.
    Unknown,
}

pub(super) fn check(host: Host<'_>, settings: &Settings, report: &mut Report) {
    let release = host.text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    judge_release(release, report);
    openable(
        "kernel.tun",
        "/dev/net/tun",
        "modprobe tun; without it pods have no network",
        settings_need(true),
        report,
    );
    openable(
        "kernel.vhost_net",
        "/dev/vhost-net",
        "modprobe vhost_net, or set `network.vhost = false` (slower)",
        settings_need(settings.network.vhost),
        report,
    );
    module(
        host,
        release,
        "kernel.overlay",
        "overlay",
        "the overlayfs snapshotter",
        report,
    );
    for name in ["sch_ingress", "act_mirred"] {
        module(
            host,
            release,
            "kernel.tc",
            name,
            "redirecting packets between CNI's interface and the pod",
            report,
        );
    }
    memfd(report);
    io_uring(report);
    huge_pages(host, settings.vm.huge_pages, report);
}

/// Is a missing device a failure or only a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Required,
    Unused,
}

const fn settings_need(used: bool) -> Need {
    if used { Need::Required } else { Need::Unused }
}

fn judge_release(release: &str, report: &mut Report) {
    let Some(numbers) = version(release) else {
        return report.warn(
            "kernel.release",
            format!("{release:?} is not understood"),
            "tell us",
        );
    };
    let action = "pods in user namespaces (hostUsers: false) need 6.3 or later on the host";
    if numbers < MOUNT_SETATTR_RELEASE {
        report.fail(
            "kernel.release",
            format!("{release}: no mount_setattr(2)"),
            "boot Linux 5.12 or later on the host",
        );
    } else if numbers < IDMAP_TMPFS_RELEASE {
        report.warn(
            "kernel.release",
            format!("{release}: no idmapped mounts of tmpfs"),
            action,
        );
    } else {
        report.ok("kernel.release", format!("{release}, idmapped mounts"));
    }
}

fn openable(
    check: &'static str,
    device: &'static str,
    action: &'static str,
    need: Need,
    report: &mut Report,
) {
    // Opening also loads the module where the device node stands for it.
    let result = OpenOptions::new().read(true).write(true).open(device);
    match (result, need) {
        (Ok(_), _) => report.ok(check, device),
        (Err(error), Need::Required) => report.fail(check, format!("{device}: {error}"), action),
        (Err(_), Need::Unused) => report.ok(check, format!("{device} is not there and not used")),
    }
}

fn module(
    host: Host<'_>,
    release: &str,
    check: &'static str,
    name: &str,
    purpose: &str,
    report: &mut Report,
) {
    match find_module(host, release, name) {
        Module::Present => report.ok(check, format!("{name} is there")),
        Module::Loadable => report.ok(check, format!("{name} can be loaded")),
        Module::Missing => {
            let action = format!("install the kernel's module {name}: {purpose} needs it");
            report.fail(
                check,
                format!("{name} is neither loaded nor among the kernel's modules"),
                action,
            );
        }
        Module::Unknown => {
            let found =
                format!("{name} is not loaded, and /lib/modules/{release} has no list of modules");
            report.warn(
                check,
                found,
                format!("modprobe {name}, unless it is built in: {purpose} needs it"),
            );
        }
    }
}

fn find_module(host: Host<'_>, release: &str, name: &str) -> Module {
    let filesystems = host.text("/proc/filesystems").unwrap_or_default();
    if host.exists(&format!("/sys/module/{name}"))
        || filesystems
            .lines()
            .any(|line| line.split_whitespace().last() == Some(name))
    {
        return Module::Present;
    }
    let list = |file: &str| host.text(&format!("/lib/modules/{release}/{file}"));
    let wanted = format!("/{name}.ko");
    match (list("modules.builtin"), list("modules.dep")) {
        (Some(built_in), _) if built_in.lines().any(|line| line.ends_with(&wanted)) => {
            Module::Present
        }
        // `kernel/net/sched/act_mirred.ko.xz: other.ko.xz`
        (_, Some(list)) => {
            let named = |line: &str| {
                line.split(':')
                    .next()
                    .is_some_and(|path| path.contains(&wanted))
            };
            if list.lines().any(named) {
                Module::Loadable
            } else {
                Module::Missing
            }
        }
        _ => Module::Unknown,
    }
}

fn memfd(report: &mut Report) {
    match memfd_create(
        "pericarp-check",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    ) {
        Ok(_) => report.ok("kernel.memfd", "memfd_create with seals"),
        Err(error) => {
            let action = "use a kernel with CONFIG_MEMFD_CREATE: guest memory lives there";
            report.fail("kernel.memfd", format!("memfd_create: {error}"), action);
        }
    }
}

fn io_uring(report: &mut Report) {
    match IoUring::new(2) {
        Ok(_) => report.ok("kernel.io_uring", "io_uring_setup"),
        Err(error) => report.warn(
            "kernel.io_uring",
            format!("io_uring_setup: {error}"),
            "sysctl kernel.io_uring_disabled=0; disks of pods are served through it",
        ),
    }
}

fn huge_pages(host: Host<'_>, size: HugePages, report: &mut Report) {
    let directory = match size {
        HugePages::None => return,
        HugePages::Size2Mib => "hugepages-2048kB",
        HugePages::Size1Gib => "hugepages-1048576kB",
    };
    let file = format!("/sys/kernel/mm/hugepages/{directory}/nr_hugepages");
    let pages = host
        .text(&file)
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(0);
    if pages == 0 {
        let found = format!("`vm.huge_pages` is \"{size}\" and the host has none of that size");
        report.fail(
            "kernel.huge_pages",
            found,
            format!("reserve some: echo N > {file}"),
        );
    } else {
        report.ok("kernel.huge_pages", format!("{pages} of {size}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::finding::Level;

    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn modules_are_found_wherever_they_are() {
        let folder = files(&[
            ("proc/filesystems", "nodev\ttmpfs\nnodev\toverlay\n"),
            ("sys/module/tun/refcnt", "0"),
            (
                "lib/modules/6.1/modules.builtin",
                "kernel/net/sched/sch_ingress.ko\n",
            ),
            (
                "lib/modules/6.1/modules.dep",
                "kernel/net/sched/act_mirred.ko.xz: kernel/a/act_x.ko.xz\n",
            ),
        ]);
        let host = Host {
            root: folder.path(),
        };
        let table = [
            ("overlay", Module::Present),
            ("tun", Module::Present),
            ("sch_ingress", Module::Present),
            ("act_mirred", Module::Loadable),
            ("act_x", Module::Missing),
        ];
        for (name, expected) in table {
            assert_eq!(find_module(host, "6.1", name), expected, "{name}");
        }
        assert_eq!(find_module(host, "6.2", "act_mirred"), Module::Unknown);
    }

    #[test]
    fn releases_are_judged() {
        let level = |release| {
            let mut report = Report::default();
            judge_release(release, &mut report);
            report.findings[0].level
        };
        assert_eq!(level("6.12.9-amd64"), Level::Ok);
        assert_eq!(level("6.1.0-40-amd64"), Level::Warn);
        assert_eq!(level("5.12.0"), Level::Warn);
        assert_eq!(level("5.10.1"), Level::Fail);
        assert_eq!(level("x"), Level::Warn);
    }

    #[test]
    fn huge_pages_are_looked_for_only_when_they_are_used() {
        let folder = files(&[(
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            "7\n",
        )]);
        let levels = |size| {
            let mut report = Report::default();
            huge_pages(
                Host {
                    root: folder.path(),
                },
                size,
                &mut report,
            );
            report
                .findings
                .iter()
                .map(|finding| finding.level)
                .collect::<Vec<_>>()
        };
        assert_eq!(levels(HugePages::None), []);
        assert_eq!(levels(HugePages::Size2Mib), [Level::Ok]);
        assert_eq!(levels(HugePages::Size1Gib), [Level::Fail]);
    }
}
