//! From the all-powerful builder to the user of the process: groups, ids, capabilities.

use nix::{
    sys::prctl::set_keepcaps,
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use pericarp_sys::capabilities;

use super::{
    super::{
        error::ContainerError,
        plan::process::{CapabilitySets, ProcessPlan, SYS_ADMIN},
    },
    Step,
};

/// Takes the ids and capabilities of `plan`. `CAP_SYS_ADMIN` stays permitted, though not effective,
/// where the system call filter needs it; [`finish`] gives it up.
pub(super) fn assume(plan: &ProcessPlan) -> Result<(), ContainerError> {
    let last = capabilities::last().step("read", "the kernel's capabilities")?;
    let sets = known(plan.capabilities, last);
    for capability in (0..=last).filter(|capability| sets.bounding & (1 << capability) == 0) {
        capabilities::drop_bounding(capability).step(
            "drop from the bounding set",
            format!("capability {capability}"),
        )?;
    }
    // capabilities(7): leaving user 0 would clear the permitted set.
    set_keepcaps(true).step("keep", "capabilities")?;
    let groups: Vec<_> = plan
        .additional_gids
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    setgroups(&groups).step(
        "set",
        format!("process.user.additionalGids {:?}", plan.additional_gids),
    )?;
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    setresgid(gid, gid, gid).step("set", format!("process.user.gid {gid}"))?;
    setresuid(uid, uid, uid).step("set", format!("process.user.uid {uid}"))?;
    set_keepcaps(false).step("keep", "capabilities")?;
    let permitted = if needs_admin(plan) {
        sets.permitted | SYS_ADMIN
    } else {
        sets.permitted
    };
    set(sets, sets.effective, permitted)?;
    capabilities::clear_ambient().step("clear", "the ambient set")?;
    for capability in (0..=last).filter(|capability| sets.ambient & (1 << capability) != 0) {
        capabilities::raise_ambient(capability).step(
            "raise in the ambient set",
            format!("capability {capability}"),
        )?;
    }
    Ok(())
}

/// Makes effective what installing the system call filter needs.
pub(super) fn prepare_filter(plan: &ProcessPlan) -> Result<(), ContainerError> {
    if !needs_admin(plan) {
        return Ok(());
    }
    let sets = known(
        plan.capabilities,
        capabilities::last().step("read", "capabilities")?,
    );
    set(sets, sets.effective | SYS_ADMIN, sets.permitted | SYS_ADMIN)
}

/// The highest capability of the kernel, for [`finish`]. To be read before the system call filter
/// is installed, because [`finish`] must not need more than one system call.
pub(super) fn last_capability() -> Result<u32, ContainerError> {
    capabilities::last().step("read", "the kernel's capabilities")
}

/// Leaves exactly the capabilities of `plan`.
pub(super) fn finish(plan: &ProcessPlan, last: u32) -> Result<(), ContainerError> {
    if !needs_admin(plan) {
        return Ok(());
    }
    let sets = known(plan.capabilities, last);
    set(sets, sets.effective, sets.permitted)
}

fn needs_admin(plan: &ProcessPlan) -> bool {
    plan.seccomp.is_some() && !plan.no_new_privileges
}

/// Without what this kernel does not know: a specification may be written for a newer one.
fn known(sets: CapabilitySets, last: u32) -> CapabilitySets {
    let mask = u64::MAX >> (63 - last.min(63));
    CapabilitySets {
        bounding: sets.bounding & mask,
        effective: sets.effective & mask,
        inheritable: sets.inheritable & mask,
        permitted: sets.permitted & mask,
        ambient: sets.ambient & mask,
    }
}

fn set(sets: CapabilitySets, effective: u64, permitted: u64) -> Result<(), ContainerError> {
    let object = format!(
        "process.capabilities: effective {effective:#x}, permitted {permitted:#x}, inheritable \
            {:#x}",
        sets.inheritable
    );
    capabilities::set(effective, permitted, sets.inheritable).step("set", object)
}
