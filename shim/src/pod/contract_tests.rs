//! What containerd sees of processes and pods when the agent or the VMM misbehaves. Agent and VMM
//! are parts of the test.

use std::{os::fd::AsRawFd as _, process::Command, time::Instant};

use async_trait::async_trait;
use containerd_shim_protos::events::task::TaskExit;
use futures::{StreamExt as _, stream};
use nix::{
    sys::{
        signal::{Signal, kill as send_signal},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::Pid,
};
use pericarp_protocol::{
    GUEST_PROTOCOL_MAJOR,
    guest::{
        ContainerRequest, Empty, Event, EventsRequest, Hello, PidsResponse, ProcessInfo,
        ProcessRequest, SignalRequest, StartResponse, WaitResponse,
    },
    guest_ttrpc::{Agent as AgentService, create_agent},
};
use pericarp_runtime_config::{Config, Demand, HostCapacity};
use protobuf::Message as _;
use tempfile::TempDir;
use tokio::{
    io::AsyncWriteExt as _,
    net::UnixStream,
    sync::{mpsc, watch as channel},
    task::AbortHandle,
    time::timeout,
};
use ttrpc::{
    Code,
    asynchronous::{Server, ServerStreamSender, Service, TtrpcContext, transport::Listener},
    get_status,
};

use super::*;
use crate::machine::size::Plan;
use crate::pod::{
    ending::kill,
    events::Item,
    lifecycle::{delete, start},
    process::Phase,
};

/// A limit that a test never reaches unless something hangs.
const NEVER: Duration = Duration::from_secs(60);
/// The pod's limit for a container to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_millis(300);

/// What the agent of a test does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// What it is asked.
    Obeys,
    /// Cannot execute the program.
    RefusesStarts,
    /// Answers a kill, and the process does not end.
    KeepsProcesses,
    /// Answers a kill; the process ends, but its output holds the news back.
    HoldsEndsBack,
    /// Answers nothing.
    Silent,
}

#[derive(Debug)]
struct Guest {
    manner: Manner,
    exit: channel::Sender<Option<u32>>,
}

impl Guest {
    async fn answers(&self) {
        if self.manner == Manner::Silent {
            std::future::pending::<()>().await;
        }
    }

    async fn ended(&self) -> WaitResponse {
        let mut exit = self.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        WaitResponse {
            exit_status: status,
            ..Default::default()
        }
    }
}

#[async_trait]
impl AgentService for Guest {
    async fn start_process(
        &self,
        _: &TtrpcContext,
        _: ProcessRequest,
    ) -> ttrpc::Result<StartResponse> {
        self.answers().await;
        if self.manner == Manner::RefusesStarts {
            self.exit.send_replace(Some(127));
            let status = get_status(Code::INVALID_ARGUMENT, "cannot execute");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        Ok(StartResponse::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        _: ProcessRequest,
    ) -> ttrpc::Result<WaitResponse> {
        Ok(self.ended().await)
    }

    async fn signal_process(&self, _: &TtrpcContext, _: SignalRequest) -> ttrpc::Result<Empty> {
        self.answers().await;
        if self.manner == Manner::Obeys {
            self.exit.send_replace(Some(137));
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        self.answers().await;
        let mut response = PidsResponse::new();
        if self.manner == Manner::KeepsProcesses {
            response.processes.push(ProcessInfo::new());
        }
        Ok(response)
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        _: ProcessRequest,
    ) -> ttrpc::Result<WaitResponse> {
        self.answers().await;
        self.exit
            .send_if_modified(|exit| exit.is_none() && exit.replace(137).is_none());
        Ok(self.ended().await)
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        _: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        std::future::pending().await
    }
}

/// A pod without a VM, and everything that is at its other ends.
struct World {
    pod: Arc<Pod>,
    container: Arc<Container>,
    events: mpsc::Receiver<Item>,
    connection: AbortHandle,
    _guest: Server,
    _dir: TempDir,
}

/// Serves `service` to the one connection whose other end is the answer.
async fn serve(service: HashMap<String, Service>) -> (UnixStream, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connections = stream::iter([std::io::Result::Ok(theirs)]).chain(stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(service);
    server.start().await.unwrap();
    (ours, server)
}

async fn agent(manner: Manner) -> (Agent, Server, AbortHandle) {
    let service = create_agent(Arc::new(Guest {
        manner,
        exit: channel::Sender::new(None),
    }));
    let (connection, server) = serve(service).await;
    // The first word comes before ttrpc: a pipe in front of the server.
    let (ours, mut front) = UnixStream::pair().unwrap();
    let hello = Hello {
        protocol_major: GUEST_PROTOCOL_MAJOR,
        ..Default::default()
    };
    let bytes = hello.write_to_bytes().unwrap();
    let size = u32::try_from(bytes.len()).unwrap();
    front.write_u32_le(size).await.unwrap();
    front.write_all(&bytes).await.unwrap();
    let copying = tokio::spawn(async move {
        let mut connection = connection;
        let _ = tokio::io::copy_bidirectional(&mut front, &mut connection).await;
    });
    let greeted = Agent::greet(ours, "/nowhere".into(), NEVER, NEVER).await;
    (greeted.unwrap().0, server, copying.abort_handle())
}

/// A process that holds the VMM's end of the control socket, as the VMM does.
fn vmm() -> (Machine, Watched) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    let process = Watched::spawn_program(command, vec![(theirs.as_raw_fd(), 3)]).unwrap();
    (Machine::new(ours, NEVER).unwrap(), process)
}

async fn world(manner: Manner) -> World {
    let dir = tempfile::tempdir().unwrap();
    let (publisher, events) = Publisher::new("k8s.io".to_owned());
    let (agent, guest, connection) = agent(manner).await;
    let (machine, vmm) = vmm();
    let settings = Config::default().settings;
    let host = HostCapacity {
        cpus: 2,
        memory_bytes: 1 << 30,
    };
    let plan = Plan::of(&settings, Demand::default(), host).unwrap();
    let size = boot::follow(&settings, plan, dir.path(), &machine, &agent);
    let pod = Arc::new(Pod {
        id: "pod".to_owned(),
        namespace: "k8s.io".to_owned(),
        state: dir.path().to_owned(),
        vmm,
        meter: None,
        placement: Placement::default(),
        size,
        shared: SharedDirectory::at(dir.path()),
        publisher,
        containers: Mutex::default(),
        ready_at: SystemTime::now(),
        by_sandbox_service: false,
        guest_seccomp: true,
        memory: MemoryVolumes::of("pod", &HashMap::new(), 1 << 30),
        placeholder: Placeholder::for_guest(None).unwrap(),
        network_namespace: None,
        passthrough: Arc::new(Passthrough::new(&machine, &agent, &[], 1 << 30, None)),
        disks: Disks::new(&machine, &agent, &settings.storage),
        machine,
        agent,
        kill_limit: KILL_LIMIT,
        exit: channel::Sender::new(None),
        next_stream: AtomicU64::new(1),
    });
    tokio::spawn(ending::watch_vm(Arc::clone(&pod)));
    tokio::spawn(agent_events::pass_on(Arc::clone(&pod)));
    let container = Container::made(&pod, "c");
    World {
        pod,
        container,
        events,
        connection,
        _guest: guest,
        _dir: dir,
    }
}

impl World {
    /// The next exit that containerd is told of.
    async fn exit(&mut self) -> TaskExit {
        loop {
            let item = timeout(NEVER, self.events.recv()).await.unwrap().unwrap();
            let Item::Event(envelope) = item else {
                continue;
            };
            if envelope.topic() == "/tasks/exit" {
                return TaskExit::parse_from_bytes(&envelope.event().value).unwrap();
            }
        }
    }

    async fn vmm_ends(&self) {
        timeout(NEVER, self.pod.vmm.ended()).await.unwrap();
    }

    fn vmm_lives(&self) -> bool {
        !self.pod.vmm.has_ended()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.pod.vmm.kill();
    }
}

#[tokio::test]
async fn a_container_that_cannot_start_is_stopped_told_and_deleted() {
    let mut world = world(Manner::RefusesStarts).await;
    let error = start(&world.pod, "c", "").await.unwrap_err();
    assert_eq!(error.to_string(), "cannot execute");
    assert!(matches!(world.container.init.phase(), Phase::Stopped(_)));
    assert_eq!(world.container.init.wait().await.unwrap().status, 127);
    let told = world.exit().await;
    assert_eq!((told.id.as_str(), told.exit_status), ("c", 127));
    // What containerd does next.
    let killed = kill(&world.pod, "c", "", 9, true).await.unwrap_err();
    assert!(killed.is_not_found());
    assert_eq!(delete(&world.pod, "c", "").await.unwrap().1.status, 127);
}

#[tokio::test]
async fn an_exec_that_cannot_start_ends_and_is_deleted() {
    let world = world(Manner::RefusesStarts).await;
    let exec = world.container.exec_made(&world.pod, "e");
    start(&world.pod, "c", "e").await.unwrap_err();
    assert_eq!(exec.wait().await.unwrap().status, 127);
    delete(&world.pod, "c", "e").await.unwrap();
    assert!(world.container.process("e").is_err());
}

#[tokio::test]
async fn a_container_that_was_never_started_ends_by_a_kill() {
    let mut world = world(Manner::Obeys).await;
    kill(&world.pod, "c", "", 9, true).await.unwrap();
    assert_eq!(world.exit().await.exit_status, 137);
    delete(&world.pod, "c", "").await.unwrap();
    assert!(world.vmm_lives());
}

#[tokio::test]
async fn who_waits_for_a_container_that_is_deleted_before_its_start_hears_of_it() {
    let mut world = world(Manner::Obeys).await;
    let init = Arc::clone(&world.container.init);
    delete(&world.pod, "c", "").await.unwrap();
    assert_eq!(init.wait().await.unwrap().status, 137);
    assert_eq!(world.exit().await.exit_status, 137);
}

#[tokio::test]
async fn an_exec_that_was_never_started_is_not_killed_but_deleted() {
    let world = world(Manner::Obeys).await;
    let _exec = world.container.exec_made(&world.pod, "e");
    let error = kill(&world.pod, "c", "e", 9, false).await.unwrap_err();
    assert!(matches!(error, CallError::WrongState(_)), "{error:?}");
    delete(&world.pod, "c", "e").await.unwrap();
}

#[tokio::test]
async fn a_broken_connection_of_the_agent_ends_the_vm() {
    let mut world = world(Manner::Obeys).await;
    start(&world.pod, "c", "").await.unwrap();
    world.connection.abort();
    assert_eq!(world.exit().await.exit_status, 137);
    world.vmm_ends().await;
    assert_eq!(world.pod.exit().map(|exit| exit.status), Some(137));
    delete(&world.pod, "c", "").await.unwrap();
}

#[tokio::test]
async fn what_survives_sigkill_takes_its_vm_along() {
    for manner in [Manner::KeepsProcesses, Manner::Silent] {
        let mut world = world(manner).await;
        let init = &world.container.init;
        init.begin_start().unwrap();
        init.end_start(true);
        let begun = Instant::now();
        kill(&world.pod, "c", "", 9, false).await.unwrap();
        assert_eq!(world.exit().await.exit_status, 137, "{manner:?}");
        assert!(begun.elapsed() >= KILL_LIMIT);
        world.vmm_ends().await;
        // Nothing waits for a deadline any more.
        timeout(KILL_LIMIT, delete(&world.pod, "c", ""))
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test]
async fn output_that_nobody_reads_does_not_cost_the_vm() {
    let mut world = world(Manner::HoldsEndsBack).await;
    start(&world.pod, "c", "").await.unwrap();
    kill(&world.pod, "c", "", 9, false).await.unwrap();
    assert_eq!(world.exit().await.exit_status, 137);
    assert!(world.vmm_lives());
}

#[tokio::test]
async fn other_signals_and_execs_have_no_such_limit() {
    let world = world(Manner::KeepsProcesses).await;
    start(&world.pod, "c", "").await.unwrap();
    kill(&world.pod, "c", "", 15, false).await.unwrap();
    let waited = timeout(2 * KILL_LIMIT, world.container.init.wait()).await;
    assert!(waited.is_err() && world.vmm_lives());
}

#[tokio::test]
async fn a_sandbox_without_a_container_of_its_own_has_a_pid() {
    let world = world(Manner::Obeys).await;
    assert_eq!(world.pod.pid_of("pod"), world.pod.pid());
    assert_eq!(world.pod.pid_of("c"), world.container.init.pid);
    assert_eq!(world.pod.pid_of("unknown"), 0);
}

#[tokio::test]
async fn a_boot_is_given_up_when_the_sandbox_shall_end() {
    let request = Request {
        id: "never-boots".to_owned(),
        ..Request::default()
    };
    let (publisher, _events) = Publisher::new("k8s.io".to_owned());
    let error = Pod::boot(request, publisher, std::future::ready(()))
        .await
        .unwrap_err();
    assert!(error.is_gone(), "{error:?}");
}

#[tokio::test]
async fn a_stopped_vmm_is_ended_within_seconds() {
    let mut world = world(Manner::Obeys).await;
    send_signal(Pid::from_raw(world.pod.vmm.pid), Signal::SIGSTOP).unwrap();
    timeout(Duration::from_secs(8), world.pod.stop())
        .await
        .unwrap();
    assert!(!world.vmm_lives());
    assert_eq!(world.exit().await.exit_status, 137);
}
