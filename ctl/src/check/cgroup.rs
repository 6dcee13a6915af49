//! Control groups of the host: which version, and which controllers pods can be limited by.

use super::Host;
use super::finding::Report;

/// Controllers without which a pod's limits and figures are lost.
const REQUIRED: &[&str] = &["cpu", "memory", "pids"];
/// Controllers that some pods need.
const WELCOME: &[&str] = &["cpuset", "io", "hugetlb"];

pub(super) fn check(host: Host<'_>, report: &mut Report) {
    let mounts = host.text("/proc/self/mounts").unwrap_or_default();
    if let Some(mount) = mount_of(&mounts, "cgroup2").filter(|path| *path == "/sys/fs/cgroup") {
        let controllers = host
            .text(&format!("{mount}/cgroup.controllers"))
            .unwrap_or_default();
        return judge(
            2,
            &controllers.split_whitespace().collect::<Vec<_>>(),
            report,
        );
    }
    if mount_of(&mounts, "cgroup").is_none() {
        let action = "mount -t cgroup2 none /sys/fs/cgroup, or boot with an init that does";
        return report.fail("cgroup", "no control groups on /sys/fs/cgroup", action);
    }
    let table = host.text("/proc/cgroups").unwrap_or_default();
    judge(1, &v1_controllers(&table), report);
}

/// Where the first file system of a type is mounted.
fn mount_of<'a>(mounts: &'a str, kind: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(2) == Some(&kind)).then(|| fields[1])
    })
}

/// `/proc/cgroups`: name, hierarchy, groups, enabled (cgroups(7)). cgroup v1 calls `io` `blkio`.
fn v1_controllers(table: &str) -> Vec<&str> {
    table
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (fields.get(3) == Some(&"1")).then(|| {
                if fields[0] == "blkio" {
                    "io"
                } else {
                    fields[0]
                }
            })
        })
        .collect()
}

fn judge(version: u32, controllers: &[&str], report: &mut Report) {
    let absent = |wanted: &[&'static str]| -> Vec<&'static str> {
        wanted
            .iter()
            .copied()
            .filter(|name| !controllers.contains(name))
            .collect()
    };
    let (required, welcome) = (absent(REQUIRED), absent(WELCOME));
    if !required.is_empty() {
        let found = format!("version {version} without {}", required.join(", "));
        report.fail(
            "cgroup",
            found,
            "boot the kernel without cgroup_disable= and let the init system delegate them",
        );
    } else if !welcome.is_empty() {
        let found = format!("version {version} without {}", welcome.join(", "));
        report.warn(
            "cgroup",
            found,
            "only pods that use them need them: enable them in the kernel",
        );
    } else if version == 1 {
        report.warn(
            "cgroup",
            "version 1",
            "nothing was ever run on it: boot with systemd.unified_cgroup_hierarchy=1",
        );
    } else {
        report.ok(
            "cgroup",
            format!("version 2 with {}", controllers.join(" ")),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::finding::Level;

    fn finding(files: &[(&str, &str)]) -> (Level, String) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let mut report = Report::default();
        check(
            Host {
                root: folder.path(),
            },
            &mut report,
        );
        (report.findings[0].level, report.findings[0].found.clone())
    }

    #[test]
    fn both_versions_are_recognised() {
        let v2 = ("proc/self/mounts", "none /sys/fs/cgroup cgroup2 rw 0 0\n");
        let controllers = |text| ("sys/fs/cgroup/cgroup.controllers", text);
        let all = "cpuset cpu io memory hugetlb pids\n";
        assert_eq!(
            finding(&[v2, controllers(all)]),
            (Level::Ok, format!("version 2 with {}", all.trim()))
        );
        assert_eq!(
            finding(&[v2, controllers("cpu memory pids")]).0,
            Level::Warn
        );
        assert_eq!(
            finding(&[v2, controllers("cpu pids")]),
            (Level::Fail, "version 2 without memory".into())
        );
        let v1 = (
            "proc/self/mounts",
            "c /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n",
        );
        let rows: String = ["cpuset", "cpu", "blkio", "memory", "hugetlb", "pids"]
            .iter()
            .map(|name| format!("{name}\t0\t1\t1\n"))
            .collect();
        let table = format!("#subsys_name\thierarchy\tnum_cgroups\tenabled\n{rows}");
        assert_eq!(
            finding(&[v1, ("proc/cgroups", &table)]),
            (Level::Warn, "version 1".into())
        );
        let without = table.replace("memory\t0\t1\t1", "memory\t0\t1\t0");
        assert_eq!(finding(&[v1, ("proc/cgroups", &without)]).0, Level::Fail);
        assert_eq!(finding(&[]).0, Level::Fail);
    }
}
