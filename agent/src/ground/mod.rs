//! The ground floor: what every other part of the agent may use, and what uses none of them.

pub(crate) mod beneath;
pub(crate) mod clock;
pub(crate) mod errors;
pub(crate) mod files;
pub(crate) mod ids;
pub(crate) mod kernel;
pub(crate) mod log;
pub(crate) mod paths;
pub(crate) mod pci;
pub(crate) mod stats;
pub(crate) mod sysctls;
pub(crate) mod uevents;
