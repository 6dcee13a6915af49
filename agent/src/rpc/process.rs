//! Processes of containers: exec, start, wait, signal, delete, terminal and stdin.

use std::sync::{Arc, Mutex, PoisonError};

use pericarp_protocol::guest::{
    Empty, ExecRequest, ProcessRequest, ResizeTerminalRequest, SignalRequest, StartResponse,
    WaitResponse,
};

use super::{
    check_id,
    container::{parse_json, with_container},
};
use crate::{
    container::{Container, ContainerError},
    ground::{errors::RpcError, log},
    pod::{Contained, ExecProcess, Pod, blocking, oom},
    processes::{Process, reaper::Exit, stdio::Prepared},
    storage,
};

/// The largest signal of Linux.
const SIGNAL_MAX: u32 = 64;

/// A process that a request names.
enum Named {
    Init(Arc<Contained>),
    Exec(Arc<Contained>, Arc<ExecProcess>),
}

impl Named {
    fn find(pod: &Pod, container_id: &str, exec_id: &str) -> Result<Self, RpcError> {
        let contained = pod.containers.get(container_id)?;
        if exec_id.is_empty() {
            return Ok(Self::Init(contained));
        }
        let executed = contained.execs.get(exec_id)?;
        Ok(Self::Exec(contained, executed))
    }

    fn contained(&self) -> &Arc<Contained> {
        match self {
            Self::Init(contained) | Self::Exec(contained, _) => contained,
        }
    }

    fn process(&self) -> &Process {
        match self {
            Self::Init(contained) => &contained.init,
            Self::Exec(_, exec) => &exec.process,
        }
    }
}

/// Prepares a further process.
pub(super) async fn exec(pod: Arc<Pod>, request: ExecRequest) -> Result<Empty, RpcError> {
    check_id("exec_id", &request.exec_id)?;
    let mut process: oci_spec::runtime::Process = parse_json("oci_process", &request.oci_process)?;
    let contained = pod.containers.get(&request.container_id)?;
    contained.additions.apply(&mut process);
    let place = contained.execs.reserve(&request.exec_id)?;
    let terminal = process.terminal() == Some(true);
    let console_size = (request.terminal_width != 0 && request.terminal_height != 0)
        .then_some((request.terminal_width, request.terminal_height));
    let (prepared, stdio) =
        Prepared::new(&pod.streams, request.streams.get_or_default(), terminal)?;
    let (reaper, exec_id) = (Arc::clone(&pod.reaper), request.exec_id);
    let (waiting, created, hold) = with_container(&contained, move |container| {
        let hold = reaper.hold();
        let (waiting, created) = container.exec(&exec_id, process, console_size, stdio)?;
        Ok((waiting, created, hold))
    })
    .await?;
    let exit = pod.reaper.register(created.pid);
    drop(hold);
    match prepared.run(created.terminal, &exit) {
        Ok(streams) => {
            let process = Process::new(created.pid, exit, streams);
            place.fill(Arc::new(ExecProcess {
                waiting: Mutex::new(Some(waiting)),
                process,
            }));
            Ok(Empty::new())
        }
        Err(error) => {
            // It waits for its start, so nothing of the user's has run.
            let _ = pod.reaper.signal(created.pid, libc::SIGKILL);
            Err(RpcError::kernel("attach the streams of an exec")(error))
        }
    }
}

/// Lets a process execute its program.
pub(super) async fn start(
    pod: Arc<Pod>,
    request: ProcessRequest,
) -> Result<StartResponse, RpcError> {
    let named = Arc::new(Named::find(&pod, &request.container_id, &request.exec_id)?);
    if named.process().exit().is_some() {
        return Err(RpcError::State {
            object: describe(&request),
            reason: "it has ended",
        });
    }
    if !named.process().begin_start() {
        return Err(RpcError::State {
            object: describe(&request),
            reason: "it was started already",
        });
    }
    let starting = Arc::clone(&named);
    let reaper = Arc::clone(&pod.reaper);
    let result = blocking(move || {
        // A hook that runs now is a child of the container's code.
        let _hold = reaper.hold();
        start_blocking(&starting)
    })
    .await?;
    if let Err(error) = result {
        if let Some(status) = error.exit_status() {
            named.process().start_failed(status.unsigned_abs());
        }
        return Err(error.into());
    }
    Ok(StartResponse {
        pid: named.process().pid.unsigned_abs(),
        ..Default::default()
    })
}

fn start_blocking(named: &Named) -> Result<(), ContainerError> {
    match named {
        Named::Init(contained) => {
            let mut guard = contained
                .container
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            guard.as_mut().map_or(Ok(()), Container::start)
        }
        Named::Exec(_, exec) => {
            let waiting = exec
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            waiting.map_or(Ok(()), |mut waiting| waiting.start())
        }
    }
}

/// Answers when a process has ended and its output was delivered.
pub(super) async fn wait(
    pod: &Arc<Pod>,
    request: &ProcessRequest,
) -> Result<WaitResponse, RpcError> {
    let named = Named::find(pod, &request.container_id, &request.exec_id)?;
    let exit = named.process().ended_and_delivered().await;
    Ok(response(named.contained(), exit))
}

fn response(contained: &Contained, exit: Exit) -> WaitResponse {
    WaitResponse {
        exit_status: exit.status,
        exited_at_ns: exit.at_ns,
        // A file of the cgroup file system is read without waiting for anything.
        oom_killed: oom::kills(&contained.cgroup) > 0,
        ..Default::default()
    }
}

/// Sends a signal to one process, or to all of a container.
pub(super) async fn signal(pod: Arc<Pod>, request: SignalRequest) -> Result<Empty, RpcError> {
    let number = i32::try_from(request.signal)
        .ok()
        .filter(|_| request.signal <= SIGNAL_MAX)
        .ok_or_else(|| RpcError::Invalid {
            field: "signal",
            reason: format!("{} is not a signal", request.signal),
        })?;
    let named = Named::find(&pod, &request.container_id, &request.exec_id)?;
    if request.all {
        with_container(named.contained(), move |container| {
            container.signal_all(number)
        })
        .await?;
        return Ok(Empty::new());
    }
    let process = named.process();
    process
        .signal(&pod.reaper, number)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => RpcError::Ended(format!("process {}", process.pid)),
            _ => RpcError::kernel(format!("signal process {}", process.pid))(error),
        })?;
    Ok(Empty::new())
}

/// Sets the size of a process's terminal.
pub(super) fn resize_terminal(
    pod: &Pod,
    request: &ResizeTerminalRequest,
) -> Result<Empty, RpcError> {
    let size = |field, value: u32| {
        u16::try_from(value).map_err(|_| RpcError::Invalid {
            field,
            reason: format!("{value} is more than {}", u16::MAX),
        })
    };
    let (width, height) = (
        size("width", request.width)?,
        size("height", request.height)?,
    );
    let named = Named::find(pod, &request.container_id, &request.exec_id)?;
    match named.process().streams().resize(width, height) {
        Some(result) => {
            result.map_err(RpcError::kernel("resize a terminal"))?;
            Ok(Empty::new())
        }
        None => Err(RpcError::State {
            object: format!("process {}", named.process().pid),
            reason: "it has no terminal",
        }),
    }
}

/// Closes a process's stdin after what has arrived for it.
pub(super) fn close_stdin(pod: &Pod, request: &ProcessRequest) -> Result<Empty, RpcError> {
    let named = Named::find(pod, &request.container_id, &request.exec_id)?;
    named.process().streams().close_stdin();
    Ok(Empty::new())
}

/// Removes an ended exec, or an ended or never started container.
pub(super) async fn delete(
    pod: Arc<Pod>,
    request: ProcessRequest,
) -> Result<WaitResponse, RpcError> {
    let named = Named::find(&pod, &request.container_id, &request.exec_id)?;
    let process = named.process();
    if process.exit().is_none() {
        if process.was_started() {
            return Err(RpcError::State {
                object: describe(&request),
                reason: "it runs",
            });
        }
        // It waits for a start that nobody will ask for.
        let _ = process.signal(&pod.reaper, libc::SIGKILL);
    }
    let exit = process.ended().await;
    let answer = response(named.contained(), exit);
    match named {
        Named::Exec(contained, _) => {
            let (exec, place) = contained.execs.begin_removal(&request.exec_id)?;
            drop((exec, place));
        }
        Named::Init(_) => delete_container(&pod, &request.container_id).await?,
    }
    Ok(answer)
}

async fn delete_container(pod: &Arc<Pod>, id: &str) -> Result<(), RpcError> {
    let (contained, place) = pod.containers.begin_removal(id)?;
    pod.oom.remove(id);
    let handle = Arc::clone(&contained);
    let reaper = Arc::clone(&pod.reaper);
    let result = blocking(move || {
        let _hold = reaper.hold();
        let container = handle
            .container
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let result = container.map_or(Ok(()), Container::delete);
        storage::detach_all(&handle.storages);
        result
    })
    .await?;
    // The builder's handle is used up either way, so the name goes; what stays behind is reported.
    drop(place);
    if let Err(error) = &result {
        log::warn(format_args!(
            "container {id} was not removed whole: {}",
            log::chain(error)
        ));
    }
    Ok(result?)
}

fn describe(request: &ProcessRequest) -> String {
    match request.exec_id.as_str() {
        "" => format!("container {:?}", request.container_id),
        exec => format!("exec {exec:?} of container {:?}", request.container_id),
    }
}
