//! Containers and their processes as the host drives them, against the real agent.

#![expect(clippy::unwrap_used, reason = "a test stops where it fails")]

mod common;

use common::{Guest, deadline, process, refusal};
use pericarp_protocol::guest::{
    ContainerRequest, CreateContainerRequest, Empty, ExecRequest, ResizeTerminalRequest, Streams,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;

#[tokio::test]
async fn a_container_runs_from_creation_to_deletion() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let spec = guest.spec(&["sh", "-c", "echo out; echo err >&2; hostname; exit 7"]);
    let (output, errors, status) = guest.run("c", &spec).await.unwrap();
    assert_eq!(
        (output.as_str(), errors.as_str(), status),
        ("out\npod\n", "err\n", 7)
    );
    // The name is free again.
    assert_eq!(guest.run("c", &spec).await.unwrap().2, 7);
    for result in [
        guest.start_process("c", "").await.map(|_| ()),
        guest.wait("c", "").await.map(|_| ()),
        guest.delete("c", "").await.map(|_| ()),
    ] {
        assert_eq!(refusal(result).0, Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn what_the_agents_starter_ignores_is_not_ignored_in_containers() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.agent_pid())).unwrap();
    // SIGPIPE alone, which Rust's runtime ignores.
    assert!(status.contains("SigIgn:\t0000000000001000\n"), "{status}");
    let spec = guest.spec(&["grep", "^Sig[BIC]", "/proc/self/status"]);
    let (output, ..) = guest.run("c", &spec).await.unwrap();
    let none = "0000000000000000";
    assert_eq!(
        output,
        format!("SigBlk:\t{none}\nSigIgn:\t{none}\nSigCgt:\t{none}\n")
    );
}

#[tokio::test]
async fn a_broken_connection_is_made_anew_as_long_as_the_host_answers() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let spec = guest.spec(&["sleep", "1000"]);
    guest.create("c", &spec, Streams::default()).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    let guest = guest.reconnect().await;
    assert_eq!(guest.hello.agent_version, env!("CARGO_PKG_VERSION"));
    // What there was goes on.
    assert_eq!(
        refusal(guest.start_process("c", "").await).0,
        Code::FAILED_PRECONDITION
    );
    let guest = guest.reconnect().await;
    guest.kill("c").await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 137);
    assert_eq!(guest.hang_up(), Some(0));
}

#[tokio::test]
async fn states_and_names_are_guarded() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let spec = guest.spec(&["sleep", "1000"]);
    guest.create("c", &spec, Streams::default()).await.unwrap();
    assert_eq!(
        refusal(guest.create("c", &spec, Streams::default()).await).0,
        Code::ALREADY_EXISTS
    );
    guest.start_process("c", "").await.unwrap();
    assert_eq!(
        refusal(guest.start_process("c", "").await).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        refusal(guest.delete("c", "").await).0,
        Code::FAILED_PRECONDITION
    );
    guest.kill("c").await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 137);
    assert_eq!(refusal(guest.kill("c").await).0, Code::NOT_FOUND);
    guest.delete("c", "").await.unwrap();

    // Never started: it is ended by its deletion.
    guest.create("d", &spec, Streams::default()).await.unwrap();
    assert_eq!(guest.delete("d", "").await.unwrap().exit_status, 137);

    for (id, spec, field) in [
        ("", spec.clone(), "container_id"),
        ("../x", spec.clone(), "container_id"),
        ("e", json!(7), "oci_spec"),
    ] {
        let (code, text) = refusal(guest.create(id, &spec, Streams::default()).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.starts_with(field), "{text}");
    }
    let streams = Streams {
        stdout: 999_999,
        ..Default::default()
    };
    let (code, text) = refusal(guest.create("e", &spec, streams).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.contains("streams.stdout") && text.contains("999999"),
        "{text}"
    );
}

#[tokio::test]
async fn stdin_is_closed_by_its_end_and_by_request() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    for by_request in [false, true] {
        let (mut into, mut out) = guest.start_piped("c", &guest.spec(&["cat"])).await;
        into.write_all(b"some words").await.unwrap();
        if by_request {
            // What was sent before must not be lost.
            let mut echoed = [0; 10];
            out.read_exact(&mut echoed).await.unwrap();
            guest
                .client
                .close_stdin(deadline(), &process("c", ""))
                .await
                .unwrap();
        } else {
            into.shutdown().await.unwrap();
            let mut echoed = String::new();
            out.read_to_string(&mut echoed).await.unwrap();
            assert_eq!(echoed, "some words");
        }
        assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
        guest.delete("c", "").await.unwrap();
    }
}

#[tokio::test]
async fn much_goes_through_and_comes_back() {
    const BYTES: usize = 64 << 20;
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let (into, mut out) = guest.start_piped("c", &guest.spec(&["cat"])).await;
    let writer = tokio::spawn(async move {
        let mut into = into;
        let mut block = vec![0u8; 1 << 20];
        for number in 0..BYTES >> 20 {
            block[..8].copy_from_slice(&number.to_le_bytes());
            into.write_all(&block).await.unwrap();
        }
        into.shutdown().await.unwrap();
    });
    let mut block = vec![0u8; 1 << 20];
    for number in 0..BYTES >> 20 {
        out.read_exact(&mut block).await.unwrap();
        assert_eq!(block[..8], number.to_le_bytes());
        assert!(block[8..].iter().all(|byte| *byte == 0));
    }
    assert_eq!(out.read(&mut block).await.unwrap(), 0);
    writer.await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn output_is_delivered_before_the_exit_is_told() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let (stdout, mut out) = guest.stream().await;
    let streams = Streams {
        stdout,
        ..Default::default()
    };
    let spec = guest.spec(&["sh", "-c", "dd if=/dev/zero bs=1024 count=1024 2>/dev/null"]);
    guest.create("c", &spec, streams).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    let waiting = guest.wait("c", "");
    let mut waiting = std::pin::pin!(waiting);
    let mut total = 0;
    let mut block = vec![0u8; 4096];
    loop {
        tokio::select! {
            biased;
            length = out.read(&mut block) => {
                let length = length.unwrap();
                if length == 0 {
                    break;
                }
                total += length;
            }
            // What the socket holds is delivered; more than that was not written yet.
            _ = &mut waiting => assert!(total + (512 << 10) >= 1 << 20, "told after {total} bytes"),
        }
    }
    assert_eq!(total, 1 << 20);
}

#[tokio::test]
async fn a_daemon_left_behind_does_not_hold_the_exit_back() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    guest
        .create("c", &guest.spec(&["sleep", "1000"]), Streams::default())
        .await
        .unwrap();
    guest.start_process("c", "").await.unwrap();
    let (stdout, mut out) = guest.stream().await;
    exec(
        &guest,
        "e",
        json!(["sh", "-c", "sleep 500 & echo said"]),
        Streams {
            stdout,
            ..Default::default()
        },
    )
    .await
    .unwrap();
    guest.start_process("c", "e").await.unwrap();
    assert_eq!(guest.wait("c", "e").await.unwrap().exit_status, 0);
    let mut said = [0; 5];
    out.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"said\n");
    let pids = ContainerRequest {
        container_id: "c".to_owned(),
        ..Default::default()
    };
    let pids = guest
        .client
        .pids(deadline(), &pids)
        .await
        .unwrap()
        .processes;
    assert_eq!(pids.len(), 2, "{pids:?}");
    guest.delete("c", "e").await.unwrap();
}

async fn exec(guest: &Guest, id: &str, args: Value, streams: Streams) -> ttrpc::Result<Empty> {
    let process = json!({
        "user": { "uid": 0, "gid": 0 }, "args": args, "env": ["PATH=/bin"], "cwd": "/",
    });
    let request = ExecRequest {
        container_id: "c".to_owned(),
        exec_id: id.to_owned(),
        oci_process: serde_json::to_vec(&process).unwrap(),
        streams: Some(streams).into(),
        ..Default::default()
    };
    guest.client.exec(deadline(), &request).await
}

#[tokio::test]
async fn a_terminal_has_a_size_and_one_stream() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let mut spec = guest.spec(&[
        "sh",
        "-c",
        "stty size; read line; echo got $line; stty size",
    ]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({ "width": 90, "height": 30 });
    let (terminal, mut stream) = guest.stream().await;
    let streams = Streams {
        stdin: terminal,
        stdout: terminal,
        ..Default::default()
    };
    guest.create("c", &spec, streams).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    let mut first = [0; 7];
    stream.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"30 90\r\n");
    let size = |width| ResizeTerminalRequest {
        container_id: "c".to_owned(),
        width,
        height: 40,
        ..Default::default()
    };
    guest
        .client
        .resize_terminal(deadline(), &size(100))
        .await
        .unwrap();
    let (code, text) = refusal(guest.client.resize_terminal(deadline(), &size(70000)).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.starts_with("width"), "{text}");
    stream.write_all(b"word\n").await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "word\r\ngot word\r\n40 100\r\n");
    assert_eq!(guest.wait("c", "").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_told_as_runc_does() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let result = guest.run("c", &guest.spec(&["no-such-program"])).await;
    let (code, text) = refusal(result);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.contains("executable file not found in $PATH"),
        "{text}"
    );
}

#[tokio::test]
async fn many_containers_leave_nothing_behind() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let spec = guest.spec(&["true"]);
    let measure = async || {
        guest
            .client
            .diagnostics(deadline(), &Empty::new())
            .await
            .unwrap()
    };
    for number in 0..20 {
        guest.run(&format!("warm{number}"), &spec).await.unwrap();
    }
    let before = measure().await;
    for number in 0..40 {
        assert_eq!(guest.run(&format!("c{number}"), &spec).await.unwrap().2, 0);
    }
    let after = measure().await;
    assert_eq!(before.agent_open_descriptors, after.agent_open_descriptors);
    assert_eq!(before.mounts, after.mounts);
    assert_eq!(before.cgroups, after.cgroups);
    assert!(
        after.agent_rss_bytes <= before.agent_rss_bytes + (1 << 20),
        "{} -> {}",
        before.agent_rss_bytes,
        after.agent_rss_bytes
    );
}

#[tokio::test]
async fn the_host_learns_that_stdin_is_closed() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let (stdin, mut into) = guest.stream().await;
    let streams = Streams {
        stdin,
        ..Default::default()
    };
    let spec = guest.spec(&["sh", "-c", "read line; exec <&-; sleep 1000"]);
    guest.create("c", &spec, streams).await.unwrap();
    guest.start_process("c", "").await.unwrap();
    // While the process may read, nothing says otherwise.
    let mut byte = [0];
    let early = tokio::time::timeout(std::time::Duration::from_millis(200), into.read(&mut byte));
    assert!(early.await.is_err());
    into.write_all(b"line\n").await.unwrap();
    assert_eq!(into.read(&mut byte).await.unwrap(), 0);
}

#[tokio::test]
async fn containers_share_a_pid_namespace_when_the_pod_does() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let create = async |id: &str, args: &[&str], streams: Streams| {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            oci_spec: serde_json::to_vec(&guest.spec(args)).unwrap(),
            streams: Some(streams).into(),
            sandbox_pid_namespace: true,
            ..Default::default()
        };
        guest
            .client
            .create_container(deadline(), &request)
            .await
            .unwrap();
        guest.start_process(id, "").await.unwrap();
    };
    create(
        "a",
        &["sh", "-c", "sleep 1000 & sleep 2000"],
        Streams::default(),
    )
    .await;
    let (stdout, mut out) = guest.stream().await;
    let look = "until pidof sleep >/dev/null; do :; done; cat /proc/1/comm; \
                ls /proc/1/root/ 2>&1; grep CapPrm /proc/1/status; ps -o comm,args";
    create(
        "b",
        &["sh", "-c", look],
        Streams {
            stdout,
            ..Default::default()
        },
    )
    .await;
    let mut seen = String::new();
    out.read_to_string(&mut seen).await.unwrap();
    assert!(seen.contains("CapPrm:\t0000000000000000"), "{seen}");
    assert!(seen.contains("sleep 2000"), "{seen}");
    assert_eq!(guest.wait("b", "").await.unwrap().exit_status, 0);
    guest.delete("b", "").await.unwrap();
    // What the first process leaves behind ends with it.
    guest.kill("a").await.unwrap();
    assert_eq!(guest.wait("a", "").await.unwrap().exit_status, 137);
    guest.delete("a", "").await.unwrap();
}

/// The name of the first process that a container sees, and whether it sees `program`.
async fn joins(guest: &Guest, request: CreateContainerRequest) -> ttrpc::Result<String> {
    let (stdout, mut out) = guest.stream().await;
    let look = "cat /proc/1/cmdline; until pidof sleep >/dev/null; do :; done";
    let request = CreateContainerRequest {
        container_id: "debug".to_owned(),
        oci_spec: serde_json::to_vec(&guest.spec(&["sh", "-c", look])).unwrap(),
        streams: Some(Streams {
            stdout,
            ..Default::default()
        })
        .into(),
        ..request
    };
    guest.client.create_container(deadline(), &request).await?;
    guest.start_process("debug", "").await?;
    let mut seen = String::new();
    out.read_to_string(&mut seen).await.unwrap();
    assert_eq!(guest.wait("debug", "").await?.exit_status, 0);
    guest.delete("debug", "").await?;
    Ok(seen)
}

#[tokio::test]
async fn a_container_joins_the_pid_namespace_of_another() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let of = |target: &str| CreateContainerRequest {
        pid_namespace_of: target.to_owned(),
        ..Default::default()
    };
    let (code, text) = refusal(joins(&guest, of("target")).await);
    assert_eq!(code, Code::NOT_FOUND, "{text}");

    let spec = guest.spec(&["sleep", "1000"]);
    guest
        .create("target", &spec, Streams::default())
        .await
        .unwrap();
    guest.start_process("target", "").await.unwrap();
    let seen = joins(&guest, of("target")).await.unwrap();
    assert_eq!(seen, "sleep\x001000\0");
    let both = CreateContainerRequest {
        sandbox_pid_namespace: true,
        ..of("target")
    };
    let (code, text) = refusal(joins(&guest, both).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.starts_with("pid_namespace_of: "), "{text}");

    // The debugging container was not the namespace's first, so the other one lives on.
    guest.kill("target").await.unwrap();
    assert_eq!(guest.wait("target", "").await.unwrap().exit_status, 137);
    let (code, text) = refusal(joins(&guest, of("target")).await);
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
}
