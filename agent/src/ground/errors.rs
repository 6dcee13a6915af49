//! Every error of the agent as an answer to a request: one table of gRPC codes.
//!
//! | code | meaning |
//! |---|---|
//! | `NOT_FOUND` | no such container, process, device |
//! | `ALREADY_EXISTS` | a second create |
//! | `INVALID_ARGUMENT` | the request is wrong; the text begins with the field |
//! | `FAILED_PRECONDITION` | not in this state |
//! | `RESOURCE_EXHAUSTED` | a bound of `protocol/src/limits.rs` |
//! | `INTERNAL` | the guest's kernel refused, or the agent is at fault |

use std::io;

use ttrpc::Code;

use crate::{
    container::ContainerError,
    drivers::DriversError,
    ground::log,
    machine::devices::DeviceError,
    network::NetworkError,
    pod::table::TableError,
    processes::{stdio::StdioError, streams::StreamError},
    storage::StorageError,
};

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RpcError {
    /// A name is taken, unknown or busy.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The container builder.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The image of drivers.
    #[error(transparent)]
    Drivers(#[from] DriversError),
    /// Streams of a process.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// The request is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Of the request.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Not possible in this state.
    #[error("{object}: {reason}")]
    State {
        /// What the request is about.
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
        /// What was tried.
        action: String,
        /// Its answer.
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

    fn code(&self) -> Code {
        match self {
            Self::Table(TableError::Exists { .. }) => Code::ALREADY_EXISTS,
            Self::Table(TableError::Unknown { .. })
            | Self::Device(DeviceError::Unknown(_))
            | Self::Ended(_) => Code::NOT_FOUND,
            Self::Table(TableError::Full { .. })
            | Self::Stdio(StdioError::Stream(StreamError::Full)) => Code::RESOURCE_EXHAUSTED,
            Self::Table(TableError::Busy { .. })
            | Self::State { .. }
            | Self::Container(ContainerError::WrongState { .. })
            | Self::Device(DeviceError::Missing { .. }) => Code::FAILED_PRECONDITION,
            Self::Invalid { .. }
            | Self::Container(
                ContainerError::InvalidSpec { .. }
                | ContainerError::ExecutableNotFound { .. }
                | ContainerError::ExecutableRefused { .. },
            )
            | Self::Storage(
                StorageError::Invalid { .. } | StorageError::Device(DeviceError::Address { .. }),
            )
            | Self::Network(NetworkError::Invalid { .. })
            | Self::Device(DeviceError::Address { .. })
            | Self::Stdio(
                StdioError::TerminalStderr | StdioError::Stream(StreamError::Unknown { .. }),
            ) => Code::INVALID_ARGUMENT,
            Self::Storage(StorageError::Device(DeviceError::Missing { .. }))
            | Self::Network(NetworkError::NoInterface(_))
            | Self::Drivers(_) => Code::FAILED_PRECONDITION,
            Self::Container(_)
            | Self::Storage(_)
            | Self::Network(_)
            | Self::Device(_)
            | Self::Stdio(_)
            | Self::Kernel { .. }
            | Self::Crashed => Code::INTERNAL,
        }
    }
}

impl From<RpcError> for ttrpc::Error {
    fn from(error: RpcError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), log::chain(&error)))
    }
}
