//! PCI functions of the host in the guest (VFIO): what of them the guest sees, and how its accesses
//! reach them.
//!
//! | module | what |
//! |---|---|
//! | [`mediate`] | from a function's configuration space to the one that the guest sees; pure |
//! | [`windows`] | which parts of a BAR the guest reaches without us; pure |
//! | [`interrupts`] | from the function's vectors to the guest's messages |
//! | [`function`] | the function on the bus: BARs, configuration space, reset |
//!
//! The function's own view of memory is the machine's business (`machine::passthrough`).

pub(crate) mod function;
mod interrupts;
pub(crate) mod mediate;
pub(crate) mod windows;
