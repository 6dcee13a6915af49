//! AppArmor: the profile under which the program will run, where the guest's kernel has AppArmor at
//! all.

use std::{fs, io::Write, os::fd::AsFd};

use nix::{fcntl::OFlag, sys::stat::Mode};
use pericarp_sys::fscontext::FsContext;

use super::{super::error::ContainerError, Step};

/// Refuses a profile that the guest's kernel cannot apply, as runc does.
pub(super) fn check(profile: Option<&str>) -> Result<(), ContainerError> {
    let Some(profile) = profile.filter(|profile| *profile != "unconfined") else {
        return Ok(());
    };
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if enabled.is_ok_and(|text| text.trim() == "Y") {
        return Ok(());
    }
    let reason = format!("{profile:?}: the guest's kernel has no AppArmor");
    Err(ContainerError::invalid("process.apparmorProfile", reason))
}

/// Lets the next execve(2) change to `profile`. Written to an instance of procfs of our own: in a
/// container's, the file could be anything.
pub(super) fn apply(profile: Option<&str>) -> Result<(), ContainerError> {
    let Some(profile) = profile.filter(|profile| *profile != "unconfined") else {
        return Ok(());
    };
    let object = || format!("AppArmor profile {profile}");
    let proc = FsContext::open(c"proc")
        .and_then(|context| context.mount(0))
        .step("set", object())?;
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let path = "self/attr/apparmor/exec";
    let file =
        nix::fcntl::openat(proc.as_fd(), path, flags, Mode::empty()).step("set", object())?;
    fs::File::from(file)
        .write_all(format!("exec {profile}").as_bytes())
        .step("set", object())
}
