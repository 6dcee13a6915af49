//! Containers and execs whose program cannot start.

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Exit, Node};
use serde_json::{Map, Value, json};

use crate::PERICARP;
use crate::side::{Side, WAIT, assert_same, container, node, under_both, wait_until};

/// Deadline of a command that runc answers at once.
const AT_ONCE_S: u64 = 20;

/// Number of execs that cannot start, one after the other.
const EXECS: usize = 20;

/// Folder of the node with programs that a container cannot run.
const PROGRAMS: &str = "/run/programs-of-the-test";

/// Creates the programs.
fn make_programs(node: &Node) -> Result<()> {
    // The loader of the first is missing in the image.
    node.shell(&format!(
        "mkdir -p {PROGRAMS} && cd {PROGRAMS} && cp /usr/bin/sort no-loader && \
         printf '#!/no/such/shell\\n' >no-shell && printf 'words' >no-format && \
         head -c 100 /usr/bin/sort >short && chmod 755 * && cp /usr/bin/sort not-executable && \
         chmod 644 not-executable && mkdir folder"
    ))
    .map(drop)
}

/// A program to run: name of the case, program, working folder.
type Case = (&'static str, &'static str, &'static str);

/// Programs that can be found and that execve(2) refuses.
const KERNEL_REFUSES: [Case; 4] = [
    ("missing-loader", "/programs/no-loader", "/"),
    ("missing-shell", "/programs/no-shell", "/"),
    ("no-format", "/programs/no-format", "/"),
    ("short", "/programs/short", "/"),
];

/// Programs and folders that cannot be found or used.
const NOT_THERE: [Case; 5] = [
    ("missing", "/programs/none", "/"),
    ("missing-in-path", "none", "/"),
    ("not-executable", "/programs/not-executable", "/"),
    ("folder", "/programs/folder", "/"),
    ("working-folder-is-a-file", "/bin/true", "/etc/passwd"),
];

fn cases() -> impl Iterator<Item = Case> + Clone {
    KERNEL_REFUSES.into_iter().chain(NOT_THERE)
}

fn with_programs(name: &str, argv: &[&str]) -> Value {
    let mut config = container(name, argv);
    let mount = json!({"host_path": PROGRAMS, "container_path": "/programs", "readonly": true});
    config["mounts"].as_array_mut().expect("a list").push(mount);
    config["image"]["image"] = json!(BUSYBOX);
    config
}

/// Starts a container that cannot start, and returns its state afterwards.
fn start(side: &Side<'_>, name: &str, program: &str, folder: &str) -> Result<Value> {
    let mut config = with_programs(name, &[program]);
    config["working_dir"] = json!(folder);
    let id = side.create(&config)?;
    let started = side.crictl_within(AT_ONCE_S, &["start", &id])?;
    eprintln!(
        "{}: {name}: {} {}",
        side.handler,
        started.exit,
        started.stderr.trim()
    );
    // runc may answer the start before the container ends.
    let line = "crictl inspect $ID | grep -q CONTAINER_EXITED";
    let ended_at_all = wait_until(side.node, AT_ONCE_S, &line.replace("$ID", &id));
    eprintln!("  it ended: {}", ended_at_all.is_ok());
    let status = side.inspect(&id)?["status"].clone();
    let removed = side.crictl_within(AT_ONCE_S, &["rm", &id])?;
    if !removed.exit.success() {
        side.crictl_within(2 * AT_ONCE_S, &["rm", "-f", &id])?;
    }
    Ok(json!({
        "start": ended(&started.exit),
        "state": status["state"],
        "exit_code": status["exitCode"],
        "reason": status["reason"],
        "has_message": !status["message"].as_str().unwrap_or_default().is_empty(),
        "has_finished": status["finishedAt"].as_str().is_some_and(|at| at > "1970-01-02"),
        "remove": ended(&removed.exit),
    }))
}

fn ended(exit: &Exit) -> &'static str {
    match exit {
        Exit::Code(0) => "succeeds",
        Exit::TimedOut => "takes too long",
        _ => "fails",
    }
}

#[test]
fn a_container_that_cannot_start_fails_at_once_and_tells_its_end() {
    let Some(node) = node("starts") else {
        return;
    };
    make_programs(&node).unwrap();
    let found = under_both(&node, "starts", |side| {
        let mut found = Map::new();
        for (name, program, folder) in cases() {
            let case = start(side, name, program, folder);
            let case = case.with_context(|| format!("{}: {name}", side.handler))?;
            found.insert(name.to_owned(), case);
        }
        Ok(Value::Object(found))
    });
    node.shell(&format!("rm -r {PROGRAMS}")).unwrap();
    let found = found.unwrap();
    let told = |start, exit_code, reason, has_message| {
        json!({
            "start": start,
            "state": "CONTAINER_EXITED",
            "exit_code": exit_code,
            "reason": reason,
            "has_message": has_message,
            "has_finished": true,
            "remove": "succeeds",
        })
    };
    let early = told("fails", 128, "StartError", true);
    let late = told("succeeds", 255, "Error", false);
    assert_eq!(found[0]["missing"], early);
    assert_eq!(found[0]["missing-loader"], late);
    // runc answers the start before it calls execve(2), so that the error is the container's exit.
    // Pericarp may wait for the call and let the start fail instead.
    let found = found.map(|mut found| {
        for (name, _, _) in KERNEL_REFUSES {
            if found[name] == early {
                found[name] = late.clone();
            }
        }
        found
    });
    assert_same(&found);
}

/// Number of open descriptors of the shim.
fn descriptors(side: &Side<'_>) -> Result<String> {
    let line = format!("ls /proc/{}/fd | wc -l", side.state("shim_pid")?);
    Ok(side.node.shell(&line)?.trim().to_owned())
}

/// Runs execs that cannot start, and returns how each ended.
fn execs(side: &Side<'_>, id: &str) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    let in_any_folder = cases().filter(|case| case.2 == "/").cycle();
    for (number, (name, program, _)) in in_any_folder.take(EXECS).enumerate() {
        let argv = match number % 2 {
            0 => vec!["exec", id, program],
            _ => vec!["exec", "--sync", id, program],
        };
        let output = side.crictl_within(AT_ONCE_S, &argv)?;
        let how = ended(&output.exit);
        found.push(how);
        eprintln!(
            "{}: exec of {name}: {how} {}",
            side.handler,
            output.stderr.trim()
        );
        if how == "takes too long" {
            break;
        }
    }
    Ok(found)
}

#[test]
fn execs_that_cannot_start_fail_at_once_and_leave_nothing_in_the_shim() {
    let Some(node) = node("execs") else {
        return;
    };
    make_programs(&node).unwrap();
    let found = under_both(&node, "execs", |side| {
        let id = side.run(&with_programs("c", &WAIT))?;
        side.exec(&id, &["true"])?;
        let here = side.handler == PERICARP;
        let before = here.then(|| descriptors(side)).transpose()?;
        let found = execs(side, &id)?;
        if let Some(before) = before {
            let count = format!("ls /proc/{}/fd | wc -l", side.state("shim_pid")?);
            let condition = format!("[ $({count}) = {before} ]");
            let settled = wait_until(side.node, AT_ONCE_S, &condition);
            let after = descriptors(side)?;
            ensure!(
                settled.is_ok(),
                "the shim has {after} descriptors, and had {before}"
            );
        }
        side.exec(&id, &["true"])?;
        Ok(json!(found))
    });
    node.shell(&format!("rm -r {PROGRAMS}")).unwrap();
    let found = found.unwrap();
    assert_eq!(found[0], json!(vec!["fails"; EXECS]));
    assert_same(&found);
}
