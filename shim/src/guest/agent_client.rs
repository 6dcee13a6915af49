//! The agent in the guest, as the shim sees it: the first word, calls with deadlines, and streams.
//!
//! Everything that arrives here comes from a guest that may be hostile: frames are bounded before
//! they are read, ids are the shim's own, and no answer is awaited without a deadline, except the
//! end of a process, which the death of the VM ends.

use std::{io, path::PathBuf, time::Duration};

use pericarp_protocol::{
    GUEST_PROTOCOL_MAJOR, STREAM_PORT, guest::Hello, guest_ttrpc::AgentClient,
    limits::HELLO_BYTES_MAX, stream::Header,
};
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
    time::timeout,
};
use ttrpc::{
    Code, Error as TtrpcError,
    asynchronous::{Client, transport::Socket},
    context::Context,
};

use crate::errors::CallError;

/// Longest line that the VMM or the agent answers to a stream's opening.
const ANSWER_BYTES_MAX: usize = 256;

/// How much later ttrpc's own deadline is than ours, so that ours always comes first.
const CLIENT_DEADLINE_DELAY: Duration = Duration::from_secs(1);

/// Connection to a living agent.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    vsock: PathBuf,
    call_limit: Duration,
    /// The VM is over: no call is waited for any more.
    hung_up: watch::Sender<bool>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}

/// Makes one call with the agent's deadline and maps its error:
/// `agent_call!(pod.agent, start_process, &request)`.
macro_rules! agent_call {
    ($agent:expr, $method:ident, $request:expr) => {{
        let agent = &$agent;
        agent
            .answered(
                stringify!($method),
                agent.client().$method(agent.context(), $request),
            )
            .await
    }};
}
pub(crate) use agent_call;

impl Agent {
    /// Waits for the agent's first word on `connection`, which the guest dialled.
    pub(crate) async fn greet(
        mut connection: UnixStream,
        vsock: PathBuf,
        ready_limit: Duration,
        call_limit: Duration,
    ) -> Result<(Self, Hello), CallError> {
        let hello = timeout(ready_limit, read_hello(&mut connection))
            .await
            .map_err(|_| CallError::Deadline {
                peer: "the guest's agent",
                call: "hello",
                limit: ready_limit,
            })??;
        let client = AgentClient::new(Client::new(Socket::new(connection)));
        Ok((
            Self {
                client,
                vsock,
                call_limit,
                hung_up: watch::Sender::new(false),
            },
            hello,
        ))
    }

    /// The generated client; use it through [`agent_call`].
    pub(crate) fn client(&self) -> &AgentClient {
        &self.client
    }

    /// The same agent, whose calls may take `more` time.
    pub(crate) fn with_more_time(&self, more: Duration) -> Self {
        Self {
            call_limit: self.call_limit + more,
            ..self.clone()
        }
    }

    /// The same agent, whose calls may take `limit`.
    pub(crate) fn within(&self, limit: Duration) -> Self {
        Self {
            call_limit: limit,
            ..self.clone()
        }
    }

    /// Fails every call, those in flight too: the VM is over.
    pub(crate) fn hang_up(&self) {
        self.hung_up.send_replace(true);
    }

    /// A context whose deadline is later than the one of [`Self::answered`].
    pub(crate) fn context(&self) -> Context {
        ttrpc::context::with_duration(self.call_limit + CLIENT_DEADLINE_DELAY)
    }

    /// Waits for the answer of a call, at most until the deadline.
    ///
    /// ttrpc reports its own deadline with the same error variant as a broken connection, so the
    /// deadline is kept here: a slow agent must never be taken for a dead one.
    pub(crate) async fn answered<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, CallError> {
        let mut hung_up = self.hung_up.subscribe();
        tokio::select! {
            biased;
            _ = hung_up.wait_for(|hung_up| *hung_up) => {
                Err(CallError::Gone(format!("the VM has been ended ({call})")))
            }
            answered = timeout(self.call_limit, answer) => match answered {
                Ok(answered) => answered.map_err(|error| self.failure(call, error)),
                Err(_) => Err(self.deadline(call)),
            },
        }
    }

    fn deadline(&self, call: &'static str) -> CallError {
        CallError::Deadline {
            peer: "the guest's agent",
            call,
            limit: self.call_limit,
        }
    }

    /// What a failed call means to containerd.
    pub(crate) fn failure(&self, call: &'static str, error: TtrpcError) -> CallError {
        match error {
            TtrpcError::RpcStatus(status) => match status.code() {
                Code::DEADLINE_EXCEEDED => self.deadline(call),
                code => CallError::Agent(code, status.message().to_owned()),
            },
            error => CallError::Gone(format!("the guest's agent is gone ({call}: {error})")),
        }
    }

    /// Opens a stream to the guest for `header`.
    pub(crate) async fn open_stream(&self, header: &Header) -> Result<UnixStream, CallError> {
        timeout(self.call_limit, dial(&self.vsock, header))
            .await
            .map_err(|_| CallError::Deadline {
                peer: "the guest",
                call: "stream",
                limit: self.call_limit,
            })?
            .map_err(|error| {
                CallError::Gone(format!(
                    "stream to the guest for '{}': {error}",
                    header.to_string().trim_end()
                ))
            })
    }
}

async fn read_hello(connection: &mut UnixStream) -> Result<Hello, CallError> {
    let gone = |error: io::Error| {
        CallError::Gone(format!("the guest ended before its agent spoke: {error}"))
    };
    let size = connection.read_u32_le().await.map_err(gone)? as usize;
    if size > HELLO_BYTES_MAX {
        return Err(CallError::Gone(format!(
            "the agent's hello of {size} bytes is above {HELLO_BYTES_MAX}"
        )));
    }
    let mut bytes = vec![0; size];
    connection.read_exact(&mut bytes).await.map_err(gone)?;
    let hello = Hello::parse_from_bytes(&bytes)
        .map_err(|error| CallError::Gone(format!("the agent's hello cannot be read: {error}")))?;
    if hello.protocol_major != GUEST_PROTOCOL_MAJOR {
        return Err(CallError::Gone(format!(
            "the guest image speaks protocol {}, this shim {GUEST_PROTOCOL_MAJOR}: install \
                matching versions of both",
            hello.protocol_major
        )));
    }
    Ok(hello)
}

async fn dial(vsock: &PathBuf, header: &Header) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock).await?;
    stream
        .write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes())
        .await?;
    let answer = read_line(&mut stream).await?;
    if !answer.starts_with("OK ") {
        return Err(io::Error::other(format!("the VMM answered {answer:?}")));
    }
    stream.write_all(header.to_string().as_bytes()).await?;
    let answer = read_line(&mut stream).await?;
    if answer != "ok" {
        return Err(io::Error::other(format!("the agent answered {answer:?}")));
    }
    Ok(stream)
}

/// Reads byte by byte, because what follows the newline belongs to the stream.
async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            byte if line.len() < ANSWER_BYTES_MAX => line.push(byte),
            _ => return Err(io::Error::other("the answer has no end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use pericarp_protocol::guest::StatsRequest;

    use super::*;

    fn frame(hello: &Hello) -> Vec<u8> {
        let bytes = hello.write_to_bytes().unwrap();
        let mut frame = u32::try_from(bytes.len()).unwrap().to_le_bytes().to_vec();
        frame.extend(bytes);
        frame
    }

    #[tokio::test]
    async fn hello_of_another_version_or_size_is_refused() {
        let cases = [
            (
                frame(&Hello {
                    protocol_major: 99,
                    ..Hello::default()
                }),
                "protocol 99",
            ),
            (u32::MAX.to_le_bytes().to_vec(), "above"),
            (vec![1, 0], "ended before"),
        ];
        for (bytes, text) in cases {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            guest.write_all(&bytes).await.unwrap();
            drop(guest);
            let limit = Duration::from_secs(5);
            let error = Agent::greet(ours, "/v".into(), limit, limit)
                .await
                .unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[tokio::test]
    async fn silent_guest_is_given_up() {
        let (ours, _guest) = UnixStream::pair().unwrap();
        let limit = Duration::from_millis(10);
        let error = Agent::greet(ours, "/v".into(), limit, limit)
            .await
            .unwrap_err();
        assert!(matches!(error, CallError::Deadline { .. }));
    }

    /// An agent that said hello and never answers a call, and its end of the connection.
    async fn silent_agent(limit: Duration) -> (Agent, UnixStream) {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let hello = Hello {
            protocol_major: GUEST_PROTOCOL_MAJOR,
            ..Hello::default()
        };
        guest.write_all(&frame(&hello)).await.unwrap();
        let greeted = Agent::greet(ours, "/v".into(), Duration::from_secs(5), limit).await;
        (greeted.unwrap().0, guest)
    }

    #[tokio::test]
    async fn a_slow_agent_is_not_taken_for_a_dead_one() {
        let (agent, _guest) = silent_agent(Duration::from_millis(20)).await;
        let request = StatsRequest::new();
        let error = agent_call!(agent, stats, &request).unwrap_err();
        assert!(error.is_deadline(), "{error:?}");
    }

    #[tokio::test]
    async fn a_closed_connection_is_a_dead_agent_at_once() {
        let (agent, guest) = silent_agent(Duration::from_secs(60)).await;
        drop(guest);
        let request = StatsRequest::new();
        let error = agent_call!(agent, stats, &request).unwrap_err();
        assert!(matches!(error, CallError::Gone(_)), "{error:?}");
    }
}
