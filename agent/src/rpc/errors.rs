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

use ttrpc::Code;

use crate::{
    container::ContainerError,
    drivers::DriversError,
    ground::errors::RpcError,
    machine::devices::DeviceError,
    network::NetworkError,
    pod::table::TableError,
    processes::{stdio::StdioError, streams::StreamError},
    storage::StorageError,
};

impl From<TableError> for RpcError {
    fn from(error: TableError) -> Self {
        let code = match &error {
            TableError::Exists { .. } => Code::ALREADY_EXISTS,
            TableError::Unknown { .. } => Code::NOT_FOUND,
            TableError::Full { .. } => Code::RESOURCE_EXHAUSTED,
            TableError::Busy { .. } => Code::FAILED_PRECONDITION,
        };
        Self::of(code, error)
    }
}

impl From<ContainerError> for RpcError {
    fn from(error: ContainerError) -> Self {
        let code = match &error {
            ContainerError::WrongState { .. } => Code::FAILED_PRECONDITION,
            ContainerError::InvalidSpec { .. }
            | ContainerError::ExecutableNotFound { .. }
            | ContainerError::ExecutableRefused { .. } => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        };
        Self::of(code, error)
    }
}

impl From<StorageError> for RpcError {
    fn from(error: StorageError) -> Self {
        let code = match &error {
            StorageError::Invalid { .. } | StorageError::Device(DeviceError::Address { .. }) => {
                Code::INVALID_ARGUMENT
            }
            StorageError::Device(DeviceError::Missing { .. }) => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        };
        Self::of(code, error)
    }
}

impl From<NetworkError> for RpcError {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::Invalid { .. } => Code::INVALID_ARGUMENT,
            NetworkError::NoInterface(_) => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        };
        Self::of(code, error)
    }
}

impl From<DeviceError> for RpcError {
    fn from(error: DeviceError) -> Self {
        let code = match &error {
            DeviceError::Unknown(_) => Code::NOT_FOUND,
            DeviceError::Missing { .. } => Code::FAILED_PRECONDITION,
            DeviceError::Address { .. } => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        };
        Self::of(code, error)
    }
}

impl From<DriversError> for RpcError {
    fn from(error: DriversError) -> Self {
        Self::of(Code::FAILED_PRECONDITION, error)
    }
}

impl From<StdioError> for RpcError {
    fn from(error: StdioError) -> Self {
        let code = match &error {
            StdioError::Stream(StreamError::Full) => Code::RESOURCE_EXHAUSTED,
            StdioError::TerminalStderr | StdioError::Stream(StreamError::Unknown { .. }) => {
                Code::INVALID_ARGUMENT
            }
            _ => Code::INTERNAL,
        };
        Self::of(code, error)
    }
}
