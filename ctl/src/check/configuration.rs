//! Our own configuration, and the user ids that it takes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pericarp_runtime_config::load::{DEFAULT_FILE, DROP_IN_DIRECTORY, drop_in_files};
use pericarp_runtime_config::{Config, LoadError};

use super::Host;
use super::finding::Report;

const CHECK: &str = "config";

/// Reads the configuration; where it is wrong, the other checks go on with the defaults.
pub(super) fn check(host: Host<'_>, file: Option<&Path>, report: &mut Report) -> Config {
    let config = match Config::load(file, true) {
        Ok(config) => {
            let found = file.unwrap_or(Path::new(DEFAULT_FILE));
            let absent = if found.exists() {
                ""
            } else {
                " is not there: defaults"
            };
            report.ok(CHECK, format!("{}{absent}", found.display()));
            config
        }
        Err(LoadError::Invalid { problems }) => {
            for problem in &problems {
                report.fail(
                    CHECK,
                    problem.to_string(),
                    "change it; `pericarp config check` tells when it is right",
                );
            }
            Config::default()
        }
        Err(error @ LoadError::Read { .. }) => {
            let reason =
                std::error::Error::source(&error).map_or(String::new(), |e| format!(": {e}"));
            report.fail(
                CHECK,
                format!("{error}{reason}"),
                "make it readable for root",
            );
            Config::default()
        }
        Err(error) => {
            report.fail(
                CHECK,
                error.to_string(),
                "move what is not configuration elsewhere",
            );
            Config::default()
        }
    };
    owners(file.unwrap_or(Path::new(DEFAULT_FILE)), report);
    let security = &config.settings.security;
    let ids = u64::from(security.vmm_uid_base)
        ..u64::from(security.vmm_uid_base) + u64::from(security.vmm_uid_count);
    user_ids(
        &ids,
        &host.text("/etc/passwd").unwrap_or_default(),
        &host.text("/etc/subuid").unwrap_or_default(),
        report,
    );
    config
}

/// Whoever can write these files is root in effect: they name the programs that a shim runs.
fn owners(file: &Path, report: &mut Report) {
    let mut paths = vec![file.to_owned()];
    if let Some(parent) = file.parent() {
        let drop_ins = parent.join(DROP_IN_DIRECTORY);
        paths.extend(drop_in_files(&drop_ins).unwrap_or_default());
        paths.extend([parent.to_owned(), drop_ins]);
    }
    for path in paths {
        let Ok(metadata) = path.metadata() else {
            continue;
        };
        if metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
            let found = format!("{} can be written by others than root", path.display());
            report.fail(
                "config.owner",
                found,
                format!("chown root {0}; chmod go-w {0}", path.display()),
            );
        }
    }
}

fn user_ids(ids: &std::ops::Range<u64>, passwd: &str, subuid: &str, report: &mut Report) {
    let action = "set `security.vmm_uid_base` to a range that nobody uses";
    let range = format!("{} to {}", ids.start, ids.end - 1);
    // passwd(5): name:password:uid:...
    let user = passwd.lines().find(|line| {
        line.split(':')
            .nth(2)
            .and_then(|uid| uid.parse().ok())
            .is_some_and(|uid: u64| ids.contains(&uid))
    });
    // subuid(5): name:first:count
    let delegated = subuid.lines().find(|line| {
        let mut fields = line
            .split(':')
            .skip(1)
            .map(|field| field.parse::<u64>().ok());
        match (fields.next().flatten(), fields.next().flatten()) {
            (Some(first), Some(count)) => {
                first < ids.end && ids.start < first.saturating_add(count)
            }
            _ => false,
        }
    });
    let name = |line: &str| line.split(':').next().unwrap_or_default().to_owned();
    if let Some(line) = user {
        report.fail(
            "config.user_ids",
            format!("user {} has an id of the VMMs' ({range})", name(line)),
            action,
        );
    } else if let Some(line) = delegated {
        report.fail(
            "config.user_ids",
            format!(
                "/etc/subuid gives {} ids of the VMMs' ({range})",
                name(line)
            ),
            action,
        );
    } else {
        report.ok("config.user_ids", format!("{range} belong to nobody else"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::finding::Level;

    #[test]
    fn taken_user_ids_are_found() {
        let finding = |passwd: &str, subuid: &str| {
            let mut report = Report::default();
            user_ids(&(1000..2000), passwd, subuid, &mut report);
            (report.findings[0].level, report.findings[0].found.clone())
        };
        assert_eq!(
            finding("root:x:0:0::/:/bin/sh\nbad line\n", "a:2000:10\nb:0:1000\n").0,
            Level::Ok
        );
        let (level, found) = finding("root:x:0:0\nmaria:x:1999:0\n", "");
        assert!(level == Level::Fail && found.contains("maria"), "{found}");
        let (level, found) = finding("", "paul:500:501\n");
        assert!(level == Level::Fail && found.contains("paul"), "{found}");
        assert_eq!(finding("", "all:0:18446744073709551615").0, Level::Fail);
    }

    #[test]
    fn each_mistake_of_the_file_is_a_finding() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        std::fs::write(&file, "[vm]\ndefault_vcpu = 1\n[log]\nlevel = 'loud'\n").unwrap();
        let mut report = Report::default();
        let config = check(
            Host {
                root: folder.path(),
            },
            Some(&file),
            &mut report,
        );
        assert_eq!(config.settings, Config::default().settings);
        let failed: Vec<&str> = report
            .findings
            .iter()
            .filter(|finding| finding.check == CHECK)
            .map(|finding| finding.found.as_str())
            .collect();
        assert_eq!(failed.len(), 2);
        assert!(
            failed[0].contains("config.toml:2:1: `vm.default_vcpu`"),
            "{failed:?}"
        );
    }
}
