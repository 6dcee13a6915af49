//! One side of a comparison: a pod of one handler, its containers, and the probe in them.

use anyhow::{Context, Result, ensure};
use pericarp_tests::node::containerd::Pod;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Command, Containerd, Node, Output, Session, Version};
use pericarp_tests::node::{pericarp, probe};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::pod_config;
use serde_json::{Value, json};

/// CRI's NamespaceMode CONTAINER: a container's first process is PID 1 of its own namespace.
const OF_THE_CONTAINER: u32 = 1;

/// OOM score that kubelet gives containers without requests and limits. A container that has none
/// inherits that of containerd's shim under runc, which is not the pod's.
const OOM_SCORE: i64 = 1000;

/// A program that keeps a container running and does not change its signals.
pub(crate) const WAIT: [&str; 2] = ["sleep", "3600"];

/// The node with the probe installed, unless something is not built.
pub(crate) fn node(test: &str) -> Option<Session> {
    let name = format!("differential-{test}");
    let builder = || Builder::default().name("differential").memory_mib(5120);
    let node = pericarp::session(&name, builder)?;
    probe::install(&node).expect("the probe is built");
    Some(node)
}

/// A pod of one handler.
pub(crate) struct Side<'a> {
    pub(crate) node: &'a Node,
    pub(crate) containerd: Containerd,
    pub(crate) handler: &'static str,
    pub(crate) pod: Pod,
}

impl<'a> Side<'a> {
    /// Runs a pod that is named after the test and the handler.
    pub(crate) fn new(node: &'a Node, handler: &'static str, test: &str) -> Result<Self> {
        Self::with(node, handler, test, &json!({}))
    }

    /// Runs such a pod with changes to its configuration.
    pub(crate) fn with(
        node: &'a Node,
        handler: &'static str,
        test: &str,
        change: &Value,
    ) -> Result<Self> {
        let containerd = node.containerd(Version::V23)?;
        let mut config = pod_config(&format!("{test}-{handler}"));
        config["hostname"] = json!(test);
        config["linux"] = in_own_namespace();
        merge(&mut config, change);
        let pod = containerd.run_pod(node, handler, &config);
        let pod = pod.with_context(|| format!("{handler}: the pod"))?;
        Ok(Self {
            node,
            containerd,
            handler,
            pod,
        })
    }

    /// Creates a container without starting it; returns its id.
    pub(crate) fn create(&self, config: &Value) -> Result<String> {
        let name = config["metadata"]["name"].as_str().context("a name")?;
        let path = format!("{}.{name}.json", self.pod.config);
        self.node.write(&path, &config.to_string())?;
        self.containerd.crictl_text(
            self.node,
            &["create", &self.pod.id, &path, &self.pod.config],
        )
    }

    /// Creates and starts a container; returns its id.
    pub(crate) fn run(&self, config: &Value) -> Result<String> {
        let id = self.containerd.run_container(self.node, &self.pod, config);
        id.with_context(|| format!("{}: container {}", self.handler, config["metadata"]["name"]))
    }

    /// Runs a program in a container; it must succeed.
    pub(crate) fn exec(&self, container: &str, argv: &[&str]) -> Result<String> {
        let mut words = vec!["exec", container];
        words.extend_from_slice(argv);
        let text = self.containerd.crictl_text(self.node, &words);
        text.with_context(|| format!("{}: exec of {argv:?}", self.handler))
    }

    /// Findings of the probe in a container.
    pub(crate) fn probe(&self, container: &str, words: &[&str]) -> Result<Value> {
        let mut argv = vec![probe::IN_CONTAINER];
        argv.extend_from_slice(words);
        let text = self.exec(container, &argv)?;
        serde_json::from_str(&text).with_context(|| format!("the probe printed {text:?}"))
    }

    /// Runs `crictl` with a deadline. A failure is not an error.
    pub(crate) fn crictl_within(&self, seconds: u64, arguments: &[&str]) -> Result<Output> {
        let command = self.containerd.crictl().args(arguments.iter().copied());
        self.node.run(&command.timeout_s(seconds))
    }

    /// Output of `crictl inspect` for a container.
    pub(crate) fn inspect(&self, container: &str) -> Result<Value> {
        let text = self
            .containerd
            .crictl_text(self.node, &["inspect", container])?;
        serde_json::from_str(&text).context("crictl inspect printed no JSON")
    }

    /// A number in the state file of a Pericarp pod.
    pub(crate) fn state(&self, field: &str) -> Result<u64> {
        let text = self
            .node
            .read(&format!("/run/pericarp/{}/state.json", self.pod.id))?;
        let state: Value = serde_json::from_str(&text).context("state.json is no JSON")?;
        state[field]
            .as_u64()
            .with_context(|| format!("no {field} in {state}"))
    }

    /// Removes the pod.
    pub(crate) fn remove(self) -> Result<()> {
        self.containerd.remove_pod(self.node, &self.pod)
    }
}

/// Configuration of a container that runs a program, with the probe mounted.
pub(crate) fn container(name: &str, argv: &[&str]) -> Value {
    let mut linux = in_own_namespace();
    linux["resources"] = json!({"oom_score_adj": OOM_SCORE});
    json!({
        "metadata": {"name": name},
        "image": {"image": BUSYBOX},
        "command": argv,
        "log_path": format!("{name}.log"),
        "mounts": [probe::mount()],
        "linux": linux,
    })
}

fn in_own_namespace() -> Value {
    json!({"security_context": {"namespace_options": {"pid": OF_THE_CONTAINER}}})
}

/// Changes a configuration: objects are merged, other values are replaced.
pub(crate) fn merge(config: &mut Value, change: &Value) {
    match (config, change) {
        (Value::Object(config), Value::Object(change)) => {
            for (key, value) in change {
                merge(config.entry(key).or_insert(Value::Null), value);
            }
        }
        (config, change) => *config = change.clone(),
    }
}

/// Runs a pod under runc and one under Pericarp, and returns what `work` finds in each. Fails when
/// a pod leaves something behind.
pub(crate) fn under_both(
    node: &Session,
    test: &str,
    work: impl Fn(&Side<'_>) -> Result<Value>,
) -> Result<[Value; 2]> {
    let mut found = Vec::new();
    node.containerd(Version::V23)?;
    for handler in [super::RUNC, super::PERICARP] {
        let before = Leftovers::look(node)?;
        let side = Side::new(node, handler, test)?;
        let worked = work(&side);
        let removed = side.remove();
        found.push(worked?);
        removed?;
        Leftovers::nothing_since(node, &before)?;
    }
    found.try_into().ok().context("two handlers")
}

/// Fails when two findings differ, and lists each difference.
#[track_caller]
pub(crate) fn assert_same(found: &[Value; 2]) {
    let mut differences = Vec::new();
    compare("", &found[0], &found[1], &mut differences);
    assert!(
        differences.is_empty(),
        "{} differences from runc:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

fn compare(place: &str, runc: &Value, here: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(runc), Value::Object(here)) = (runc, here) {
        let mut names: Vec<&String> = runc.keys().chain(here.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let of = |side: &serde_json::Map<String, Value>| side.get(name).cloned();
            let (runc, here) = (of(runc).unwrap_or_default(), of(here).unwrap_or_default());
            compare(&format!("{place}/{name}"), &runc, &here, differences);
        }
    } else if runc != here {
        differences.push(format!("  {place}: runc {runc}, here {here}"));
    }
}

/// Waits in the node until a line of shell succeeds.
pub(crate) fn wait_until(node: &Node, seconds: u64, condition: &str) -> Result<()> {
    let line = format!("until {condition}; do sleep 0.1; done");
    let output = node.run(&Command::shell(line).timeout_s(seconds))?;
    ensure!(
        output.exit.success(),
        "not within {seconds} s: {condition}: {}",
        output.stderr
    );
    Ok(())
}
