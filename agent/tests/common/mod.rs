//! Runs the real agent in namespaces of its own against unix sockets in place of vsock, and speaks
//! to it as the host does.
//!
//! Needs root, `unshare` and a static busybox; where one is missing the tests say so and pass.
//!
//! The agent is PID 1 of a PID namespace, with its own mount, UTS, IPC, network and cgroup
//! namespaces. Its `/run` is a tmpfs; `/sys/fs/cgroup` is a cgroup2 mount rooted at a cgroup made
//! for the test, with whatever controllers the machine gives to version 2.

#![expect(dead_code, reason = "each test binary uses a part of it")]

use std::{
    fs,
    net::Shutdown,
    os::unix::{fs::symlink, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use pericarp_protocol::{
    STREAM_PORT,
    guest::{
        ConfigureSandboxRequest, CreateContainerRequest, Empty, Hello, ProcessRequest,
        SignalRequest, Streams, WaitResponse,
    },
    guest_ttrpc::AgentClient,
};
use protobuf::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};
use ttrpc::{asynchronous::transport::Socket, context::Context};

/// Deadline of ordinary requests.
const REQUEST_NS: i64 = 30_000_000_000;

/// How long a machine may take to the agent's hello; emulated on a busy computer it takes seconds.
pub(crate) const BOOT_MAX: Duration = Duration::from_secs(120);

/// Streams and sandboxes of this test process.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// What the agent's namespaces are set up by. Arguments: folder of the test, name of its cgroup,
/// the agent and its own.
const OUTER: &str = r#"
set -e
work=$1 name=$2; shift 2
mkdir -p $work/cgroup2
mount -t cgroup2 none $work/cgroup2
mkdir $work/cgroup2/$name
for controller in $(cat $work/cgroup2/cgroup.controllers); do
    echo +$controller > $work/cgroup2/cgroup.subtree_control 2>/dev/null || true
done
mkdir $work/cgroup2/$name/agent
echo $$ > $work/cgroup2/$name/cgroup.procs
export CGROUP=$work/cgroup2/$name/agent/cgroup.procs
exec unshare --cgroup sh -c "$MIDDLE" middle "$@"
"#;

/// Leaves the root of the new cgroup namespace, so that it may have controllers.
const MIDDLE: &str = r#"
set -e
echo $$ > $CGROUP
exec unshare --pid --fork --kill-child --net --uts --ipc --mount --propagation private \
    sh -c "$INNER" inner "$@"
"#;

const INNER: &str = r#"
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir /run/pericarp
# As a starter may leave it: containers must not inherit it.
trap '' USR1 TTOU
exec "$@"
"#;

/// How streams are opened.
enum StreamPort {
    Unix(PathBuf),
    /// A socket of the VMM, which asks for the guest's port first.
    Machine(PathBuf),
}

/// The agent under test, and the host's side of its connection.
pub(crate) struct Guest {
    pub(crate) client: AgentClient,
    pub(crate) hello: Hello,
    /// The same connection as the client's, to end it.
    connection: StdUnixStream,
    streams: StreamPort,
    rootfs: PathBuf,
    folder: TempDir,
    cgroup_name: String,
    child: Child,
}

impl Guest {
    /// Starts an agent; `None` where the machine lacks what that needs.
    pub(crate) async fn start() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || !Path::new("/usr/bin/busybox").exists() {
            eprintln!("skipped: needs root and /usr/bin/busybox");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        make_rootfs(&folder.path().join("rootfs"));
        let listener = UnixListener::bind(folder.path().join("agent.sock")).unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup_name = format!("pericarp-test-{}-{number}", std::process::id());
        let child = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                OUTER,
                "outer",
            ])
            .arg(folder.path())
            .arg(&cgroup_name)
            .arg(agent())
            .arg("--socket")
            .arg(folder.path().join("agent.sock"))
            .arg("--streams")
            .arg(folder.path().join("streams.sock"))
            .env("MIDDLE", MIDDLE)
            .env("INNER", INNER)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (connection, _) = listener.accept().await.unwrap();
        let (connection, client, hello) = greet(connection).await;
        let streams = StreamPort::Unix(folder.path().join("streams.sock"));
        let rootfs = folder.path().join("rootfs");
        Some(Self {
            connection,
            client,
            hello,
            streams,
            rootfs,
            folder,
            cgroup_name,
            child,
        })
    }

    /// Starts a virtual machine by `command` and meets the agent in it. The machine connects the
    /// agent's port to `agent.sock` in `folder` and takes connections to the guest's ports at
    /// `vsock.sock`; `rootfs` is the guest's path of a root file system for containers.
    pub(crate) async fn in_machine(command: &str, folder: &Path, rootfs: &Path) -> Self {
        let listener = UnixListener::bind(folder.join("agent.sock")).unwrap();
        let child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let hello = async {
            let (connection, _) = listener.accept().await.unwrap();
            greet(connection).await
        };
        let (connection, client, hello) = tokio::time::timeout(BOOT_MAX, hello)
            .await
            .expect("a hello");
        Self {
            connection,
            client,
            hello,
            streams: StreamPort::Machine(folder.join("vsock.sock")),
            rootfs: rootfs.to_owned(),
            folder: tempfile::tempdir().unwrap(),
            cgroup_name: String::new(),
            child,
        }
    }

    /// Waits until the agent's machine is gone.
    pub(crate) fn ended(mut self) {
        self.child.wait().unwrap();
    }

    /// Starts an agent and configures an ordinary sandbox.
    pub(crate) async fn configured() -> Option<Self> {
        let guest = Self::start().await?;
        let request = ConfigureSandboxRequest {
            sandbox_id: "sandbox".to_owned(),
            hostname: "pod".to_owned(),
            ..Default::default()
        };
        guest
            .client
            .configure_sandbox(deadline(), &request)
            .await
            .unwrap();
        Some(guest)
    }

    /// The agent's own process as this machine sees it.
    pub(crate) fn agent_pid(&self) -> u32 {
        // unshare --fork leaves one process between.
        let parent = self.child.id();
        let children = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let rest = stat.rsplit_once(") ")?.1.to_owned();
            let found: u32 = rest.split(' ').nth(1)?.parse().ok()?;
            (found == parent).then_some(pid)
        });
        children.into_iter().next().unwrap()
    }

    /// A folder of the test that the agent sees at the same path.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A root file system with busybox and its applets.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.rootfs.clone()
    }

    /// Opens a connection to the stream port and says `header`; gives the answer line and the
    /// connection.
    pub(crate) async fn connect(&self, header: &str) -> (String, UnixStream) {
        let mut stream = match &self.streams {
            StreamPort::Unix(path) => UnixStream::connect(path).await.unwrap(),
            StreamPort::Machine(path) => {
                let mut stream = UnixStream::connect(path).await.unwrap();
                let line = format!("CONNECT {STREAM_PORT}\n");
                stream.write_all(line.as_bytes()).await.unwrap();
                let answer = read_line(&mut stream).await;
                assert!(answer.starts_with("OK "), "the VMM answered {answer:?}");
                stream
            }
        };
        stream.write_all(header.as_bytes()).await.unwrap();
        (read_line(&mut stream).await, stream)
    }

    /// Opens a stream for a process to come.
    pub(crate) async fn stream(&self) -> (u64, UnixStream) {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (answer, stream) = self.connect(&format!("process {id}\n")).await;
        assert_eq!(answer, "ok\n");
        (id, stream)
    }

    /// A specification that runs `args` in the root file system of the test.
    pub(crate) fn spec(&self, args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": { "path": self.rootfs(), "readonly": false },
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": args,
                "env": ["PATH=/bin"],
                "cwd": "/",
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "mode=755", "size=65536k"] },
            ],
            "linux": {
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" }, { "type": "cgroup" },
                ],
            },
        })
    }

    /// Creates a container.
    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &Value,
        streams: Streams,
    ) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            oci_spec: serde_json::to_vec(spec).unwrap(),
            streams: Some(streams).into(),
            ..Default::default()
        };
        let answer = self.client.create_container(deadline(), &request).await?;
        Ok(answer.pid)
    }

    /// Starts a container, or an exec of it.
    pub(crate) async fn start_process(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        Ok(self
            .client
            .start_process(deadline(), &process(id, exec_id))
            .await?
            .pid)
    }

    /// Starts a container and gives the other ends of its standard input and output.
    pub(crate) async fn start_piped(&self, id: &str, spec: &Value) -> (UnixStream, UnixStream) {
        let (stdin, into) = self.stream().await;
        let (stdout, out) = self.stream().await;
        let streams = Streams {
            stdin,
            stdout,
            ..Default::default()
        };
        self.create(id, spec, streams).await.unwrap();
        self.start_process(id, "").await.unwrap();
        (into, out)
    }

    /// Ends the connection and takes the one that the agent makes then.
    pub(crate) async fn reconnect(mut self) -> Self {
        let path = self.folder.path().join("agent.sock");
        fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        self.connection.shutdown(Shutdown::Both).unwrap();
        let (connection, _) = listener.accept().await.unwrap();
        let (connection, client, hello) = greet(connection).await;
        (self.connection, self.client, self.hello) = (connection, client, hello);
        self
    }

    /// Ends the connection for good and gives the exit status of the agent.
    pub(crate) fn hang_up(mut self) -> Option<i32> {
        self.connection.shutdown(Shutdown::Both).unwrap();
        self.child.wait().unwrap().code()
    }

    /// Sends SIGKILL to a container's first process.
    pub(crate) async fn kill(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = SignalRequest {
            container_id: id.to_owned(),
            signal: 9,
            ..Default::default()
        };
        self.client.signal_process(deadline(), &request).await
    }

    /// Waits for the end of a container, or of an exec of it.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitResponse> {
        self.client
            .wait_process(deadline(), &process(id, exec_id))
            .await
    }

    /// Deletes a container, or an exec of it.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitResponse> {
        self.client
            .delete_process(deadline(), &process(id, exec_id))
            .await
    }

    /// Runs a container from creation to deletion. Gives its output, its errors and its exit
    /// status.
    pub(crate) async fn run(&self, id: &str, spec: &Value) -> ttrpc::Result<(String, String, u32)> {
        let (stdout, mut out) = self.stream().await;
        let (stderr, mut err) = self.stream().await;
        let streams = Streams {
            stdout,
            stderr,
            ..Default::default()
        };
        self.create(id, spec, streams).await?;
        let (mut output, mut errors) = (String::new(), String::new());
        let started = self.start_process(id, "").await;
        if let Err(error) = started {
            self.delete(id, "").await?;
            return Err(error);
        }
        let (read_out, read_err, waited) = tokio::join!(
            out.read_to_string(&mut output),
            err.read_to_string(&mut errors),
            self.wait(id, ""),
        );
        read_out.unwrap();
        read_err.unwrap();
        let status = waited?.exit_status;
        assert_eq!(self.delete(id, "").await?.exit_status, status);
        Ok((output, errors, status))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The namespace's first process takes all others with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for mount in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            remove_cgroups(&Path::new(mount).join(&self.cgroup_name));
        }
    }
}

/// Reads a line with its newline, or what there is before the end.
async fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        match stream.read_u8().await {
            Ok(byte) => line.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(line).unwrap()
}

async fn greet(mut connection: UnixStream) -> (StdUnixStream, AgentClient, Hello) {
    let length = connection.read_u32_le().await.unwrap();
    let mut hello = vec![0; usize::try_from(length).unwrap()];
    connection.read_exact(&mut hello).await.unwrap();
    let connection = connection.into_std().unwrap();
    let ours = connection.try_clone().unwrap();
    let connection = UnixStream::from_std(connection).unwrap();
    let client = ttrpc::asynchronous::Client::new(Socket::new(connection));
    (
        ours,
        AgentClient::new(client),
        Hello::parse_from_bytes(&hello).unwrap(),
    )
}

/// The agent's binary: that of this build, or the one that `PERICARP_AGENT` names.
fn agent() -> String {
    std::env::var("PERICARP_AGENT")
        .ok()
        .or_else(|| option_env!("CARGO_BIN_EXE_pericarp-agent").map(str::to_owned))
        .unwrap()
}

/// A request's context with an ordinary deadline.
pub(crate) fn deadline() -> Context {
    ttrpc::context::with_timeout(REQUEST_NS)
}

/// A request about a process.
pub(crate) fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    }
}

/// The code and text of a refused request.
pub(crate) fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("no status: {other}"),
    }
}

fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "proc", "dev", "tmp", "etc", "sys", "mnt", "root"] {
        fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    fs::copy("/usr/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    let applets = Command::new("/usr/bin/busybox")
        .arg("--list")
        .output()
        .unwrap();
    for applet in String::from_utf8(applets.stdout).unwrap().lines() {
        if applet != "busybox" {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(rootfs.join("etc/group"), "root:x:0:\n").unwrap();
}

fn remove_cgroups(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    // Its last process may still be on its way out; the cgroup is empty and harmless.
    let _ = fs::remove_dir(path);
}
