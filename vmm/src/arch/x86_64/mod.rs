//! x86-64.

pub(crate) mod acpi;
pub(crate) mod boot;
pub(crate) mod cpu;
mod cpuid;
mod features;
pub(crate) mod layout;
pub(crate) mod machine;
pub(crate) mod saved;
