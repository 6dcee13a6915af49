//! Errors as answers to requests.

use std::{error::Error, fmt, io};

use ttrpc::Code;

use super::log;

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RpcError {
    /// A part of the agent refuses.
    #[error(transparent)]
    Part(PartError),
    /// The request is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Of the request.
        field: &'static str,
        /// The reason.
        reason: String,
    },
    /// Not possible in this state.
    #[error("{object}: {reason}")]
    State {
        /// The object of the request.
        object: String,
        /// The state.
        reason: &'static str,
    },
    /// A process that has ended, or never was.
    #[error("{0} has ended")]
    Ended(String),
    /// The guest's kernel refused.
    #[error("cannot {action}")]
    Kernel {
        /// The action that failed.
        action: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A panic: a fault of the agent.
    #[error("the agent failed inside; the guest's console says where")]
    Crashed,
}

impl RpcError {
    /// A refusal by the kernel.
    pub(crate) fn kernel(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Kernel { action, source }
    }

    /// An error of a part of the agent that has errors of its own.
    pub(crate) fn of(code: Code, error: impl Error + Send + Sync + 'static) -> Self {
        Self::Part(PartError {
            code,
            error: Box::new(error),
        })
    }

    fn code(&self) -> Code {
        match self {
            Self::Part(error) => error.code,
            Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Ended(_) => Code::NOT_FOUND,
            Self::Kernel { .. } | Self::Crashed => Code::INTERNAL,
        }
    }
}

/// An error and the code that it is answered with.
#[derive(Debug)]
pub(crate) struct PartError {
    code: Code,
    error: Box<dyn Error + Send + Sync>,
}

impl fmt::Display for PartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Error for PartError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

impl From<RpcError> for ttrpc::Error {
    fn from(error: RpcError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), log::chain(&error)))
    }
}
