//! containerd: is it there, new enough, and does it know our runtime handler?

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use pericarp_runtime_config::{Config, RuntimeOptions};

use super::Host;
use super::containerd_config::{ContainerdConfig, Handler, RUNTIME_TYPE, parse};
use super::finding::Report;
use super::program::{output, version};

/// The first release with the shim interface that we speak.
const OLDEST: (u32, u32, u32) = (1, 7, 0);
const SHIM: &str = "containerd-shim-pericarp-v2";
const DEFAULT_CONFIG: &str = "/etc/containerd/config.toml";
/// PATH of a service that systemd starts.
const SERVICE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A containerd, running or only installed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Daemon {
    running: bool,
    program: PathBuf,
    /// Its configuration file, when its command line names one.
    config: Option<PathBuf>,
    /// Where it looks for shims.
    search_path: String,
}

pub(super) fn check(host: Host<'_>, config: &Config, named: Option<&Path>, report: &mut Report) {
    let Some(daemon) = running(host).or_else(installed) else {
        let action = "install containerd 1.7 or later";
        return report.fail(
            "containerd",
            "no containerd runs, and none is in PATH",
            action,
        );
    };
    if !daemon.running {
        report.fail(
            "containerd",
            format!("{} does not run", daemon.program.display()),
            "start it",
        );
    }
    judge_version(&output(&daemon.program, &["--version"]), report);
    let file = named
        .or(daemon.config.as_deref())
        .unwrap_or(Path::new(DEFAULT_CONFIG));
    scopes(host, &daemon, report);
    match read_config(&daemon.program, file) {
        Err(error) => {
            let action = "correct it, or name the right file with --containerd-config";
            report.fail(
                "containerd.config",
                format!("{}: {error}", file.display()),
                action,
            );
            shim(&daemon, None, report);
        }
        Ok(read) => {
            if daemon.running {
                socket(&read.socket, report);
            }
            handlers(&read, config, file, report);
            let runtime_path = read
                .handlers
                .iter()
                .find_map(|handler| handler.runtime_path.clone());
            shim(&daemon, runtime_path.as_deref(), report);
        }
    }
}

/// The daemon among the host's processes (proc(5): comm, exe, cmdline, environ).
fn running(host: Host<'_>) -> Option<Daemon> {
    let processes = std::fs::read_dir(host.path("/proc")).ok()?;
    processes
        .flatten()
        .map(|entry| entry.path())
        .find_map(|process| {
            let comm = std::fs::read_to_string(process.join("comm")).ok()?;
            if comm.trim() != "containerd" {
                return None;
            }
            let text = |file| std::fs::read_to_string(process.join(file)).unwrap_or_default();
            Some(Daemon {
                running: true,
                program: std::fs::read_link(process.join("exe")).ok()?,
                config: config_argument(&text("cmdline")).map(PathBuf::from),
                search_path: variable(&text("environ"), "PATH")
                    .unwrap_or(SERVICE_PATH)
                    .to_owned(),
            })
        })
}

fn installed() -> Option<Daemon> {
    let path = std::env::var("PATH").unwrap_or_default();
    let program = find_program(&path, "containerd")?;
    Some(Daemon {
        running: false,
        program,
        config: None,
        search_path: SERVICE_PATH.to_owned(),
    })
}

/// The value of `--config` or `-c` in a NUL-separated command line.
fn config_argument(cmdline: &str) -> Option<&str> {
    let mut words = cmdline.split('\0');
    while let Some(word) = words.next() {
        match word {
            "--config" | "-config" | "-c" | "--c" => return words.next(),
            _ => {}
        }
        if let Some((name, value)) = word.split_once('=')
            && ["--config", "-config", "-c", "--c"].contains(&name)
        {
            return Some(value);
        }
    }
    None
}

/// A variable of a NUL-separated environment.
fn variable<'a>(environ: &'a str, name: &str) -> Option<&'a str> {
    environ
        .split('\0')
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

fn find_program(search_path: &str, name: &str) -> Option<PathBuf> {
    search_path
        .split(':')
        .filter(|folder| !folder.is_empty())
        .map(|folder| Path::new(folder).join(name))
        .find(|path| {
            path.metadata().is_ok_and(|metadata| {
                metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
            })
        })
}

fn judge_version(answer: &Result<String, String>, report: &mut Report) {
    let check = "containerd.version";
    match answer {
        Err(error) => report.warn(check, error, "see that it runs"),
        Ok(text) => match version(text) {
            Some(found @ (major, minor, patch)) if found >= OLDEST => {
                report.ok(check, format!("{major}.{minor}.{patch}"));
            }
            Some(_) => report.fail(check, text, "install containerd 1.7 or later"),
            None => report.warn(
                check,
                format!("{text:?} tells no version"),
                "use 1.7 or later",
            ),
        },
    }
}

/// The configuration with its imports as containerd itself merges them; the bare file where that
/// fails.
fn read_config(program: &Path, file: &Path) -> Result<ContainerdConfig, String> {
    let dump = output(
        program,
        &["--config", &file.to_string_lossy(), "config", "dump"],
    );
    let main = std::fs::read_to_string(file);
    let text = match (dump, &main) {
        (Ok(text), _) if !text.trim().is_empty() => text,
        (_, Ok(text)) => text.clone(),
        (_, Err(error)) => return Err(error.to_string()),
    };
    let mut config = parse(&text)?;
    // containerd 2.x prints its newest version whatever the main file's is.
    if let Some(main) = main.ok().and_then(|text| parse(&text).ok()) {
        config.version = main.version;
    }
    Ok(config)
}

fn socket(path: &str, report: &mut Report) {
    match UnixStream::connect(path) {
        Ok(_) => report.ok("containerd.socket", path),
        Err(error) => report.fail(
            "containerd.socket",
            format!("{path}: {error}"),
            "restart containerd",
        ),
    }
}

/// Where systemd runs, the shim has it make a scope for each pod of kubelet's systemd cgroup driver
/// (sd_booted(3) for the folder).
fn scopes(host: Host<'_>, daemon: &Daemon, report: &mut Report) {
    if !host.path("/run/systemd/system").is_dir() {
        return;
    }
    match find_program(&daemon.search_path, "busctl") {
        Some(program) => report.ok("containerd.systemd", program.display().to_string()),
        None => report.fail(
            "containerd.systemd",
            format!(
                "busctl is not in containerd's PATH ({})",
                daemon.search_path
            ),
            "install systemd's tools, or no pod of kubelet's systemd cgroup driver starts",
        ),
    }
}

fn shim(daemon: &Daemon, runtime_path: Option<&str>, report: &mut Report) {
    let check = "containerd.shim";
    // containerd looks in its PATH and then beside its own program
    // (core/runtime/v2/shim_manager.go).
    let beside = daemon
        .program
        .parent()
        .map(|folder| folder.to_string_lossy().into_owned());
    let path = match &beside {
        Some(folder) => format!("{}:{folder}", daemon.search_path),
        None => daemon.search_path.clone(),
    };
    let found = match runtime_path {
        Some(path) => Path::new(path).exists().then(|| PathBuf::from(path)),
        None => find_program(&path, SHIM),
    };
    match (found, runtime_path) {
        (Some(program), _) => report.ok(check, program.display().to_string()),
        (None, Some(path)) => report.fail(
            check,
            format!("runtime_path {path} is not there"),
            "correct it in containerd's configuration",
        ),
        (None, None) => report.fail(
            check,
            format!("{SHIM} is not in containerd's PATH ({path})"),
            "make install, or link it there",
        ),
    }
}

fn handlers(read: &ContainerdConfig, config: &Config, file: &Path, report: &mut Report) {
    let check = "containerd.handler";
    if read.handlers.is_empty() {
        let found = format!(
            "no handler with runtime_type {RUNTIME_TYPE} (there are: {})",
            read.all_handlers.join(", ")
        );
        return report.fail(check, found, handler_action(read.version, file));
    }
    for handler in &read.handlers {
        judge_handler(handler, config, report);
    }
}

/// What to do on a node whose containerd does not know us: the two majors take it differently.
fn handler_action(config_version: Option<i64>, file: &Path) -> String {
    let main = file.display();
    if config_version.is_some_and(|version| version < 3) {
        return format!(
            "add the lines of deploy/containerd/pericarp-1.7.toml to {main} and restart containerd"
        );
    }
    let first = if file.exists() {
        format!("see that {main} imports /etc/containerd/conf.d/*.toml")
    } else {
        format!("write {main} with version = 3 and imports = [\"/etc/containerd/conf.d/*.toml\"]")
    };
    format!("{first}, put deploy/containerd/pericarp.toml there and restart containerd")
}

fn judge_handler(handler: &Handler, config: &Config, report: &mut Report) {
    let check = "containerd.handler";
    let name = &handler.name;
    match options(handler, config) {
        Ok(detail) => report.ok(check, format!("{name}{detail}")),
        Err(error) => report.fail(
            check,
            format!("{name}: {error}"),
            "correct its options in containerd's configuration",
        ),
    }
    if !handler.passes_annotations() {
        let found = format!("handler {name} does not pass pods' annotations on: they are ignored");
        report.warn(check, found, "add pod_annotations = [\"pericarp.dev/*\"]");
    }
    if !handler.privileged_without_host_devices {
        let found = format!(
            "handler {name} gives privileged pods every device of the host, which are refused"
        );
        report.warn(check, found, "set privileged_without_host_devices = true");
    }
}

fn options(handler: &Handler, config: &Config) -> Result<String, String> {
    let options = RuntimeOptions::parse(&handler.options).map_err(|error| error.to_string())?;
    let mut detail = String::new();
    let own;
    let config = match &options.config_path {
        None => config,
        Some(path) => {
            own = Config::load(Some(path), true).map_err(|error| error.to_string())?;
            detail = format!(", configuration {}", path.display());
            &own
        }
    };
    if let Some(flavour) = &options.flavour {
        config
            .clone()
            .with_flavour(flavour)
            .map_err(|error| error.to_string())?;
        detail = format!("{detail}, flavour {flavour}");
    }
    Ok(detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::finding::Level;

    #[test]
    fn a_running_daemon_is_found_with_its_arguments() {
        let folder = tempfile::tempdir().unwrap();
        let process = folder.path().join("proc/42");
        std::fs::create_dir_all(&process).unwrap();
        std::fs::create_dir_all(folder.path().join("proc/self")).unwrap();
        std::fs::write(process.join("comm"), "containerd\n").unwrap();
        std::fs::write(
            process.join("cmdline"),
            "/opt/containerd\0-c\0/etc/c.toml\0",
        )
        .unwrap();
        std::fs::write(process.join("environ"), "HOME=/\0PATH=/a:/b\0").unwrap();
        std::os::unix::fs::symlink("/opt/containerd", process.join("exe")).unwrap();
        let daemon = running(Host {
            root: folder.path(),
        })
        .unwrap();
        assert!(daemon.running);
        assert_eq!(daemon.program, Path::new("/opt/containerd"));
        assert_eq!(daemon.config.as_deref(), Some(Path::new("/etc/c.toml")));
        assert_eq!(daemon.search_path, "/a:/b");
        assert_eq!(
            running(Host {
                root: &folder.path().join("x")
            }),
            None
        );
    }

    #[test]
    fn systemds_tool_is_looked_for_where_systemd_runs() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host {
            root: folder.path(),
        };
        let level = |search_path: &str| {
            let daemon = Daemon {
                search_path: search_path.to_owned(),
                ..Daemon::default()
            };
            let mut report = Report::default();
            scopes(host, &daemon, &mut report);
            report.findings.first().map(|finding| finding.level)
        };
        assert_eq!(level("/nowhere"), None);
        std::fs::create_dir_all(folder.path().join("run/systemd/system")).unwrap();
        assert_eq!(level("/nowhere"), Some(Level::Fail));
        let program = folder.path().join("busctl");
        std::fs::write(&program, "").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(level(&folder.path().to_string_lossy()), Some(Level::Ok));
    }

    #[test]
    fn the_configuration_argument_is_found_in_every_spelling() {
        for cmdline in [
            "c\0--config\0/x",
            "c\0--config=/x",
            "c\0-c\0/x\0",
            "c\0-c=/x",
            "c\0--log\0-c=/x",
        ] {
            assert_eq!(config_argument(cmdline), Some("/x"), "{cmdline}");
        }
        assert_eq!(config_argument("c\0--log-level\0debug"), None);
        assert_eq!(config_argument("c\0-c"), None);
    }

    #[test]
    fn handlers_are_judged_with_our_own_configuration() {
        let text = "[flavour.gpu.vm]\ndefault_vcpus = 2";
        let config = Config::from_texts([(Path::new("c"), text)]).unwrap();
        let levels = |options: &str, annotations: &str| {
            let handler = Handler {
                name: "p".into(),
                runtime_path: None,
                pod_annotations: vec![annotations.into()],
                privileged_without_host_devices: true,
                options: options.into(),
            };
            let mut report = Report::default();
            judge_handler(&handler, &config, &mut report);
            report
                .findings
                .iter()
                .map(|finding| finding.level)
                .collect::<Vec<_>>()
        };
        assert_eq!(levels("", "pericarp.dev/*"), [Level::Ok]);
        assert_eq!(levels("Flavour = 'gpu'", "pericarp.dev/*"), [Level::Ok]);
        assert_eq!(levels("Flavour = 'cpu'", "pericarp.dev/*"), [Level::Fail]);
        assert_eq!(
            levels("ConfigPath = '/nonexistent'", "pericarp.dev/*"),
            [Level::Fail]
        );
        assert_eq!(
            levels("SystemdCgroup = true", ""),
            [Level::Fail, Level::Warn]
        );
    }

    #[test]
    fn versions_and_missing_handlers_are_judged() {
        let mut report = Report::default();
        judge_version(&Ok("containerd x v1.6.20 y".into()), &mut report);
        judge_version(&Ok("containerd x 2.3.4 y".into()), &mut report);
        judge_version(&Err("gone".into()), &mut report);
        handlers(
            &parse("").unwrap(),
            &Config::default(),
            Path::new("/e"),
            &mut report,
        );
        let levels: Vec<Level> = report
            .findings
            .iter()
            .map(|finding| finding.level)
            .collect();
        assert_eq!(levels, [Level::Fail, Level::Ok, Level::Warn, Level::Fail]);
    }
}
