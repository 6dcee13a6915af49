//! `Exec`: one more process in a container.

use std::sync::Arc;

use containerd_shim_protos::{api::ExecProcessRequest, events::task::TaskExecAdded, topics};
use oci_spec::runtime::Process as OciProcess;
use pericarp_protocol::guest::ExecRequest;

use crate::{
    errors::CallError,
    guest::{agent_client::agent_call, spec},
    pod::{
        Pod,
        create::open_streams,
        ending::watch,
        process::Process,
        stdio::{Copying, HostEnds, Paths},
    },
};

/// `Exec`.
pub(crate) async fn exec(pod: &Arc<Pod>, request: &ExecProcessRequest) -> Result<(), CallError> {
    let container = pod.container(&request.id)?;
    if container.pause {
        return Err(CallError::Unimplemented("exec in the pod's own container"));
    }
    let mut process: OciProcess = serde_json::from_slice(&request.spec.value)
        .map_err(|error| CallError::Invalid(format!("spec: not an OCI process: {error}")))?;
    spec::translate_process_fields(&mut process);
    let paths = Paths {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let process_entry = Arc::new(Process::reserve(
        &request.id,
        &request.exec_id,
        container.init.pid,
        paths,
    ));
    {
        let mut execs = container.execs();
        if execs.contains_key(&request.exec_id) {
            return Err(CallError::AlreadyExists(process_entry.name.clone()));
        }
        execs.insert(request.exec_id.clone(), Arc::clone(&process_entry));
    }
    if let Err(error) = build_exec(pod, &process_entry, &process, request).await {
        container.execs().remove(&request.exec_id);
        process_entry.creation_failed();
        return Err(error);
    }
    let mut event = TaskExecAdded::new();
    event.container_id = request.id.clone();
    event.exec_id = request.exec_id.clone();
    pod.publisher
        .publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, event)
        .await;
    tokio::spawn(watch(Arc::clone(pod), container.id.clone(), process_entry));
    Ok(())
}

async fn build_exec(
    pod: &Arc<Pod>,
    entry: &Process,
    process: &OciProcess,
    request: &ExecProcessRequest,
) -> Result<(), CallError> {
    let ends = HostEnds::open(&entry.paths, &entry.exec_id, &pod.namespace)
        .await
        .map_err(|error| CallError::Invalid(error.to_string()))?;
    let opened = open_streams(pod, &ends).await?;
    let console = process.console_size();
    let exec = ExecRequest {
        container_id: request.id.clone(),
        exec_id: request.exec_id.clone(),
        oci_process: serde_json::to_vec(process)
            .map_err(|error| CallError::host("OCI process", error))?,
        streams: Some(opened.numbers).into(),
        terminal_width: console.map_or(0, |size| u32::try_from(size.width()).unwrap_or_default()),
        terminal_height: console.map_or(0, |size| u32::try_from(size.height()).unwrap_or_default()),
        ..Default::default()
    };
    agent_call!(pod.agent, exec, &exec)?;
    entry.created(Some(Copying::start(ends, opened.ends)));
    Ok(())
}
