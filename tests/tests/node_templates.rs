//! Pods that go on from a template: what must differ between them, what is refused, and what is
//! left when something fails meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Command, Containerd, Node, Session, Version, pericarp, probe};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::pod_config;
use serde_json::{Value, json};

/// The handler of containerd.
const HANDLER: &str = "pericarp";

/// Folder of pods' configurations in the node.
const FOLDER: &str = "/run/templates";

/// How long a script in the node may take.
const SCRIPT_S: u64 = 600;

/// How far a pod's clock may be from the node's when its first program begins, in seconds; the
/// figure has whole ones.
const CLOCK_S: i64 = 2;

/// A node with containerd, and the functions of [`configure`] for `count` pods.
fn open(test: &str, count: u32) -> Option<(Session, Containerd, String)> {
    let builder = || Builder::default().name("templates").memory_mib(6144);
    let node = pericarp::session(&format!("templates-{test}"), builder)?;
    probe::install(&node).expect("the probe is built");
    let containerd = node.containerd(Version::V23).expect("containerd");
    let functions = configure(&node, count).expect("configurations of pods");
    Some((node, containerd, functions))
}

/// Writes the configuration of pods, whose only container tells by the probe what it is like, and
/// of the functions that run and remove them.
fn configure(node: &Node, count: u32) -> Result<String> {
    for number in 0..count {
        let mut config = pod_config(&format!("fork-{number}"));
        config["hostname"] = json!(format!("fork-{number}"));
        node.write(&format!("{FOLDER}/{number}.json"), &config.to_string())?;
    }
    let container = json!({
        "metadata": {"name": "c"},
        "image": {"image": BUSYBOX},
        "command": [probe::IN_CONTAINER, "unique"],
        "mounts": [probe::mount()],
        "log_path": "c.log",
        "linux": {},
    });
    node.write(&format!("{FOLDER}/c.json"), &container.to_string())?;
    Ok(format!(
        "F={FOLDER}
         pod() {{
             crictl runp --runtime {HANDLER} $F/$1.json >$F/$1.id || return 1
             c=$(crictl create \"$(cat $F/$1.id)\" $F/c.json $F/$1.json) && crictl start $c >&2
             until crictl inspect $c | grep -q CONTAINER_EXITED; do :; done
             crictl logs --tail 1 $c >$F/$1.found
             cp /run/pericarp/$(cat $F/$1.id)/state.json $F/$1.state
             date +%s >$F/$1.now
         }}
         remove() {{ crictl rmp -f \"$(cat $F/$1.id)\" >&2; }}
        "
    ))
}

/// What a pod said, the time on the node afterwards, and its state.
fn found(node: &Node, number: u32) -> Result<(Value, i64, Value)> {
    let read = |what: &str| node.read(&format!("{FOLDER}/{number}.{what}"));
    let said = serde_json::from_str(&read("found")?)
        .with_context(|| format!("pod {number} said {:?}", read("found")))?;
    let state = serde_json::from_str(&read("state")?)?;
    Ok((said, read("now")?.trim().parse()?, state))
}

/// Name of the template that a pod went on from.
fn template(state: &Value) -> Option<&str> {
    state["template"].as_str()
}

/// How many lines of containerd's log, where shims write, hold `words`.
fn logged(node: &Node, words: &str) -> Result<usize> {
    let log = node.results().join("containerd.log");
    let text = std::fs::read_to_string(&log).with_context(|| log.display().to_string())?;
    Ok(text.lines().filter(|line| line.contains(words)).count())
}

#[test]
fn pods_of_one_template_share_nothing_that_must_differ() {
    let (count, at_once) = if pericarp::full_sizes() {
        (64, 8)
    } else {
        (6, 3)
    };
    let Some((node, containerd, functions)) = open("differ", count) else {
        return;
    };
    let built = node.shell("pericarp template build").unwrap();
    let text = format!(
        "{functions}
         for first in $(seq 0 {at_once} {last}); do
             pids=(); for n in $(seq $first $((first + {at_once} - 1))); do
                 [ $n -le {last} ] && {{ pod $n & pids+=($!); }}
             done
             for pid in ${{pids[@]}}; do wait $pid; done
         done
         for n in $(seq 0 {last}); do remove $n; done",
        last = count - 1
    );
    containerd.script(&node, SCRIPT_S * 2, &text).unwrap();
    let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for number in 0..count {
        let (said, now, state) = found(&node, number).unwrap();
        assert_eq!(
            template(&state),
            Some(built.trim()),
            "pod {number}: {state}"
        );
        let clock = said["clock_s"].as_i64().unwrap();
        assert!(clock <= now, "pod {number}: {clock} is after {now}");
        assert!(
            now - clock < 60,
            "pod {number}: {clock} is long before {now}"
        );
        for (name, value) in said["differs"].as_object().unwrap() {
            let text = value.as_str().unwrap();
            assert!(!text.is_empty(), "pod {number} has no {name}");
            let new = values
                .entry(name.clone())
                .or_default()
                .insert(text.to_owned());
            assert!(new, "pod {number} has the {name} of another: {text}");
        }
    }
    assert_eq!(values.len(), 7);
}

#[test]
fn the_clock_of_a_pod_is_the_nodes_however_old_its_template() {
    let Some((node, containerd, functions)) = open("clock", 1) else {
        return;
    };
    node.shell("pericarp template build").unwrap();
    // As if the template had lain for a day.
    let text =
        format!("{functions} date -s @$(($(date +%s) + 86400)) >&2; date +%s; pod 0; remove 0");
    let before: i64 = containerd
        .script(&node, SCRIPT_S, &text)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let (said, now, state) = found(&node, 0).unwrap();
    assert!(template(&state).is_some());
    let clock = said["clock_s"].as_i64().unwrap();
    assert!(
        (before - CLOCK_S..=now + CLOCK_S).contains(&clock),
        "{before} {clock} {now}"
    );
}

/// Runs pod 0 and gives the template that it went on from.
fn run_one(node: &Node, containerd: &Containerd, functions: &str) -> Result<Option<String>> {
    let text = format!("{functions} pod 0; remove 0");
    containerd.script(node, SCRIPT_S, &text)?;
    let (said, _, state) = found(node, 0)?;
    ensure!(said["differs"]["hostname"] == "fork-0", "{said}");
    Ok(template(&state).map(ToOwned::to_owned))
}

#[test]
fn a_damaged_template_is_removed_and_the_pod_boots() {
    let Some((node, containerd, functions)) = open("damage", 1) else {
        return;
    };
    let before = Leftovers::look(&node).unwrap();
    for damage in [
        "truncate -s -4096 memory",
        "printf x >>state",
        "rm memory",
        "cp -p state s; printf x | dd of=state bs=1 seek=100 conv=notrunc; touch -r s state; rm s",
    ] {
        let built = node.shell("pericarp template build").unwrap();
        let place = format!("/run/pericarp/.templates/{}", built.trim());
        node.shell(&format!("cd {place} && {{ {damage}; }}"))
            .unwrap();
        let used = run_one(&node, &containerd, &functions).unwrap();
        assert_eq!(used, None, "{damage}");
        // The pod's shim has had a new one made.
        Leftovers::nothing_since(&node, &before).unwrap();
        let used = run_one(&node, &containerd, &functions).unwrap();
        assert_eq!(used.as_deref(), Some(built.trim()), "after {damage}");
        node.shell("pericarp template rm --all").unwrap();
    }
    let lines = logged(&node, "the template of its shape was damaged").unwrap();
    assert_eq!(lines, 4, "each pod says why it booted, once");
}

#[test]
fn without_a_place_for_it_no_template_is_left_and_pods_boot() {
    let Some((node, containerd, functions)) = open("full", 1) else {
        return;
    };
    let before = Leftovers::look(&node).unwrap();
    // Too little for the memory of a guest.
    node.shell(
        "mkdir -p -m 0700 /run/pericarp/.templates
         mount -t tmpfs -o size=8m tmpfs /run/pericarp/.templates",
    )
    .unwrap();
    let output = node
        .run(&Command::shell("pericarp template build"))
        .unwrap();
    assert!(!output.exit.success(), "{}", output.stdout);
    assert_eq!(run_one(&node, &containerd, &functions).unwrap(), None);
    let files = "pgrep -f '[ ]template$' >/dev/null && sleep 10; ls -A /run/pericarp/.templates";
    let left = node.shell(files).unwrap();
    assert!(left.split_whitespace().all(|name| name == "log"), "{left}");
    node.shell("umount /run/pericarp/.templates").unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
}

#[test]
fn who_makes_a_template_may_be_killed_at_any_moment() {
    let Some((node, containerd, functions)) = open("killed", 1) else {
        return;
    };
    let before = Leftovers::look(&node).unwrap();
    for after in ["0.1", "0.7", "1.5", "2.5"] {
        // The moment is the fault: time itself is meant, nothing is waited for.
        node.shell(&format!(
            "pericarp template build >&2 & read -r -t {after} <> <(:) || true
             pkill -KILL -f '[ ]template$' || true; wait"
        ))
        .unwrap();
        let listed = node.shell("pericarp template list --json").unwrap();
        let whole = serde_json::from_str::<Value>(&listed).unwrap();
        assert!(whole.as_array().unwrap().len() <= 1, "{listed}");
    }
    run_one(&node, &containerd, &functions).unwrap();
    node.shell("pericarp template build").unwrap();
    node.shell("pericarp template rm --all").unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
}

#[test]
fn templates_can_be_turned_off() {
    let Some((node, containerd, functions)) = open("off", 1) else {
        return;
    };
    node.shell("pericarp template build").unwrap();
    let drop_in = "/etc/pericarp/config.d/99-template.toml";
    node.write(drop_in, "[vm]\ntemplate = \"off\"\n").unwrap();
    let used = run_one(&node, &containerd, &functions);
    node.shell(&format!("rm {drop_in}")).unwrap();
    assert_eq!(used.unwrap(), None);
    let used = run_one(&node, &containerd, &functions).unwrap();
    assert!(used.is_some());
}
