//! The container's init: from inside its new namespaces to its program.
//!
//! ```text
//! identity in the user namespace ─ session ─ names ─ loopback ─ root file system (rootfs)
//!   ─ hooks ─ pivot ─ sysctls ─ program
//! ```

use std::{
    ffi::CString,
    io::{ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::MsFlags,
    unistd::{Gid, Uid},
};
use oci_spec::runtime::LinuxNamespaceType;
use pericarp_sys::{attributes, fscontext::FsContext, loopback};

use super::{
    super::{error::ContainerError, plan::ContainerPlan},
    Step, Streams, hook_descriptors, hooks,
    program::{self, Program},
    rootfs::Root,
    sources::Sources,
};

/// Becomes the container's program. `helper` tells when the ids are mapped.
pub(super) fn run(
    plan: &ContainerPlan,
    sources: Sources,
    streams: Streams,
    socket: &UnixStream,
    helper: UnixStream,
) -> ! {
    let Err(error) = become_program(plan, sources, streams, socket, helper);
    program::fail(error, socket)
}

fn become_program(
    plan: &ContainerPlan,
    mut sources: Sources,
    streams: Streams,
    socket: &UnixStream,
    mut helper: UnixStream,
) -> Result<std::convert::Infallible, ContainerError> {
    let mut pid = [0; 4];
    helper.read_exact(&mut pid).step("read", "the helper")?;
    let pid = i32::from_le_bytes(pid);
    if plan.namespaces.has_user_namespace() {
        become_root()?;
    }
    new_session(&plan.id)?;
    name_host(plan)?;
    if plan.namespaces.is_new(LinuxNamespaceType::Network) {
        loopback::bring_up().step("bring up", "lo")?;
    }
    let none: Option<&str> = None;
    nix::mount::mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .step("set the propagation of", "the guest's mounts")?;
    let proc = own_proc();
    let rootfs = sources
        .rootfs
        .take()
        .ok_or_else(|| ContainerError::Helper {
            reason: "the root file system was attached before".to_owned(),
        })?;
    let mut root = Root::attach(rootfs)?;
    root.mount_all(plan, &mut sources)?;
    root.make_working_directory(&plan.process)?;
    let terminal = root.add_devices(plan, &mut sources)?;
    root.mask_paths(plan, sources)?;
    if !plan.create_runtime_hooks.is_empty() {
        helper.write_all(&[0]).step("write", "the helper")?;
        match helper.read_exact(&mut [0]) {
            // A hook failed and the helper tells so: a second report from here could come first.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => std::process::exit(1),
            read => read.step("run", "the hooks of the guest")?,
        }
    }
    drop(helper);
    hooks::run(
        &plan.create_container_hooks,
        &plan.hook_state.json("creating", pid),
        hook_descriptors(),
    )?;
    root.pivot(plan)?;
    write_sysctls(plan, proc.as_ref())?;
    drop(proc);
    let program = Program {
        plan: &plan.process,
        streams,
        terminal,
        start_hooks: &plan.start_container_hooks,
        hook_state: plan.hook_state.json("created", pid),
    };
    program::run(program, socket)
}

/// Takes the root's identity of the user namespace; what came from outside shows as nobody there.
pub(super) fn become_root() -> Result<(), ContainerError> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    let object = "the root user of the container's user namespace";
    nix::unistd::setgroups(&[]).step("become", object)?;
    nix::unistd::setresgid(gid, gid, gid).step("become", object)?;
    nix::unistd::setresuid(uid, uid, uid).step("become", object)
}

/// Leads a session, with a keyring in which no key of the agent's is.
pub(super) fn new_session(id: &str) -> Result<(), ContainerError> {
    nix::unistd::setsid().step("create", "a session")?;
    let name = CString::new(format!("_ses.{id}"))
        .map_err(|_| ContainerError::invalid("container id", "holds a NUL"))?;
    match attributes::join_session_keyring(&name) {
        // A kernel without keyrings has no key to hide, and a full quota leaves no key in reach
        // either.
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EDQUOT | libc::EPERM)
            ) =>
        {
            Err(ContainerError::kernel("join", "a session keyring", &error))
        }
        _ => Ok(()),
    }
}

fn name_host(plan: &ContainerPlan) -> Result<(), ContainerError> {
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).step("set hostname", name)?;
    }
    if let Some(name) = &plan.domainname {
        // The file is the namespace's own, and setdomainname(2) has no safe wrapper.
        let path = "/proc/sys/kernel/domainname";
        std::fs::write(path, name).step("set domainname", name)?;
    }
    Ok(())
}

/// An instance of procfs that is attached nowhere: no mount of an image's or of another container's
/// can stand in for its files. None where the user namespace does not own the PID namespace.
fn own_proc() -> Option<OwnedFd> {
    let context = FsContext::open(c"proc").ok()?;
    let hardened = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let mount = context.mount(hardened).ok()?;
    std::os::fd::AsFd::as_fd(&mount).try_clone_to_owned().ok()
}

fn write_sysctls(plan: &ContainerPlan, proc: Option<&OwnedFd>) -> Result<(), ContainerError> {
    for (path, value) in &plan.sysctls {
        let object = format!("sysctl {path} = {value:?}");
        let Some(proc) = proc else {
            return Err(ContainerError::kernel(
                "write",
                object,
                &std::io::Error::from_raw_os_error(libc::EPERM),
            ));
        };
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_XDEV;
        let how = OpenHow::new()
            .flags(OFlag::O_WRONLY | OFlag::O_CLOEXEC)
            .resolve(resolve);
        let file = openat2(proc, format!("sys/{path}").as_str(), how).step("open", &object)?;
        std::fs::File::from(file)
            .write_all(value.as_bytes())
            .step("write", &object)?;
    }
    Ok(())
}
