//! The agent's parsers as functions of any bytes, for `tests/fuzz`. Each panics when what must hold
//! does not.

pub use crate::container::fuzzing::{
    cgroup_of_process, passwd, paths, report, resources, specification,
};

use crate::{rpc, stats, uevents};

/// An announcement of the kernel's: what is read as a PCI address has its form.
pub fn uevent(data: &[u8]) {
    if let Some(address) = uevents::removed_function(data) {
        let address = address.to_string();
        assert!(address.len() == 12 && !address.contains('/'), "{address}");
    }
}

/// Files of the kernel with names that a container chose.
pub fn figures(data: &[u8]) {
    stats::read_any(&String::from_utf8_lossy(data));
}

/// Records of the kernel's log, which a container can add to.
pub fn kernel_log(data: &[u8]) {
    rpc::read_log(data);
}
