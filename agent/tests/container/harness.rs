//! A root file system of busybox, a specification to change, and a container to look from.

use std::{
    fs,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

pub(crate) use crate::container::{
    Container, ContainerError, CreateOptions, Created, ResourceLimit, Stdio,
};

/// A place for one container.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) spec: Value,
    /// For processes whose specification sets none.
    pub(crate) default_limits: Vec<ResourceLimit>,
    /// Where the pod's own files lie.
    pod_files: PathBuf,
}

/// What a process left.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// As a shell says it.
    pub(crate) status: i32,
    pub(crate) stdout: String,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Where the unified hierarchy is mounted.
pub(crate) fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))
        .unwrap();
    PathBuf::from(line.split(' ').nth(1).unwrap())
}

pub(crate) fn cgroup_parent() -> PathBuf {
    cgroup_root().join("pericarp-test")
}

/// Whether `controller` can be used here; says so when it cannot.
pub(crate) fn has_controller(controller: &str) -> bool {
    let controllers = fs::read_to_string(cgroup_root().join("cgroup.controllers")).unwrap();
    let has = controllers
        .split_whitespace()
        .any(|name| name == controller);
    if !has {
        println!("skipped: no {controller} controller in the unified hierarchy of this machine");
    }
    has
}

impl Place {
    pub(crate) fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests need root");
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("rootfs");
        for directory in [
            "bin", "etc", "proc", "sys", "dev", "tmp", "home", "data", "root",
        ] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "ls", "stat", "id", "mount", "echo", "sleep", "hostname", "touch", "grep",
            "ip", "readlink", "mkdir", "dd", "true", "kill", "mknod", "tty", "stty", "uname", "wc",
            "test", "chown", "umount", "env", "ps", "find", "sysctl", "nproc", "cut", "tr", "head",
            "od",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home:/bin/sh\n",
        )
        .unwrap();
        let id = format!(
            "test-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let spec = spec(&root);
        Self {
            pod_files: folder.path().join("pod"),
            folder,
            id,
            spec,
            default_limits: Vec::new(),
        }
    }

    /// A place whose pod has the files of `other`.
    pub(crate) fn with_files_of(other: &Self) -> Self {
        let mut place = Self::new();
        place.pod_files.clone_from(&other.pod_files);
        place
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    /// A directory of the guest's, outside of the root.
    pub(crate) fn outside(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) fn mount(&mut self, mount: Value) -> &mut Self {
        self.spec["mounts"].as_array_mut().unwrap().push(mount);
        self
    }

    /// Adds a namespace, or takes away the one of that type with `null` as its path.
    pub(crate) fn without_namespace(&mut self, kind: &str) -> &mut Self {
        let namespaces = self.spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != kind);
        self
    }

    pub(crate) fn namespace(&mut self, namespace: Value) -> &mut Self {
        let kind = namespace["type"].as_str().unwrap().to_owned();
        self.without_namespace(&kind);
        self.spec["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(namespace);
        self
    }

    /// With a user namespace whose root is 100000.
    pub(crate) fn user_namespace(&mut self) -> &mut Self {
        let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        self.spec["linux"]["uidMappings"] = mappings.clone();
        self.spec["linux"]["gidMappings"] = mappings;
        // Its root must reach the root file system.
        self.namespace(json!({"type": "user"}))
    }

    pub(crate) fn options(&self) -> CreateOptions {
        CreateOptions {
            cgroup_parent: cgroup_parent(),
            default_limits: self.default_limits.clone(),
            pod_files: Some(self.pod_files.clone()),
            ..CreateOptions::default()
        }
    }

    pub(crate) fn parsed(&self) -> Spec {
        serde_json::from_value(self.spec.clone()).unwrap()
    }

    pub(crate) fn create(&self, stdio: Stdio) -> Result<(Container, Created), ContainerError> {
        Container::create(&self.id, self.parsed(), self.options(), stdio)
    }

    /// Runs `script` in a shell as the container's first process, to its end.
    pub(crate) fn sh(&mut self, script: &str) -> Outcome {
        self.spec["process"]["args"] = json!(["sh", "-c", script]);
        self.try_run().unwrap()
    }

    pub(crate) fn try_run(&self) -> Result<Outcome, ContainerError> {
        let (reader, stdio) = captured();
        let (mut container, created) = self.create(stdio)?;
        let started = container.start();
        let status = wait(created.pid);
        let stdout = read(reader);
        container.delete()?;
        started.map(|()| Outcome { status, stdout })
    }

    /// A container whose first process sleeps.
    pub(crate) fn sleeping(mut self) -> Running {
        // In a shell, which as the first of its namespace must handle SIGTERM to be ended by it.
        let script = "trap 'exit 7' TERM; while :; do sleep 1000 & wait; done";
        self.spec["process"]["args"] = json!(["sh", "-c", script]);
        let (mut container, created) = self.create(Stdio::default()).unwrap();
        container.start().unwrap();
        Running {
            container: Some(container),
            pid: created.pid,
            _place: self,
        }
    }

    pub(crate) fn error(&self) -> String {
        match self.try_run() {
            Err(error) => error.to_string(),
            Ok(outcome) => panic!("should have failed: {outcome:?}"),
        }
    }
}

/// A mount that goes when this is dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn tmpfs(path: &Path) -> Self {
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(none, path, Some("tmpfs"), flags, none).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A container that runs until this is dropped.
pub(crate) struct Running {
    container: Option<Container>,
    pub(crate) pid: i32,
    _place: Place,
}

impl Running {
    pub(crate) fn container(&self) -> &Container {
        self.container.as_ref().unwrap()
    }

    /// Runs `script` in a shell inside.
    pub(crate) fn sh(&self, script: &str) -> Outcome {
        self.exec(process(&["sh", "-c", script])).unwrap()
    }

    pub(crate) fn exec(&self, process: Value) -> Result<Outcome, ContainerError> {
        let process: Process = serde_json::from_value(process).unwrap();
        let (reader, stdio) = captured();
        let (mut exec, created) = self.container().exec("exec", process, None, stdio)?;
        let started = exec.start();
        let status = wait(created.pid);
        let stdout = read(reader);
        started.map(|()| Outcome { status, stdout })
    }

    pub(crate) fn end(mut self) {
        self.finish();
    }

    /// Waits for an end that the test brought about.
    pub(crate) fn ended(mut self, status: i32) {
        assert_eq!(wait(self.pid), status);
        self.container.take().unwrap().delete().unwrap();
    }

    fn finish(&mut self) {
        if let Some(container) = self.container.take() {
            container.signal_all(libc::SIGKILL).unwrap();
            wait(self.pid);
            container.delete().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.finish();
        } else if let Some(container) = &self.container {
            let _ = container.signal_all(libc::SIGKILL);
        }
    }
}

pub(crate) fn captured() -> (OwnedFd, Stdio) {
    let (reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let stderr = writer.as_fd().try_clone_to_owned().unwrap();
    (
        reader.into(),
        Stdio {
            stdin: None,
            stdout: Some(writer),
            stderr: Some(stderr),
        },
    )
}

pub(crate) fn read(reader: OwnedFd) -> String {
    let mut bytes = Vec::new();
    // A terminal whose other end is closed answers EIO.
    let _ = fs::File::from(reader).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn wait(pid: i32) -> i32 {
    match waitpid(Pid::from_raw(pid), None).unwrap() {
        WaitStatus::Exited(_, status) => status,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": capabilities(),
    })
}

pub(crate) fn capabilities() -> Value {
    let all = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ]);
    json!({"bounding": all, "effective": all, "permitted": all})
}

fn spec(root: &Path) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": root},
        "process": process(&["true"]),
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=64k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"},
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/acpi", "/proc/timer_list", "/proc/no-such-file",
                            "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                              "/proc/sysrq-trigger"],
        },
    })
}
