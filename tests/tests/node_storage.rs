//! Root file systems of containers in VMs: what is on a disk of the guest, what is shared.

use anyhow::{Context, Result};
use pericarp_tests::node::containerd::Pod;
use pericarp_tests::node::images::BUSYBOX;
use pericarp_tests::node::{Builder, Containerd, Session, Version, pericarp};
use pericarp_tests::pods::leftovers::Leftovers;
use pericarp_tests::pods::slow_disk;
use pericarp_tests::pods::{container_config, pod_config};
use serde_json::json;

/// The handler of containerd.
const HANDLER: &str = "pericarp";
/// What a container is told to run when it is there to be entered.
const WAIT: &str = "exec sleep 1000";
/// The disks of all snapshots of a node.
const DISKS: &str = "find /var/lib/containerd* -name .pericarp-disk";

fn node(test: &str) -> Option<Session> {
    pericarp::session(test, || Builder::default().name("storage"))
}

/// Bytes of host storage that the one disk of the node takes.
fn disk_bytes(node: &Session) -> Result<u64> {
    let blocks = node.shell(&format!("stat -c %b $({DISKS})"))?;
    Ok(blocks.trim().parse::<u64>().context("one disk")? * 512)
}

/// Waits until a line of shell is true.
fn wait_until(node: &Session, condition: &str) -> Result<()> {
    let line = format!("timeout 60 sh -c 'until {condition}; do sleep 0.2; done'");
    node.shell(&line).map(drop)
}

/// Waits until containerd's garbage collection has removed the snapshots of removed containers.
fn no_disk_is_left(node: &Session) -> Result<()> {
    wait_until(node, &format!("[ -z \"$({DISKS})\" ]"))
}

fn pod(node: &Session, containerd: &Containerd, name: &str) -> Result<Pod> {
    containerd.run_pod(node, HANDLER, &pod_config(name))
}

fn writes_are_on_a_disk(node: &Session, version: Version) -> Result<()> {
    let containerd = node.containerd(version)?;
    let before = Leftovers::look(node)?;
    no_disk_is_left(node)?;
    let pod = pod(node, &containerd, "disk")?;
    let config = container_config("c", BUSYBOX, WAIT);
    let container = containerd.run_container(node, &pod, &config)?;
    let written =
        "rm /bin/true && echo kept > /kept && dd if=/dev/zero of=/big bs=1M count=32 && sync";
    containerd.exec_shell(node, &container, written)?;
    assert!(disk_bytes(node)? > 32 << 20);
    // The kubelet's figure for ephemeral storage is containerd's of the snapshot.
    let usage = containerd
        .ctr()
        .args(["--namespace", "k8s.io", "snapshots", "usage", "-b"]);
    let usage = node.text(&usage.args([container.as_str()]))?;
    let bytes = usage
        .lines()
        .last()
        .and_then(|line| line.split_whitespace().nth(1));
    let bytes: u64 = bytes.context("no usage")?.parse()?;
    assert!(bytes > 32 << 20, "{usage}");
    // The host gets back what is deleted.
    containerd.exec_shell(node, &container, "rm /big && sync")?;
    wait_until(node, &format!("[ $(stat -c %b $({DISKS})) -lt 8192 ]"))?;
    assert_eq!(
        containerd.exec_shell(node, &container, "cat /kept")?,
        "kept"
    );

    // Another container of the same image has its own, and the layers are as they were.
    containerd.crictl_text(node, &["rm", "-f", &container])?;
    no_disk_is_left(node)?;
    let second = containerd.run_container(node, &pod, &config)?;
    assert!(
        containerd
            .exec_shell(node, &second, "test -e /kept")
            .is_err()
    );
    containerd.exec_shell(node, &second, "/bin/true")?;
    containerd.remove_pod(node, &pod)?;
    no_disk_is_left(node)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn what_a_container_writes_is_on_a_disk_in_its_snapshot() {
    let Some(node) = node("storage-disk-2.3") else {
        return;
    };
    writes_are_on_a_disk(&node, Version::V23).unwrap();
}

#[test]
fn what_a_container_writes_is_on_a_disk_with_containerd_1_7() {
    let Some(node) = node("storage-disk-1.7") else {
        return;
    };
    writes_are_on_a_disk(&node, Version::V17).unwrap();
}

#[test]
fn a_read_only_root_needs_no_disk() {
    let Some(node) = node("storage-read-only") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let pod = pod(&node, &containerd, "read-only").unwrap();
    no_disk_is_left(&node).unwrap();
    node.shell("mkdir -p /run/volume && echo volume > /run/volume/file")
        .unwrap();
    let mut config = container_config("c", BUSYBOX, WAIT);
    config["linux"] = json!({"security_context": {"readonly_rootfs": true}});
    config["mounts"] = json!([{"host_path": "/run/volume", "container_path": "/not/in/image"}]);
    let container = containerd.run_container(&node, &pod, &config).unwrap();
    let inside = |line: &str| containerd.exec_shell(&node, &container, line);
    assert_eq!(inside("cat /not/in/image/file").unwrap(), "volume");
    let error = format!("{:#}", inside("touch /x").unwrap_err());
    assert!(error.contains("Read-only file system"), "{error}");
    assert_eq!(node.shell(DISKS).unwrap().trim(), "");
    containerd.remove_pod(&node, &pod).unwrap();
}

#[test]
fn a_snapshot_keeps_what_was_written_from_one_task_to_the_next() {
    let Some(node) = node("storage-again") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let run = "ctr -n k8s.io task start k";
    let line = "cat /kept; echo kept >> /kept; ls -a /";
    let create = format!(
        "ctr -n k8s.io container create --runtime io.containerd.pericarp.v2 {BUSYBOX} k \
         sh -c '{line}'"
    );
    node.shell(&create).unwrap();
    assert!(!node.shell(run).unwrap().contains("kept\nkept"));
    // Between its tasks somebody works on the snapshot itself.
    let upper = "ctr -n k8s.io snapshots mounts /tmp/m k | tr , '\\n' | sed -n 's/.*upperdir=//p'";
    node.shell(&format!(
        "rm -rf $({upper})/old; echo x > $({upper})/foreign"
    ))
    .unwrap();
    let second = node.shell(run).unwrap();
    assert!(
        second.contains("kept") && second.contains("foreign"),
        "{second}"
    );
    assert!(!second.contains("pericarp-disk"), "{second}");
    node.shell("ctr -n k8s.io container rm k").unwrap();
    no_disk_is_left(&node).unwrap();
}

#[test]
fn a_container_cannot_write_more_than_its_disk_holds() {
    let Some(node) = node("storage-size") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let setting = "/etc/pericarp/config.d/90-size.toml";
    node.write(setting, "[storage]\nscratch_size_mib = 64\n")
        .unwrap();
    let fill = "dd if=/dev/zero of=/big bs=1M count=100; df -m / | tail -1";
    let run = format!(
        "ctr -n k8s.io run --rm --runtime io.containerd.pericarp.v2 {BUSYBOX} full \
         sh -c '{fill}' 2>&1"
    );
    let said = node.shell(&run);
    node.shell(&format!("rm {setting}")).unwrap();
    let said = said.unwrap();
    assert!(said.contains("No space left on device"), "{said}");
}

/// A container of a class of block I/O.
fn moves_what_its_class_lets_it(node: &Session, runtime: &str) -> Result<()> {
    let (folder, class) = (slow_disk::FOLDER, slow_disk::CLASS);
    let ctr = "ctr -n k8s.io";
    let mount = format!("type=bind,src={folder},dst={folder},options=rbind:rw");
    let file = slow_disk::CLASSES;
    node.shell(&format!(
        "{ctr} run --detach --runtime {runtime} --mount {mount} --blockio-config-file {file} \
         --blockio-class {class} {BUSYBOX} moves sh -c '{WAIT}'"
    ))?;
    let held = slow_disk::holds(node, |line| {
        node.shell(&format!("{ctr} task exec --exec-id e moves sh -c '{line}'"))
    });
    node.shell(&format!(
        "{ctr} task rm --force moves; {ctr} container rm moves"
    ))?;
    held
}

#[test]
fn limits_of_block_devices_hold_for_a_vm_too() {
    let Some(node) = node("storage-limits") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    slow_disk::make(&node).unwrap();
    let runtimes = ["io.containerd.runc.v2", "io.containerd.pericarp.v2"];
    let held =
        runtimes.map(|runtime| moves_what_its_class_lets_it(&node, runtime).context(runtime));
    slow_disk::remove(&node).unwrap();
    for held in held {
        held.unwrap();
    }
    Leftovers::nothing_since(&node, &before).unwrap();
}

#[test]
fn a_pod_has_users_of_its_own() {
    let Some(node) = node("storage-users") else {
        return;
    };
    let containerd = node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let map = json!([{"container_id": 0, "host_id": 65536, "length": 65536}]);
    let options = json!({"userns_options": {"mode": 0, "uids": map, "gids": map}});
    let context = json!({"security_context": {"namespace_options": options}});
    let mut config = pod_config("users");
    config["linux"] = context.clone();
    let pod = containerd.run_pod(&node, HANDLER, &config).unwrap();
    node.shell("mkdir -p /run/users; echo old >/run/users/old; chown 1000:1001 /run/users/old")
        .unwrap();
    let memory = memory_volume("users", "m");
    node.shell(&format!(
        "mkdir -p {memory} && mount -t tmpfs tmpfs {memory} && chown :4321 {memory}"
    ))
    .unwrap();
    let mut config = container_config("c", BUSYBOX, WAIT);
    config["linux"] = context;
    config["mounts"] = json!([{"host_path": "/run/users", "container_path": "/volume",
                               "uidMappings": map, "gidMappings": map},
                              {"host_path": memory, "container_path": "/memory",
                               "uidMappings": map, "gidMappings": map}]);
    let container = containerd.run_container(&node, &pod, &config).unwrap();
    let inside = |line: &str| containerd.exec_shell(&node, &container, line).unwrap();
    let ids = inside("tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; id -u");
    assert_eq!(ids, "0 65536 65536\n 0 65536 65536\n0");
    let owners = inside("touch /new; stat -c %u:%g / /bin/busybox /new /volume/old");
    assert_eq!(owners, "0:0\n0:0\n0:0\n1000:1001");
    let owners = inside("touch /memory/new; stat -c %u:%g /memory /memory/new; df /memory");
    assert!(
        owners.starts_with("0:4321\n0:0\n") && owners.contains("tmpfs"),
        "{owners}"
    );
    inside("echo new >/volume/new; chown 7:8 /volume/old");
    let owners = node.shell("stat -c %u:%g /run/users/new /run/users/old");
    assert_eq!(owners.unwrap(), "0:0\n7:8\n");
    containerd.remove_pod(&node, &pod).unwrap();
    node.shell(&format!(
        "umount {memory}; rm -r /run/users /var/lib/kubelet/pods/users"
    ))
    .unwrap();
    Leftovers::nothing_since(&node, &before).unwrap();
}

/// Where kubelet mounts a pod's volume, and where it binds what is in one for a container.
fn memory_volume(pod: &str, name: &str) -> String {
    format!("/var/lib/kubelet/pods/{pod}/volumes/kubernetes.io~empty-dir/{name}")
}

/// A directory in the volume `m` of a pod, mounted as kubelet does for a sub path.
fn sub_path(node: &Session, pod: &str, name: &str) -> Result<String> {
    let volume = memory_volume(pod, "m");
    let target = format!("/var/lib/kubelet/pods/{pod}/volume-subpaths/m/c/{name}");
    let made = format!(
        "mkdir -p '{volume}/{name}' '{target}' && mount --bind '{volume}/{name}' '{target}'"
    );
    node.shell(&made)?;
    Ok(target)
}

/// Two volumes in memory of a pod: one as kubelet makes it, and one with a file of the host.
fn two_volumes(node: &Session) -> Result<(String, String)> {
    let [volume, kept] = ["m", "kept"].map(|name| memory_volume("memory", name));
    node.shell(&format!(
        "mkdir -p {volume} {kept} && mount -t tmpfs -o size=48m tmpfs {volume} &&
         chown :4321 {volume} && chmod 2775 {volume} &&
         mount -t tmpfs tmpfs {kept} && echo old >{kept}/old"
    ))?;
    Ok((volume, kept))
}

/// Containers that have a pod's volume in memory share a tmpfs of their guest, and pay for it.
fn memory_is_the_guests(node: &Session, version: Version) -> Result<()> {
    let containerd = node.containerd(version)?;
    let before = Leftovers::look(node)?;
    let (volume, kept) = two_volumes(node)?;
    let pod = pod(node, &containerd, "memory")?;
    let run = |name: &str, mounts: serde_json::Value| {
        let mut config = container_config(name, BUSYBOX, WAIT);
        config["mounts"] = mounts;
        config["linux"] = json!({"resources": {"memory_limit_in_bytes": 32 << 20}});
        containerd.run_container(node, &pod, &config)
    };
    let inside = |container: &str, line: &str| containerd.exec_shell(node, container, line);
    let both = json!([{"host_path": volume, "container_path": "/m"},
                      {"host_path": kept, "container_path": "/kept"}]);
    let writer = run("writer", both.clone())?;
    let says = inside(
        &writer,
        "stat -c %a:%u:%g /m; df -m /m | awk 'END { print $1, $2 }'",
    );
    assert_eq!(says?, "2775:0:4321\ntmpfs 48");
    // Charged to the one that writes, and not seen by the host.
    let write = "dd if=/dev/zero of=/m/f bs=1M count=16 2>/dev/null; echo file >/m/g; \
                 [ $(cat /sys/fs/cgroup/memory.current) -ge 16777216 ]";
    inside(&writer, write)?;
    // What holds files of the host is the host's still.
    assert_eq!(inside(&writer, "cat /kept/old")?, "old");
    inside(&writer, "echo new >/kept/new")?;
    let host = node.shell(&format!("ls -A {volume}; cat {kept}/new"));
    assert_eq!(host?, "new\n");

    // Another sees the same, read-only, and places within, which kubelet made not knowing.
    let (made, file) = (
        sub_path(node, "memory", "d e")?,
        sub_path(node, "memory", "g")?,
    );
    node.shell(&format!(
        "chown 5:6 '{volume}/d e' && chmod 751 '{volume}/d e'"
    ))?;
    let reader = run(
        "reader",
        json!([{"host_path": volume, "container_path": "/m", "readonly": true},
               {"host_path": made, "container_path": "/d"},
               {"host_path": file, "container_path": "/g"}]),
    )?;
    let says = inside(
        &reader,
        "stat -c %a:%u:%g /d; cat /g; stat -c %s /m/f; echo x >/d/x",
    );
    // A directory that is made in one with the set-group-ID bit has it too.
    assert_eq!(says?, "2751:5:6\nfile\n16777216");
    assert!(inside(&reader, "touch /m/no").is_err());
    let small = "[ $(cat /sys/fs/cgroup/memory.current) -lt 16777216 ]";
    inside(&reader, small)?;

    // More than the writer may have is its own end, and no one else's.
    let fill = "dd if=/dev/zero of=/m/big bs=1M count=24 2>&1";
    assert!(inside(&writer, fill).is_err());
    assert_eq!(inside(&reader, "cat '/m/d e/x'")?, "x");
    containerd.crictl_text(node, &["rm", "-f", &writer])?;
    let again = run("again", both)?;
    assert_eq!(inside(&again, "cat /m/g; rm /m/big")?, "file");
    containerd.remove_pod(node, &pod)?;
    let mounts = "umount -l /var/lib/kubelet/pods/memory/volume-subpaths/m/c/*";
    node.shell(&format!("{mounts}; umount {volume} {kept}"))?;
    node.shell("rm -r /var/lib/kubelet/pods/memory")?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn a_volume_in_memory_is_the_guests() {
    let Some(node) = node("storage-memory-2.3") else {
        return;
    };
    memory_is_the_guests(&node, Version::V23).unwrap();
}

#[test]
fn a_volume_in_memory_is_the_guests_with_containerd_1_7() {
    let Some(node) = node("storage-memory-1.7") else {
        return;
    };
    memory_is_the_guests(&node, Version::V17).unwrap();
}

/// Runs a second containerd, without the CRI, whose blockfile snapshotter has a blank file system
/// to start from, and a container on each of its snapshotters.
const SNAPSHOTTERS: &str = r#"
folder=$(mktemp -d)
cd $folder
modprobe loop
modprobe erofs
truncate -s 64M blank && mkfs.ext4 -q -F blank
cat >config.toml <<END
version = 3
root = '$folder/root'
state = '$folder/state'
disabled_plugins = ['io.containerd.cri.v1.runtime', 'io.containerd.cri.v1.images']
[grpc]
address = '$folder/socket'
[plugins.'io.containerd.snapshotter.v1.blockfile']
scratch_file = '$folder/blank'
fs_type = 'ext4'
mount_options = []
END
# --local: by the transfer service, ctr may end before the last of the stream is in the file.
ctr -n k8s.io images export --local image.tar $IMAGE
containerd --config config.toml >log 2>&1 &
containerd=$!
trap 'kill $containerd; wait $containerd || true; rm -rf $folder' EXIT
ctr="ctr --address $folder/socket --namespace k8s.io"
timeout 60 sh -c "until $ctr version >/dev/null 2>&1; do sleep 0.2; done"
for snapshotter in blockfile erofs native; do
    $ctr images import --local --snapshotter $snapshotter image.tar >/dev/null
    echo "$snapshotter: $($ctr run --rm --snapshotter $snapshotter \
        --runtime io.containerd.pericarp.v2 $IMAGE $snapshotter \
        sh -c 'echo written >/file; cat /file; grep " / " /proc/mounts' | tr '\n' ' ')"
done
losetup --all
"#;

#[test]
fn the_roots_of_other_snapshotters_reach_the_guest() {
    let Some(node) = node("storage-snapshotters") else {
        return;
    };
    node.containerd(Version::V23).unwrap();
    let before = Leftovers::look(&node).unwrap();
    let said = node
        .shell(&SNAPSHOTTERS.replace("$IMAGE", BUSYBOX))
        .unwrap();
    // No loop device of the node: its file is a disk of the guest.
    assert!(
        said.contains("blockfile: written /dev/vda / ext4 rw"),
        "{said}"
    );
    assert!(
        said.contains("erofs: written overlay / overlay rw"),
        "{said}"
    );
    assert!(
        said.contains("native: written none / virtiofs rw"),
        "{said}"
    );
    assert!(!said.contains("/dev/loop"), "{said}");
    Leftovers::nothing_since(&node, &before).unwrap();
}

/// Shares of volumes that the pods of the node have.
fn shares(node: &Session) -> Result<usize> {
    let shared = "' /run/pericarp/[^ ]*/shared/.volumes/'";
    let count = node.shell(&format!("grep -c {shared} /proc/self/mountinfo || true"))?;
    Ok(count.trim().parse()?)
}

/// A pod with `volume` and a `subPath` of it. Sockets, locks and mappings are compared with runc in
/// `tests/tests/node_differential`.
fn a_volume_is_shared(node: &Session, volume: &str, sub_path: &str) -> Result<()> {
    let containerd = node.containerd(Version::V23)?;
    let before = Leftovers::look(node)?;
    let pod = pod(node, &containerd, "shared")?;
    let run = |name: &str, mounts: serde_json::Value| -> Result<String> {
        let mut config = container_config(name, BUSYBOX, WAIT);
        config["mounts"] = mounts;
        containerd.run_container(node, &pod, &config)
    };
    let inside = |container: &str, line: &str| containerd.exec_shell(node, container, line);
    let whole = json!([{"host_path": volume, "container_path": "/v"}]);
    let only_read = json!([{"host_path": volume, "container_path": "/v", "readonly": true}]);
    let part = json!([{"host_path": sub_path, "container_path": "/v/sub"}]);

    // What nobody may write the node itself refuses, for the guest's root too.
    let reader = run("reader", only_read)?;
    assert!(inside(&reader, "echo x >/v/sub/f").is_err());
    let writer = run("writer", whole)?;
    let other = run("part", part)?;
    inside(&writer, "echo one >/v/sub/f")?;
    // Nothing of the old file is seen once it was replaced.
    assert_eq!(inside(&other, "cat /v/sub/f")?, "one");
    inside(&writer, "echo second >/v/sub/g; mv /v/sub/g /v/sub/f")?;
    for container in [&reader, &other] {
        assert_eq!(
            inside(container, "cat /v/sub/f; stat -c %s /v/sub/f")?,
            "second\n7"
        );
    }
    assert!(inside(&reader, "echo x >/v/sub/f").is_err());
    let identity = |container: &str| inside(container, "stat -c %d:%i /v/sub/f");
    assert_eq!(identity(&reader)?, identity(&other)?);
    assert_eq!(identity(&writer)?, identity(&other)?);

    for container in [&reader, &writer, &other] {
        containerd.crictl_text(node, &["rm", "-f", container])?;
    }
    // The volume is free, while the pod lives.
    assert_eq!(shares(node)?, 0);
    node.shell(&format!("umount {sub_path} {volume}"))?;
    wait_until(node, "[ -z \"$(losetup -j /run/pv.img)\" ]")?;
    containerd.remove_pod(node, &pod)?;
    Leftovers::nothing_since(node, &before)?;
    Ok(())
}

#[test]
fn the_containers_of_a_pod_share_a_volume() {
    let Some(node) = node("storage-shared") else {
        return;
    };
    let disk = "truncate -s 16M /run/pv.img && mkfs.ext4 -q /run/pv.img && \
         mkdir -p /run/pv /run/pv-sub && mount -o loop /run/pv.img /run/pv && \
         mkdir /run/pv/sub && mount --bind /run/pv/sub /run/pv-sub";
    node.shell(disk).unwrap();
    a_volume_is_shared(&node, "/run/pv", "/run/pv-sub").unwrap();
}
