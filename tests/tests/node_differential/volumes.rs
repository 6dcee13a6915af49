//! Volumes that two containers of a pod share. `tests/src/bin/probe/volumes.rs` has the checks.

use anyhow::{Context, Result};
use pericarp_tests::node::Node;
use serde_json::{Value, json};

use crate::side::{Side, assert_same, container, node, under_both};
use crate::{PERICARP, RUNC};

/// Ports on the pod's loopback.
const WRITER: &str = "7001";
const READER: &str = "7002";

/// The handlers that are compared.
const HANDLERS: [&str; 2] = [RUNC, PERICARP];

/// kubelet's folder for pods.
const KUBELET: &str = "/var/lib/kubelet/pods";

/// Size of the ext4 file system.
const DISK_MIB: u32 = 32;

/// The folders of a pod's volumes in the node.
struct Volumes {
    /// Pod folder on an ext4 file system.
    disk: String,
    /// Pod folder on a tmpfs.
    memory: String,
}

impl Volumes {
    /// Creates both file systems, and volumes on them as kubelet does.
    fn make(node: &Node, uid: &str) -> Result<Self> {
        let disk = format!("{KUBELET}/{uid}");
        let memory = format!("{KUBELET}/{uid}-in-memory");
        node.shell(&format!(
            "mkdir -p {disk} {memory} && truncate -s {DISK_MIB}M {disk}.img && \
             mkfs.ext4 -q {disk}.img && mount -o loop {disk}.img {disk} && \
             mount -t tmpfs tmpfs {memory}"
        ))?;
        let volumes = Self { disk, memory };
        let parts = volumes.on_disk("parts");
        let (folder, file) = (volumes.sub_path(0), volumes.sub_path(1));
        let whole = ["shared", "seen", "parts"]
            .map(|name| volumes.on_disk(name))
            .join(" ");
        node.shell(&format!(
            "mkdir -p {whole} {parts}/folder {folder} {memory} && \
             printf start >{parts}/folder/file && touch {file} && \
             mount --bind {parts}/folder {folder} && mount --bind {parts}/folder/file {file}",
            memory = volumes.in_memory(),
        ))?;
        Ok(volumes)
    }

    fn on_disk(&self, name: &str) -> String {
        format!("{}/volumes/kubernetes.io~empty-dir/{name}", self.disk)
    }

    fn in_memory(&self) -> String {
        format!("{}/volumes/kubernetes.io~empty-dir/shared", self.memory)
    }

    /// kubelet's bind mount of a part of a volume, which is the source of the container's mount.
    fn sub_path(&self, number: usize) -> String {
        format!("{}/volume-subpaths/parts/reader/{number}", self.disk)
    }

    fn remove(self, node: &Node) -> Result<()> {
        let Self { disk, memory } = self;
        node.shell(&format!(
            "umount -R -l {disk} && umount -R -l {memory} && rmdir {disk} {memory} && rm {disk}.img"
        ))
        .map(drop)
    }
}

fn mount(source: &str, destination: &str, read_only: bool) -> Value {
    json!({"host_path": source, "container_path": destination, "readonly": read_only})
}

fn with_mounts(name: &str, port: &str, mounts: Vec<Value>) -> Value {
    let mut config = container(name, &["/probe/probe", "serve", port]);
    config["mounts"]
        .as_array_mut()
        .expect("a list")
        .extend(mounts);
    config
}

/// Options (`ro`, `rw`) of all mounts of a folder in the mount namespace of the file-system daemon,
/// sorted and without duplicates.
fn in_daemon(side: &Side<'_>, folder: &str) -> Result<Vec<&'static str>> {
    let line = format!(
        "for pid in $(pgrep -f '^[^ ]*virtiofsd .*{}'); do cat /proc/$pid/mountinfo; done",
        side.pod.id
    );
    let text = side.node.shell(&line)?;
    // Field 4 is the root within the file system, field 6 the mount options
    // (proc_pid_mountinfo(5)).
    let fields = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let of_folder = fields.filter(|fields| fields.get(3).is_some_and(|root| *root == folder));
    let options = of_folder.map(|fields| {
        let options = fields.get(5).copied().unwrap_or_default();
        let is_read_only = options.split(',').any(|option| option == "ro");
        if is_read_only { "ro" } else { "rw" }
    });
    let mut options: Vec<&str> = options.collect();
    options.sort_unstable();
    options.dedup();
    Ok(options)
}

fn in_containers(side: &Side<'_>, volumes: &Volumes) -> Result<Value> {
    let both = |mounts: &mut Vec<Value>| {
        mounts.push(mount(&volumes.on_disk("shared"), "/disk", false));
        mounts.push(mount(&volumes.in_memory(), "/memory", false));
    };
    // The read-only view and the parts are mounted before the whole volumes.
    let mut mounts = vec![
        mount(&volumes.on_disk("seen"), "/read-only", true),
        mount(&volumes.sub_path(0), "/folder", false),
        mount(&volumes.sub_path(1), "/file", false),
    ];
    both(&mut mounts);
    side.run(&with_mounts("reader", READER, mounts))?;
    let seen = "/volumes/kubernetes.io~empty-dir/seen";
    let here = side.handler == PERICARP;
    let before = here.then(|| in_daemon(side, seen)).transpose()?;
    let mut mounts = vec![
        mount(&volumes.on_disk("seen"), "/whole", false),
        mount(&volumes.on_disk("parts"), "/parts", false),
    ];
    both(&mut mounts);
    let writer = side.run(&with_mounts("writer", WRITER, mounts))?;
    let after = here.then(|| in_daemon(side, seen)).transpose()?;
    let mut found = side.probe(&writer, &["volumes", WRITER, READER])?;
    // runc needs no daemon, so its side has the expected values.
    let (before, after) = before
        .zip(after)
        .unwrap_or_else(|| (vec!["ro"], vec!["ro", "rw"]));
    // A hostile guest kernel can write to all that the daemon can write to.
    found["read-only volume in the daemon"] = json!(before);
    found["the same once another container may write it"] = json!(after.contains(&"rw"));
    Ok(found)
}

#[test]
fn containers_share_volumes_as_under_runc() {
    let Some(node) = node("volumes") else {
        return;
    };
    let volumes = HANDLERS.map(|handler| Volumes::make(&node, &format!("volumes-{handler}")));
    let volumes = volumes.map(Result::unwrap);
    let found = under_both(&node, "volumes", |side| {
        let number = HANDLERS.iter().position(|handler| *handler == side.handler);
        in_containers(side, &volumes[number.context("a handler of the test")?])
    });
    for volumes in volumes {
        volumes.remove(&node).unwrap();
    }
    let found = found.unwrap();
    assert_eq!(found[0], expected());
    assert_same(&found);
}

/// Findings under runc.
fn expected() -> Value {
    let events = "IN_CREATE:event IN_MODIFY:event IN_MOVED_FROM:event IN_MOVED_TO:renamed \
                  IN_DELETE:renamed";
    let nothing = json!({"grown": 0, "listed": 0, "made": 0, "removed": 0, "replaced": 0});
    let shared = json!({
        "events": events,
        "locks": {"flock": ["EAGAIN", "ok"], "record-lock": ["EAGAIN", "ok"]},
        "mapping": ["7", "9"],
        "sockets": ["hello", "hello"],
        "stale": nothing,
    });
    let changed = "start-and-more";
    json!({
        "read-only volume in the daemon": ["ro"],
        "the same once another container may write it": true,
        "/disk": shared,
        "/memory": shared,
        "/read-only": {
            "write": "EROFS",
            "make": "EROFS",
            "remove": "EROFS",
            "make_folder": "EROFS",
            "lock_to_write": "EROFS",
            "read": "text",
            "socket": "hello",
            "events": events,
            "stale": nothing,
        },
        "parts": {
            "file": ["start", changed, changed, format!("{changed}-of-reader")],
            "locked": ["EAGAIN", "EAGAIN"],
            "socket": "hello",
            "events": events,
            "stale": nothing,
            "reader_sees": "file socket",
        },
    })
}
