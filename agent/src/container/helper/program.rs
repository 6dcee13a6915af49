//! The last steps of every process, the container's first or a further one: streams, user, program.
//!
//! Everything that can fail for reasons of the specification fails before [`Report::Ready`], so
//! that the caller hears it from the call that built the process. What comes after its start is
//! only what must not be there while it waits.

use std::{
    convert::Infallible,
    ffi::CString,
    fs::File,
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    sys::stat::{Mode, fstat, makedev, umask},
    unistd::{AccessFlags, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, faccessat},
};
use pericarp_sys::{attributes, descriptors, seccomp, signals};

use super::{
    super::{
        error::ContainerError,
        message::{self, Report},
        plan::{hooks::Hook, process::ProcessPlan},
    },
    Step, Streams, apparmor, hooks, identity, passwd, report,
    terminal::Terminal,
};

/// What a process needs to become its program.
pub(super) struct Program<'a> {
    pub(super) plan: &'a ProcessPlan,
    pub(super) streams: Streams,
    pub(super) terminal: Option<Terminal>,
    pub(super) start_hooks: &'a [Hook],
    pub(super) hook_state: Vec<u8>,
}

/// Waits for the start and executes the program.
pub(super) fn run(program: Program<'_>, socket: &UnixStream) -> Result<Infallible, ContainerError> {
    let plan = program.plan;
    umask(Mode::from_bits_truncate(plan.umask));
    let master = take_streams(program.streams, program.terminal, plan.uid)?;
    if let Some(personality) = plan.personality {
        attributes::set_personality(personality).step("set", "linux.personality")?;
    }
    apparmor::apply(plan.apparmor_profile.as_deref())?;
    let entered = chdir(&plan.cwd);
    identity::assume(plan)?;
    enter_directory(plan, entered)?;
    let (path, args, env) = arguments(plan)?;
    report(socket, &Report::Ready, master.as_ref())?;
    drop(master);
    wait_for_start(socket)?;
    // This process has the container's limits already, and may not raise them.
    hooks::run(program.start_hooks, &program.hook_state, None)?;
    // Nothing of the agent's or of the guest's goes along, whoever forgot to mark it.
    descriptors::close_all_on_exec().step("close", "descriptors")?;
    // Ignored and blocked signals would stay so in the new program, and Rust's runtime ignores
    // SIGPIPE. Before the system call filter, which may refuse the calls.
    signals::reset_all().step("reset", "the signals")?;
    let last = identity::last_capability()?;
    if plan.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().step("set", "process.noNewPrivileges")?;
    }
    if let Some(filter) = &plan.seccomp {
        let instructions = filter.program();
        identity::prepare_filter(plan)?;
        seccomp::install(&instructions, filter.flags).step("install", "linux.seccomp")?;
    }
    identity::finish(plan, last)?;
    let Err(errno) = execve(&path, &args, &env);
    Err(refusal(&plan.args[0], errno))
}

/// Says why there will be no program, and ends as a shell would.
pub(super) fn fail(error: ContainerError, socket: &UnixStream) -> ! {
    let status = error.exit_status().unwrap_or(1);
    // When nobody hears it, the exit alone must tell.
    let _ = message::send(socket, &Report::Failed(error), &[]);
    std::process::exit(status)
}

/// Puts the streams or the terminal in their places; gives the terminal's other end.
fn take_streams(
    streams: Streams,
    terminal: Option<Terminal>,
    uid: u32,
) -> Result<Option<OwnedFd>, ContainerError> {
    let Some(terminal) = terminal else {
        dup2_stdin(containers_own(streams.stdin)).step("take", "standard input")?;
        dup2_stdout(containers_own(streams.stdout)).step("take", "standard output")?;
        dup2_stderr(containers_own(streams.stderr)).step("take", "standard error")?;
        return Ok(None);
    };
    let (master, slave) = terminal.control(uid)?;
    dup2_stdin(&slave).step("take", "standard input")?;
    dup2_stdout(&slave).step("take", "standard output")?;
    dup2_stderr(&slave).step("take", "standard error")?;
    Ok(Some(master))
}

/// The container's `/dev/null` in place of the guest's, so that no file of the guest's is in its
/// reach.
fn containers_own(fd: OwnedFd) -> OwnedFd {
    let is_null = |fd: &OwnedFd| fstat(fd).is_ok_and(|stat| stat.st_rdev == makedev(1, 3));
    if !is_null(&fd) {
        return fd;
    }
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NOCTTY | libc::O_NONBLOCK);
    match options.open("/dev/null").map(OwnedFd::from) {
        Ok(own) if is_null(&own) => own,
        _ => fd,
    }
}

/// Goes to `process.cwd`: as the builder where its user may not, as the user where root may not
/// (runc tries both too).
fn enter_directory(plan: &ProcessPlan, entered: nix::Result<()>) -> Result<(), ContainerError> {
    let object = || format!("process.cwd {}", plan.cwd.display());
    if entered.is_err() {
        chdir(&plan.cwd).step("enter", object())?;
    }
    // getcwd(3): a directory outside of the root has no path. No descriptor of such is open here,
    // so this cannot be; were it so all the same, the container would be out.
    match std::env::current_dir() {
        Ok(path) if path.is_absolute() => Ok(()),
        Ok(_) => Err(ContainerError::invalid(
            "process.cwd",
            "lies outside of the root",
        )),
        Err(error) => Err(ContainerError::kernel("enter", object(), &error)),
    }
}

type Arguments = (CString, Vec<CString>, Vec<CString>);

fn arguments(plan: &ProcessPlan) -> Result<Arguments, ContainerError> {
    let strings = |strings: &[String], field: &str| -> Result<Vec<CString>, ContainerError> {
        let strings = strings.iter().map(|string| CString::new(string.as_str()));
        strings
            .collect::<Result<_, _>>()
            .map_err(|_| ContainerError::invalid(field, "holds a NUL"))
    };
    let args = strings(&plan.args, "process.args")?;
    let mut env = plan.env.clone();
    // An empty HOME counts as none (runc, `prepareEnv`). The plan has each name once.
    env.retain(|entry| entry != "HOME=");
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", home(plan.uid)));
    }
    let path = find(&plan.args[0], &env)?;
    Ok((path, args, strings(&env, "process.env")?))
}

fn home(uid: u32) -> String {
    let mut text = Vec::new();
    let mut options = File::options();
    options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open("/etc/passwd");
    let read = file.and_then(|file| file.take(passwd::PASSWD_BYTES_MAX).read_to_end(&mut text));
    let home = read.ok().and_then(|_| passwd::home(&text, uid));
    home.unwrap_or_else(|| "/".to_owned())
}

/// Where the program is, by `PATH` when its name has no slash; refusals as runc words them.
fn find(program: &str, env: &[String]) -> Result<CString, ContainerError> {
    let not_found = |reason: String| ContainerError::ExecutableNotFound {
        program: program.to_owned(),
        reason,
    };
    let c_path = |path: &str| CString::new(path).map_err(|_| not_found("holds a NUL".to_owned()));
    if program.contains('/') {
        return match executable(Path::new(program)) {
            Ok(()) => c_path(program),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Err(not_found(format!(
                "stat {program}: no such file or directory"
            ))),
            Err(errno) => Err(refusal(program, errno)),
        };
    }
    let path = env
        .iter()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    let mut denied = None;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{directory}/{program}");
        match executable(Path::new(&candidate)) {
            Ok(()) => return c_path(&candidate),
            Err(Errno::EACCES) => denied = Some(Errno::EACCES),
            Err(_) => {}
        }
    }
    match denied {
        Some(errno) => Err(refusal(program, errno)),
        None => Err(not_found("executable file not found in $PATH".to_owned())),
    }
}

fn executable(path: &Path) -> Result<(), Errno> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

fn refusal(program: &str, errno: Errno) -> ContainerError {
    let (program, reason) = (program.to_owned(), errno.desc().to_lowercase());
    match errno {
        Errno::ENOENT => ContainerError::ExecutableNotFound { program, reason },
        _ => ContainerError::ExecutableRefused { program, reason },
    }
}

fn wait_for_start(mut socket: &UnixStream) -> Result<(), ContainerError> {
    let mut order = [0u8];
    match socket.read(&mut order).step("read", "the agent's socket")? {
        1 if order[0] == message::START => Ok(()),
        // The container was deleted before it was started, or the agent is gone.
        _ => Err(ContainerError::kernel(
            "wait for",
            "the start",
            &io::Error::from_raw_os_error(libc::ECANCELED),
        )),
    }
}
