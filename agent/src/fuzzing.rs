//! The agent's parsers as functions of any bytes, for `tests/fuzz`. Each panics when what must hold
//! does not.

use crate::{
    container::fuzzing as container,
    drivers,
    ground::{kernel, stats, uevents},
};

/// See [`container::paths`].
pub fn paths(data: &[u8]) {
    container::paths(data);
}

/// See [`container::passwd`].
pub fn passwd(data: &[u8]) {
    container::passwd(data);
}

/// See [`container::specification`].
pub fn specification(data: &[u8]) {
    container::specification(data);
}

/// See [`container::resources`].
pub fn resources(data: &[u8]) {
    container::resources(data);
}

/// See [`container::cgroup_of_process`].
pub fn cgroup_of_process(data: &[u8]) {
    container::cgroup_of_process(data);
}

/// See [`container::report`].
pub fn report(data: &[u8]) {
    container::report(data);
}

/// See [`drivers::read_any`].
pub fn drivers(data: &[u8]) {
    drivers::read_any(data);
}

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
    kernel::read_log(data);
}
