//! What the harness does when something goes wrong: one line that says what, where the log is and
//! what to do; nothing left behind.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pericarp_tests::node::builder::Kind;
use pericarp_tests::node::{Builder, paths};

/// Processes whose command line names `text`.
fn processes_that_name(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")
        .expect("/proc is there")
        .flatten()
    {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains("qemu-system") && line.contains(text) {
            found.push(line);
        }
    }
    found
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/self/mounts").expect("/proc is there")
}

/// A killed process is gone when its parent has waited for it; that is another thread's work.
fn gone(text: &str) -> bool {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while std::time::Instant::now() < deadline {
        if processes_that_name(text).is_empty() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

#[test]
fn a_node_that_does_not_come_up_is_one_line_and_leaves_nothing() {
    let before = mounts();
    let builder = Builder::default()
        .name("too-slow")
        .boot_timeout(Duration::from_millis(50));
    let text = format!("{:#}", builder.boot().unwrap_err());
    let results = paths::results().join("too-slow");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("did not come up"), "{text}");
    assert!(
        text.contains(&results.canonicalize().unwrap().display().to_string()),
        "{text}"
    );
    assert!(results.join("qemu.command").exists());
    assert!(gone("out/node/too-slow"));
    assert_eq!(mounts(), before);
}

#[test]
fn a_node_whose_memory_is_too_small_is_one_line_with_its_last_words() {
    let builder = Builder::default().name("too-small").memory_mib(48);
    let text = format!("{:#}", builder.boot().unwrap_err());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("serial.log"), "{text}");
    assert!(gone("out/node/too-small"));
}

#[test]
fn an_unknown_device_is_one_line_with_the_known_ones() {
    let program = env!("CARGO_BIN_EXE_node");
    let output = Command::new(program)
        .args(["run", "--device", "floppy", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.ends_with(
            "error: there is no device floppy; there are nvme, virtio-blk, \
                            virtio-gpu, edu\n"
        ),
        "{text}"
    );
}

/// Ctrl-C, and a kill that leaves no time to clean up.
#[test]
fn an_interrupted_run_leaves_no_process_and_no_mount() {
    use std::io::{BufRead, BufReader};
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let before = mounts();
        let mut run = Command::new(env!("CARGO_BIN_EXE_node"))
            .args(["run", "sleep 1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let results = format!("run-{}", run.id());
        let mut lines = BufReader::new(run.stderr.take().unwrap())
            .lines()
            .map_while(Result::ok);
        assert!(
            lines.any(|line| line.contains("node: up")),
            "the node did not come up"
        );
        assert_eq!(processes_that_name(&results).len(), 1);
        kill(Pid::from_raw(i32::try_from(run.id()).unwrap()), signal).unwrap();
        assert!(!run.wait().unwrap().success());
        assert!(
            gone(&results),
            "{signal}: {:?}",
            processes_that_name(&results)
        );
        assert_eq!(mounts(), before);
        std::fs::remove_dir_all(paths::results().join(results)).unwrap();
    }
}

#[test]
fn this_computer_is_the_node_only_when_its_kvm_boots_a_stock_kernel() {
    let boot = pericarp_tests::node::boot::prepare().unwrap();
    let usable = pericarp_tests::node::machine::host::boots_stock_kernel(&boot);
    let Err(reason) = usable else { return };
    let builder = Builder::default().name("host").kind(Kind::Host);
    let text = format!("{:#}", builder.boot().unwrap_err());
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.contains(&format!("{reason:#}")) && text.contains("--host"),
        "{text}"
    );
}
