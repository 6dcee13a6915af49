//! One table from what went wrong to the gRPC code that containerd expects.
//!
//! containerd decides by the code (`errdefs`): `NotFound` makes a second delete succeed,
//! `FailedPrecondition` and `AlreadyExists` are the caller's order of calls, `Unavailable` is a
//! dead peer, `DeadlineExceeded` a slow one.

use std::{fmt::Display, time::Duration};

use ttrpc::{Code, Error as TtrpcError, get_status};

/// An error of a task or sandbox call.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum CallError {
    /// No such container, exec or sandbox.
    #[error("{0} not found")]
    NotFound(String),
    /// It exists already.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The request itself is wrong: names the field.
    #[error("{0}")]
    Invalid(String),
    /// Right request, wrong moment.
    #[error("{0}")]
    WrongState(String),
    /// What this runtime does not do.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// A peer is gone.
    #[error("{0}")]
    Gone(String),
    /// A peer did not answer in time.
    #[error("{peer} did not answer {call} within {limit:?}")]
    Deadline {
        peer: &'static str,
        call: &'static str,
        limit: Duration,
    },
    /// The agent refused; its own code goes through.
    #[error("{1}")]
    Agent(Code, String),
    /// The host failed: names the object and what to do.
    #[error("{0}")]
    Host(String),
}

impl CallError {
    /// A failure of the host at `object`.
    pub(crate) fn host(object: impl Display, error: impl Display) -> Self {
        Self::Host(format!("{object}: {error}"))
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::WrongState(_) => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Gone(_) => Code::UNAVAILABLE,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::Agent(code, _) => *code,
            Self::Host(_) => Code::INTERNAL,
        }
    }

    /// True when the peer let its time pass.
    pub(crate) fn is_deadline(&self) -> bool {
        matches!(self, Self::Deadline { .. })
    }

    /// True when the peer is gone.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Gone(_))
    }

    /// True when the object is not there (any more).
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Code::NOT_FOUND
    }

    /// True when what shall be made is there, whoever says so.
    pub(crate) fn is_already_there(&self) -> bool {
        self.code() == Code::ALREADY_EXISTS
    }
}

impl From<CallError> for TtrpcError {
    fn from(error: CallError) -> Self {
        Self::RpcStatus(get_status(error.code(), error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        let cases = [
            (
                CallError::NotFound("container x".into()),
                Code::NOT_FOUND,
                "container x not found",
            ),
            (
                CallError::AlreadyExists("container x".into()),
                Code::ALREADY_EXISTS,
                "container x already exists",
            ),
            (
                CallError::Unimplemented("checkpoint"),
                Code::UNIMPLEMENTED,
                "checkpoint is not implemented",
            ),
            (CallError::Gone("agent".into()), Code::UNAVAILABLE, "agent"),
        ];
        for (error, code, text) in cases {
            let TtrpcError::RpcStatus(status) = error.into() else {
                panic!("not a status")
            };
            assert_eq!((status.code(), status.message()), (code, text));
        }
    }

    #[test]
    fn the_guests_word_counts_as_ours() {
        let guests = |code| CallError::Agent(code, String::new());
        assert!(guests(Code::ALREADY_EXISTS).is_already_there());
        assert!(CallError::AlreadyExists(String::new()).is_already_there());
        assert!(!guests(Code::NOT_FOUND).is_already_there());
        assert!(guests(Code::NOT_FOUND).is_not_found());
    }
}
