//! Why the machine did not do what was asked, and what the shim is told.

use std::io;

use pericarp_protocol::machine::{ErrorCode, Failure, FieldError, Reason};

use super::{
    devices::DeviceError, memory::MemoryError, passthrough::PassthroughError, saved::SavedError,
};
use crate::{arch, devices::virtio::device::CommandError};

/// Why the machine did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// A field of the request.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The machine does not fit the host's address space.
    #[error(transparent)]
    Layout(#[from] arch::layout::LayoutError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] arch::machine::KvmError),
    /// The CPU.
    #[error(transparent)]
    Cpuid(#[from] arch::cpu::CpuidError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] arch::boot::BootError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A passthrough device.
    #[error("Device.kind: {0}")]
    Passthrough(#[from] PassthroughError),
    /// A saved machine.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// A device did not obey.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// There is a device of that name.
    #[error("Device.name: {0:?} already exists")]
    Exists(String),
    /// There is a device of that kind, and there can be one.
    #[error("Device.kind: only one such device is allowed; {0:?} already exists")]
    Single(String),
    /// No device has that name.
    #[error("device: {0:?} does not exist")]
    NotFound(String),
    /// No slot or address is left.
    #[error("Device: the bus has no {0} left")]
    Exhausted(&'static str),
    /// Not in this state.
    #[error("{0}")]
    State(&'static str),
    /// A system call.
    #[error("{step}: {source}")]
    Host {
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl MachineError {
    pub(super) fn host(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { step, source }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        let code = match &error {
            MachineError::Field(_)
            | MachineError::Layout(_)
            | MachineError::Boot(_)
            | MachineError::Device(_)
            | MachineError::Memory(MemoryError::Size { .. })
            | MachineError::Cpuid(_)
            | MachineError::Saved(_)
            | MachineError::Command(CommandError::Invalid { .. }) => ErrorCode::Invalid,
            MachineError::Command(CommandError::Unsupported(_)) => ErrorCode::Unsupported,
            MachineError::Exists(_) | MachineError::Single(_) => ErrorCode::Exists,
            MachineError::NotFound(_) => ErrorCode::NotFound,
            MachineError::Passthrough(PassthroughError::Host { .. }) => ErrorCode::Host,
            MachineError::Passthrough(_) => ErrorCode::Invalid,
            MachineError::Exhausted(_) => ErrorCode::Exhausted,
            MachineError::State(_) => ErrorCode::WrongState,
            MachineError::Kvm(_) | MachineError::Memory(_) | MachineError::Host { .. } => {
                ErrorCode::Host
            }
        };
        failure(code, error)
    }
}

/// A failure with a text.
pub(crate) fn failure(code: ErrorCode, reason: impl ToString) -> Failure {
    Failure {
        code,
        reason: Reason::lossy(&reason.to_string()),
    }
}
