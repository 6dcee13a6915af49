//! Errors of the container builder. Each names the object.

use std::io;

use serde::{Deserialize, Serialize};

/// Why a container could not be built, run or removed.
///
/// Crosses the socket between the helper and the agent, hence plain data: errors of the kernel are
/// held as errno.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub(crate) enum ContainerError {
    /// The caller's mistake.
    #[error("{field}: {reason}")]
    InvalidSpec {
        /// As in the specification's JSON: `mounts[2].options`.
        field: String,
        /// The problem and the remedy.
        reason: String,
    },
    /// The program does not exist (a shell's 127).
    #[error("exec: {program:?}: {reason}")]
    ExecutableNotFound {
        /// `process.args[0]`.
        program: String,
        /// As runc says it: "executable file not found in $PATH", or "stat /x: no such file or
        /// directory".
        reason: String,
    },
    /// The program exists and cannot be executed (a shell's 126).
    #[error("exec: {program:?}: {reason}")]
    ExecutableRefused {
        /// `process.args[0]`.
        program: String,
        /// "permission denied", "exec format error", ...
        reason: String,
    },
    /// A call at the wrong time.
    #[error("the container is {found}, not {expected}")]
    WrongState {
        /// The state that the call needs.
        expected: String,
        /// The state of the container.
        found: String,
    },
    /// The kernel refused a step.
    #[error("{action} {object}: {}", io::Error::from_raw_os_error(*.errno))]
    Kernel {
        /// "mount", "write", ...
        action: String,
        /// The path, namespace, device or number that it concerned.
        object: String,
        /// From errno(3).
        errno: i32,
    },
    /// A hook failed or took too long.
    #[error("hook {path:?} ({stage}): {reason}")]
    Hook {
        /// "createContainer", ...
        stage: String,
        /// Its program.
        path: String,
        /// Its exit code and the end of what it said.
        reason: String,
    },
    /// The helper ended, or did not answer in time: a fault of the agent or of a guest out of
    /// memory.
    #[error("building the container: {reason}")]
    Helper {
        /// The observation.
        reason: String,
    },
}

impl ContainerError {
    /// A kernel error about `object`.
    pub(crate) fn kernel(action: &str, object: impl ToString, error: &io::Error) -> Self {
        Self::Kernel {
            action: action.to_owned(),
            object: object.to_string(),
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    /// A mistake in the field `field` of the specification.
    pub(crate) fn invalid(field: impl ToString, reason: impl ToString) -> Self {
        Self::InvalidSpec {
            field: field.to_string(),
            reason: reason.to_string(),
        }
    }

    /// A call at the wrong time.
    pub(crate) fn state(expected: &str, found: &str) -> Self {
        Self::WrongState {
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    /// What a shell would answer for a program that could not be run.
    pub(crate) fn exit_status(&self) -> Option<i32> {
        match self {
            Self::ExecutableNotFound { .. } => Some(127),
            Self::ExecutableRefused { .. } => Some(126),
            _ => None,
        }
    }
}
