//! The one switch of architecture: every folder below exports the same names, and nothing outside
//! asks which one it is.
//!
//! | name | what it is |
//! |---|---|
//! | `layout` | where memory, windows and tables lie in guest-physical space |
//! | `machine` | what a virtual machine needs before its first vCPU |
//! | `cpu` | what a vCPU is before its first instruction |
//! | `boot` | the kernel and what it is told |
//! | `saved` | a vCPU as plain data |

#[cfg(target_arch = "x86_64")]
#[path = "x86_64/mod.rs"]
mod imp;

pub(crate) use imp::{boot, cpu, layout, machine, saved};
