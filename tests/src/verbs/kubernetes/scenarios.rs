//! What happens around pods: restarts of the node's daemons, ends while nobody looks, many pods at
//! once. Each scenario is a function of the node under one RuntimeClass.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::node::kubernetes::{FOLDER as KUBERNETES_FOLDER, NODE_NAME};
use crate::node::{Builder, Command, Containerd, Kubernetes, Node, Version, paths};
use crate::pods::leftovers::Leftovers;
use crate::pods::slow_disk;

/// A scenario.
#[derive(Debug)]
pub(super) struct Scenario {
    /// By what it is picked.
    pub(super) name: &'static str,
    /// What the table calls it.
    pub(super) item: &'static str,
    /// runc shows it too.
    pub(super) controlled: bool,
    /// Does it and checks it.
    pub(super) run: Place,
}

/// Where a scenario happens.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// In the node of all cases.
    Shared(fn(&Setting<'_>) -> Result<()>),
    /// In nodes of its own, with pods of this RuntimeClass.
    Own(fn(&str) -> Result<()>),
}

/// Where it happens.
pub(super) struct Setting<'a> {
    /// The node.
    pub(super) node: &'a Node,
    /// Its Kubernetes.
    pub(super) kubernetes: &'a Kubernetes,
    /// Its containerd.
    pub(super) containerd: &'a Containerd,
    /// The RuntimeClass of the pods.
    pub(super) class: &'a str,
}

/// All of them.
pub(super) const SCENARIOS: [Scenario; 9] = [
    Scenario {
        name: "kubelet-restart",
        item: "kubelet is killed and started again: the pod lives on, logs and exec work",
        controlled: true,
        run: Place::Shared(kubelet_restart),
    },
    Scenario {
        name: "containerd-restart",
        item: "containerd is killed and started again: the pod lives on, logs and exec work",
        controlled: true,
        run: Place::Shared(containerd_restart),
    },
    Scenario {
        name: "shim-restart",
        item: "the shim is killed: kubelet starts the pod again",
        controlled: true,
        run: Place::Shared(shim_restart),
    },
    Scenario {
        name: "death-unseen",
        item: "a pod ends while kubelet is down: its state is right when kubelet returns",
        controlled: true,
        run: Place::Shared(death_unseen),
    },
    Scenario {
        name: "stats-from-cri",
        item: "/stats/summary of a kubelet that asks the runtime (PodAndContainerStatsFromCRI): \
               processes, CPU, memory, network",
        controlled: true,
        run: Place::Shared(stats_from_cri),
    },
    Scenario {
        name: "block-io",
        item: "limits of block I/O: 1 MiB a second from and to a disk of the node",
        controlled: true,
        run: Place::Shared(block_io),
    },
    Scenario {
        name: "thirty-pods",
        item: "30 pods of mixed quality of service from one apply are Ready, and leave nothing \
               (3 rounds)",
        controlled: false,
        run: Place::Own(thirty_pods),
    },
    Scenario {
        name: "cpu-manager",
        item: "CPU, Memory and Topology Manager pin a Guaranteed pod to a CPU and a memory node",
        controlled: true,
        run: Place::Own(cpu_manager),
    },
    Scenario {
        name: "power-loss",
        item: "the node loses power: its pods start again, nothing is left of before",
        controlled: true,
        run: Place::Own(power_loss),
    },
];

/// Pods at once, and how often.
const PODS: usize = 30;
const ROUNDS: usize = 3;

/// Time that a line gets.
const LINE_TIMEOUT_S: u64 = 540;

/// Time that many pods get to be Ready or gone.
const MANY_TIMEOUT_S: u64 = 1500;

/// Memory of a node for many pods.
const MANY_NODE_MIB: u32 = 7168;

/// Where that many pods start at once on two emulated processors, each takes longer than those who
/// wait for it allow: two minutes of kubelet, one of the shim. They would begin again and again.
const PATIENT: &str = "runtimeRequestTimeout: 20m\n";
const PATIENT_SHIM: &str = "[timeouts]\nagent_ready_ms = 1200000\nrpc_ms = 1200000\n";

/// A pod of one container that tells each turn of its loop.
fn manifest(name: &str, class: &str, restart: &str, line: &str, resources: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{scenario: pods}}}}
spec:
  nodeName: node1
  runtimeClassName: {class}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 2
  restartPolicy: {restart}
  containers:
  - name: c
    image: docker.io/library/busybox:test
    imagePullPolicy: IfNotPresent
    command: [sh, -c, \"{line}\"]
    resources: {resources}
"
    )
}

const TELLING: &str =
    "trap 'exit 3' TERM; n=0; while :; do n=$((n+1)); echo turn $n; sleep 0.5; done";

impl Setting<'_> {
    fn shell(&self, line: &str) -> Result<String> {
        self.shell_within(line, LINE_TIMEOUT_S)
    }

    fn shell_within(&self, line: &str, timeout_s: u64) -> Result<String> {
        let mut command = Command::shell(line).timeout_s(timeout_s);
        command.env = self.kubernetes.kubectl().env;
        Ok(self.node.text(&command)?.trim().to_owned())
    }

    /// Starts kubelet anew with `lines` more in its configuration.
    fn configure_kubelet(&self, lines: &str) -> Result<()> {
        self.kubernetes.stop_kubelet(self.node)?;
        // What other managers remember does not fit.
        self.shell(&format!(
            "rm -f /var/lib/kubelet/*_manager_state
             cat >>{KUBERNETES_FOLDER}/kubelet.yaml <<'.'\n{lines}.\n"
        ))?;
        self.kubernetes.start_kubelet(self.node)
    }

    fn pod(&self, name: &str, restart: &str) -> Result<String> {
        self.pod_with(name, (restart, TELLING, "{}"))
    }

    fn pod_with(&self, name: &str, spec: (&str, &str, &str)) -> Result<String> {
        let name = format!("{name}-{}", self.class);
        let (restart, line, resources) = spec;
        let text = manifest(&name, self.class, restart, line, resources);
        self.kubernetes.apply(self.node, &text)?;
        self.ready(&name)?;
        Ok(name)
    }

    fn ready(&self, name: &str) -> Result<()> {
        let object = format!("pod/{name}");
        self.kubernetes.wait(self.node, &object, "condition=Ready")
    }

    fn field(&self, name: &str, path: &str) -> Result<String> {
        let path = format!("jsonpath={{{path}}}");
        self.kubernetes
            .text(self.node, &["get", "pod", name, "-o", &path])
    }

    fn container(&self, name: &str) -> Result<String> {
        self.field(name, ".status.containerStatuses[0].containerID")
    }

    /// The pod's log grows and its container takes a command.
    fn works(&self, name: &str) -> Result<()> {
        let line = format!(
            "kubectl exec {name} -- true
             seen=$(kubectl logs {name} | tail -n 1)
             timeout 60 sh -c 'until [ \"$(kubectl logs {name} | tail -n 1)\" != \"$0\" ]; \
             do sleep 1; done' \"$seen\""
        );
        self.shell(&format!("set -e; {line}")).map(drop)
    }

    /// Waits until kubelet has removed every sandbox that crictl selects.
    fn no_sandbox(&self, select: &str) -> Result<()> {
        self.shell(&format!(
            "timeout 300 sh -c 'while [ -n \"$(crictl pods -q {select})\" ]; do sleep 1; done'"
        ))
        .map(drop)
        .context("kubelet has not removed every sandbox")
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.shell(&format!(
            "kubectl delete pod {name} --wait=true --timeout=120s"
        ))
        .map(drop)
    }
}

fn lives_on(at: &Setting<'_>, name: &str, restart: impl FnOnce() -> Result<()>) -> Result<()> {
    let pod = at.pod(name, "Always")?;
    let container = at.container(&pod)?;
    restart()?;
    at.works(&pod).context("after the restart")?;
    at.ready(&pod)?;
    let now = at.container(&pod)?;
    ensure!(now == container, "{now} runs instead of {container}");
    at.delete(&pod)
}

fn kubelet_restart(at: &Setting<'_>) -> Result<()> {
    lives_on(at, "kubelet-restart", || {
        at.kubernetes.stop_kubelet(at.node)?;
        at.kubernetes.start_kubelet(at.node)
    })
}

fn containerd_restart(at: &Setting<'_>) -> Result<()> {
    lives_on(at, "containerd-restart", || at.containerd.restart(at.node))
}

fn shim_restart(at: &Setting<'_>) -> Result<()> {
    let pod = at.pod("shim-restart", "Always")?;
    let container = at.container(&pod)?;
    let sandbox = at.shell(&format!("crictl pods -q --no-trunc --name {pod}"))?;
    at.shell(&format!(
        "kill -9 $(pgrep -f 'containerd-shim-[a-z]*-v2 .*{sandbox}')"
    ))?;
    at.shell(&format!(
        "timeout 240 sh -c 'while [ \"$(kubectl get pod {pod} \
         -o jsonpath={{.status.containerStatuses[0].containerID}})\" = {container} ]; \
         do sleep 1; done'"
    ))?;
    at.ready(&pod)?;
    at.works(&pod)?;
    at.delete(&pod)
}

fn death_unseen(at: &Setting<'_>) -> Result<()> {
    let pod = at.pod("death-unseen", "Never")?;
    at.kubernetes.stop_kubelet(at.node)?;
    let stopped = at.shell(&format!(
        "crictl stop --timeout 30 $(crictl ps -q --label io.kubernetes.pod.name={pod})"
    ));
    at.kubernetes.start_kubelet(at.node)?;
    stopped?;
    let phase = "jsonpath={.status.phase}=Failed";
    at.kubernetes.wait(at.node, &format!("pod/{pod}"), phase)?;
    let code = at.field(
        &pod,
        ".status.containerStatuses[0].state.terminated.exitCode",
    )?;
    ensure!(code == "3", "the exit code is {code}");
    at.delete(&pod)
}

/// What has kubelet count by the runtime's answers in place of the host's cgroups.
const FROM_CRI: &str = "featureGates: {PodAndContainerStatsFromCRI: true}";

fn stats_from_cri(at: &Setting<'_>) -> Result<()> {
    with_setting(at, FROM_CRI, || {
        let line = "sleep 3600 & exec sleep 3600";
        let pod = at.pod_with("stats-from-cri", ("Always", line, "{}"))?;
        let wanted = format!(
            ".pods[] | select(.podRef.name == \"{pod}\") |
             .process_stats.process_count == 2 and .cpu.usageCoreNanoSeconds > 0 and
             .memory.workingSetBytes > 0 and .containers[0].memory.workingSetBytes > 0 and
             ([.network.interfaces[].rxBytes] | max) > 0"
        );
        at.shell(&format!(
            "of() {{ kubectl get --raw /api/v1/nodes/{NODE_NAME}/proxy/stats/summary; }}
             export -f of
             right() {{ until of | jq -e \"$0\" >/dev/null; do sleep 1; done; }}; export -f right
             timeout 120 bash -c right '{wanted}' ||
                 {{ of | jq -c '.pods[] | select(.podRef.name == \"{pod}\")' >&2; exit 1; }}"
        ))?;
        at.delete(&pod)
    })
}

/// By a class of containerd's, which reads them when it starts.
fn block_io(at: &Setting<'_>) -> Result<()> {
    slow_disk::make(at.node)?;
    let config = at.containerd.config_file();
    at.shell(&format!(
        "cp {config} {config}.before
         cat >>{config} <<'.'\n[plugins.'io.containerd.service.v1.tasks-service']
         blockio_config_file = '{}'\n.\n",
        slow_disk::CLASSES
    ))?;
    let worked = at.containerd.restart(at.node).and_then(|()| {
        let name = format!("block-io-{}", at.class);
        let text = manifest(&name, at.class, "Always", "exec sleep 3600", "{}");
        let class = slow_disk::CLASS;
        let labels = "{scenario: pods}";
        let text = text.replace(
            labels,
            &format!(
                "{labels}, annotations: {{blockio.resources.beta.kubernetes.io/pod: {class}}}"
            ),
        );
        let folder = slow_disk::FOLDER;
        let volume = format!(
            "    volumeMounts: [{{name: slow, mountPath: {folder}}}]
  volumes: [{{name: slow, hostPath: {{path: {folder}}}}}]\n"
        );
        at.kubernetes.apply(at.node, &(text + &volume))?;
        at.ready(&name)?;
        slow_disk::holds(at.node, |line| {
            at.shell(&format!("kubectl exec {name} -- sh -c '{line}'"))
        })?;
        at.delete(&name)?;
        at.no_sandbox(&format!("--name {name}"))
    });
    at.shell(&format!("mv {config}.before {config}"))?;
    at.containerd.restart(at.node)?;
    slow_disk::remove(at.node)?;
    worked
}

/// Does `work` while kubelet has one more line of configuration, and restarts it before and after.
fn with_setting(at: &Setting<'_>, line: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let file = format!("{KUBERNETES_FOLDER}/kubelet.yaml");
    at.kubernetes.stop_kubelet(at.node)?;
    at.shell(&format!("cp {file} {file}.before; echo '{line}' >>{file}"))?;
    let worked = at.kubernetes.start_kubelet(at.node).and_then(|()| work());
    at.kubernetes.stop_kubelet(at.node)?;
    at.shell(&format!("mv {file}.before {file}"))?;
    at.kubernetes.start_kubelet(at.node)?;
    worked
}

/// In a node of its own, with time for all.
fn thirty_pods(class: &str) -> Result<()> {
    let builder = Builder::default().memory_mib(MANY_NODE_MIB);
    let node = builder.name("thirty-pods").boot()?;
    on(&node, class, |at| {
        at.configure_kubelet(PATIENT)?;
        node.write("/etc/pericarp/config.d/60-patient.toml", PATIENT_SHIM)?;
        many_come_and_go(at)
    })?;
    node.power_off()
}

fn many_come_and_go(at: &Setting<'_>) -> Result<()> {
    let kinds = [
        "{}",
        "{requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}",
        "{limits: {cpu: 20m, memory: 32Mi}}",
    ];
    let before = Leftovers::look(at.node)?;
    for round in 1..=ROUNDS {
        let pods = (0..PODS).map(|number| {
            let name = format!("many-{}-{number}", at.class);
            manifest(
                &name,
                at.class,
                "Always",
                "exec sleep 3600",
                kinds[number % kinds.len()],
            )
        });
        let text: Vec<String> = pods.collect();
        at.kubernetes.apply(at.node, &text.join("---\n"))?;
        let line = format!(
            "kubectl wait pod -l scenario=pods --for=condition=Ready --timeout={MANY_TIMEOUT_S}s"
        );
        at.shell_within(&line, MANY_TIMEOUT_S + 60)
            .with_context(|| format!("round {round}: not all are Ready"))?;
        let line =
            format!("kubectl delete pod -l scenario=pods --wait=true --timeout={MANY_TIMEOUT_S}s");
        at.shell_within(&line, MANY_TIMEOUT_S + 60)?;
        at.no_sandbox("--label scenario=pods")?;
        Leftovers::nothing_since(at.node, &before).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// What kubelet needs to give CPUs and memory of one NUMA node to a pod alone. Memory that is
/// reserved must be all that kubelet does not offer: the system's and the threshold of eviction.
const MANAGERS: &str = "cpuManagerPolicy: static
reservedSystemCPUs: '0'
memoryManagerPolicy: Static
systemReserved: {memory: 190Mi}
reservedMemory: [{numaNode: 0, limits: {memory: 200Mi}}]
topologyManagerPolicy: single-numa-node
";

/// One CPU is kubelet's, one the pod's own, and a part of the last its overhead.
const MANAGED_CPUS: u32 = 3;

/// In a node of its own, whose CPUs and memory are of two NUMA nodes.
fn cpu_manager(class: &str) -> Result<()> {
    let builder = Builder::default().memory_mib(OWN_NODE_MIB);
    let builder = builder.cpus(MANAGED_CPUS).numa_nodes(2);
    let node = builder.name("cpu-manager").boot()?;
    on(&node, class, |at| {
        at.configure_kubelet(MANAGERS)?;
        pinned(at)
    })?;
    node.power_off()
}

/// Every thread of the pod may run on one CPU of the second NUMA node, the first has kubelet's own,
/// and has memory of that alone: containers under runc, VMM and file-system daemon under Pericarp.
fn pinned(at: &Setting<'_>) -> Result<()> {
    let line = "dd if=/dev/zero of=/dev/shm/f bs=1M count=32; echo up; exec sleep 3600";
    let resources = "{limits: {cpu: '1', memory: 128Mi}}";
    let pod = at.pod_with("cpu-manager", ("Always", line, resources))?;
    at.shell(&format!(
        "set -e; kubectl exec {pod} -- sh -c 'until [ $(nproc) = 1 ]; do sleep 1; done'
         pod=$(find /sys/fs/cgroup/kubepods -name pod$(kubectl get pod {pod} \
             -o jsonpath={{.metadata.uid}}))
         all=$(find $pod -name cgroup.procs -exec cat {{}} +)
         for p in $all; do
             # The sandbox's own process is no container.
             [ \"$(tr '\\0' ' ' </proc/$p/cmdline)\" != 'sleep inf ' ] || continue
             seen=yes
             grep -H -E '^(Cpus|Mems)_allowed_list:' /proc/$p/task/*/status |
                 grep -v -P 'Cpus.*\t[12]$|Mems.*\t1$' >&2 && exit 1
             grep -E 'memfd|/dev/shm' /proc/$p/numa_maps | grep 'N0=' >&2 && exit 1
         done
         [ $seen = yes ]"
    ))
    .context("a thread may run, or has memory, elsewhere")?;
    at.delete(&pod)
}

/// Room for the images and what pods write.
const DISK_BYTES: u64 = 6 << 30;

/// Memory of a node for one pod.
const OWN_NODE_MIB: u32 = 4096;

fn power_loss(class: &str) -> Result<()> {
    let folder = paths::results();
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    let disk = folder.join(format!("power-loss-{class}.img"));
    let result = twice_booted(class, &disk);
    // Sparse, and of no use to who reads the logs.
    std::fs::remove_file(&disk).with_context(|| format!("cannot remove {}", disk.display()))?;
    result
}

fn twice_booted(class: &str, disk: &Path) -> Result<()> {
    let file = std::fs::File::create(disk);
    let file = file.with_context(|| format!("cannot make {}", disk.display()))?;
    file.set_len(DISK_BYTES).context("cannot size the disk")?;
    let mut mkfs = std::process::Command::new("mkfs.ext4");
    let made = mkfs.arg("-q").arg(disk).status();
    let made = made.context("cannot run mkfs.ext4")?;
    ensure!(made.success(), "mkfs.ext4 failed: {made}");
    let boot = || {
        let builder = Builder::default().memory_mib(OWN_NODE_MIB);
        builder.name("power-loss").state_disk(disk).boot()
    };
    let node = boot()?;
    let (before, state, container) = on(&node, class, |at| {
        // Images that were imported reach the disk when the kernel likes, not with the import.
        at.shell("sync")?;
        let (before, state) = (Leftovers::look(&node)?, at.shell(KEPT)?);
        let pod = at.pod("power-loss", "Always")?;
        Ok((before, state, at.container(&pod)?))
    })?;
    node.cut_power();
    let node = boot()?;
    on(&node, class, |at| {
        let pod = format!("power-loss-{class}");
        at.shell(&format!(
            "timeout 240 sh -c 'until c=$(kubectl get pod {pod} \
             -o jsonpath={{.status.containerStatuses[0].containerID}}) && \
             [ \"${{c:-{container}}}\" != {container} ]; do sleep 1; done'"
        ))
        .context("no new container")?;
        at.ready(&pod)?;
        at.works(&pod)?;
        at.delete(&pod)?;
        at.no_sandbox(&format!("--name {pod}"))?;
        Leftovers::nothing_since(&node, &before)?;
        at.shell(&format!(
            "before=$(cat <<'.'\n{state}\n.\n)
             kept() {{ {KEPT}\n}}; export before; export -f kept
             timeout 120 bash -c 'until [ \"$(kept)\" = \"$before\" ]; do sleep 1; done' ||
                 {{ diff <(echo \"$before\") <(kept) >&2; exit 1; }}"
        ))
        .context("left on the disk")?;
        Ok(())
    })?;
    node.power_off()
}

/// What pods have on the node's disk: containers, writable snapshots, volumes, addresses.
///
/// An image's snapshots, made at its first use, are committed ones. An address is kept for the
/// container that its file names; CNI's host-local does not sync it, so that power may leave an
/// empty one, which no later pod could give back.
const KEPT: &str = r#"crictl ps -aq; crictl pods -q; ctr -n k8s.io containers ls -q
    ctr -n k8s.io snapshots ls | awk '$NF == "Active"' | sort; ls /var/lib/kubelet/pods
    grep -l . $(find /var/lib/cni/networks/node -name '*[.:]*' ! -name 'last_*') /dev/null ||
        true"#;

/// With Kubernetes in a node of its own.
fn on<T>(node: &Node, class: &str, work: impl FnOnce(&Setting<'_>) -> Result<T>) -> Result<T> {
    let (kubernetes, containerd) = (node.kubernetes()?, node.containerd(Version::V23)?);
    work(&Setting {
        node,
        kubernetes: &kubernetes,
        containerd: &containerd,
        class,
    })
}
