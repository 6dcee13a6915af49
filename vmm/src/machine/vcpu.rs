//! vCPU threads: run, answer exits, wait at the gate when told to.
//!
//! ```text
//!            gate opens               flag set, then signal
//!  waiting ------------> in KVM_RUN -----------------------> at the gate --> waiting or running
//!                          |   ^  exit answered, or EINTR without the flag
//!                          +---+
//! ```
//!
//! Two things end a run: the vCPU's `immediate_exit` flag keeps it from entering the guest, and a
//! signal takes it out. The flag is set first, so a signal that comes between two runs loses
//! nothing. `EINTR` alone means nothing to us: a stop (SIGSTOP), a debugger, the cgroup freezer and
//! a suspended host end a run as well, and the vCPU goes on afterwards.

use std::{
    io,
    sync::{
        Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::sys::signal::{SigSet, Signal};
use pericarp_sys::kvm::{ImmediateExit, handle_interrupt};
use vmm_sys_util::signal::Killable;

use super::bus::{Bus, Flow};
use crate::event_loop::{Doorbell, End};

/// Signal that takes a vCPU out of the guest.
const INTERRUPT: Signal = Signal::SIGUSR1;

/// Exits of all vCPUs that came to us, by kind.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    pub(crate) io: AtomicU64,
    pub(crate) mmio: AtomicU64,
    pub(crate) other: AtomicU64,
    pub(crate) interrupted: AtomicU64,
}

#[derive(Debug)]
struct GateState {
    open: bool,
    allowed: u16,
    running: u16,
}

/// Holds vCPUs back: all of them before the start and while paused, and those beyond the number
/// that may run.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    /// Closed.
    pub(crate) fn new(allowed: u16) -> Self {
        Self {
            state: Mutex::new(GateState {
                open: false,
                allowed,
                running: 0,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In the thread of vCPU `id`: returns when it may run.
    fn enter(&self, id: u16) {
        let mut state = self.lock();
        while !state.open || id >= state.allowed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running += 1;
    }

    fn leave(&self) {
        self.lock().running -= 1;
        self.changed.notify_all();
    }
}

/// What a vCPU's thread works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) bus: Arc<Bus>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) exits: Arc<Exits>,
    pub(crate) doorbell: Arc<Doorbell>,
}

#[derive(Debug)]
struct VcpuThread {
    handle: JoinHandle<()>,
    /// Locked while it runs.
    vcpu: Arc<Mutex<VcpuFd>>,
    exit: Arc<ImmediateExit>,
}

impl VcpuThread {
    /// Makes the vCPU leave the guest and pass the gate.
    fn interrupt(&self) {
        self.exit.set();
        // A thread that has ended needs no signal.
        let _ = self.handle.kill(INTERRUPT as i32);
    }
}

/// All vCPU threads.
#[derive(Debug)]
pub(crate) struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<VcpuThread>,
}

/// Bytes of a vCPU thread's stack: no recursion, no large arrays.
const STACK_BYTES: usize = 128 << 10;

impl Vcpus {
    /// Starts one thread a vCPU, all waiting at the gate. `confine` puts the syscall filter on
    /// each.
    pub(crate) fn spawn(
        vcpus: Vec<VcpuFd>,
        context: impl Fn() -> Context,
        confine: fn() -> io::Result<()>,
    ) -> io::Result<Self> {
        let gate = context().gate;
        handle_interrupt(INTERRUPT)?;
        let mut threads = Vec::new();
        // Nobody is told that the machine has started while one of its threads is not confined.
        let confinement = Arc::new(Barrier::new(vcpus.len() + 1));
        for (id, vcpu) in (0_u16..).zip(vcpus) {
            let exit = Arc::new(ImmediateExit::new(&vcpu)?);
            let context = context();
            let confinement_here = Arc::clone(&confinement);
            let exit_here = Arc::clone(&exit);
            let vcpu = Arc::new(Mutex::new(vcpu));
            let vcpu_here = Arc::clone(&vcpu);
            let handle = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let confined = unblock_interrupt().and_then(|()| confine());
                    confinement_here.wait();
                    match confined {
                        Ok(()) => run(id, &vcpu_here, &exit_here, &context),
                        Err(error) => context.doorbell.end(End::Vcpu(id, error.to_string())),
                    }
                })?;
            threads.push(VcpuThread { handle, vcpu, exit });
        }
        confinement.wait();
        Ok(Self { gate, threads })
    }

    /// Lets them run.
    pub(crate) fn open(&self) {
        self.gate.lock().open = true;
        self.gate.changed.notify_all();
    }

    /// Stops them; returns when none is in the guest any more.
    pub(crate) fn close(&self) {
        self.gate.lock().open = false;
        self.interrupt();
        let mut state = self.gate.lock();
        while state.running > 0 {
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the first `count` run.
    pub(crate) fn allow(&self, count: u16) {
        self.gate.lock().allowed = count;
        self.gate.changed.notify_all();
        self.interrupt();
    }

    /// How many may run, and how many there are.
    pub(crate) fn counts(&self) -> (u16, usize) {
        (self.gate.lock().allowed, self.threads.len())
    }

    /// Whether none is in the guest, and none will be before [`Self::open`].
    pub(crate) fn is_closed(&self) -> bool {
        let state = self.gate.lock();
        !state.open && state.running == 0
    }

    /// Asks every vCPU something while none runs.
    pub(crate) fn each<T, E>(&self, ask: impl Fn(&VcpuFd) -> Result<T, E>) -> Result<Vec<T>, E> {
        let threads = self.threads.iter();
        threads.map(|thread| ask(&lock(&thread.vcpu))).collect()
    }

    fn interrupt(&self) {
        for thread in &self.threads {
            thread.interrupt();
        }
    }
}

/// The thread may have inherited a mask that blocks it.
fn unblock_interrupt() -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(INTERRUPT);
    Ok(set.thread_unblock()?)
}

fn run(id: u16, vcpu: &Mutex<VcpuFd>, exit: &ImmediateExit, context: &Context) {
    loop {
        context.gate.enter(id);
        let again = run_until_told(&mut lock(vcpu), exit, context);
        context.gate.leave();
        match again {
            Ok(true) => {}
            Ok(false) => break,
            Err(reason) => {
                context.doorbell.end(End::Vcpu(id, reason));
                break;
            }
        }
    }
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs until it is told to pass the gate once more, or the guest ends: then false.
fn run_until_told(
    vcpu: &mut VcpuFd,
    exit: &ImmediateExit,
    context: &Context,
) -> Result<bool, String> {
    loop {
        match step(vcpu, context)? {
            Step::Again => {}
            // Set again after this, the flag ends the next run.
            Step::Interrupted => {
                if exit.take() {
                    return Ok(true);
                }
            }
            Step::Stop => return Ok(false),
        }
    }
}

enum Step {
    Again,
    Interrupted,
    Stop,
}

/// One run and the answer to its exit.
fn step(vcpu: &mut VcpuFd, context: &Context) -> Result<Step, String> {
    let (bus, exits) = (&context.bus, &context.exits);
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) if error.errno() == libc::EINTR => {
            exits.interrupted.fetch_add(1, Relaxed);
            return Ok(Step::Interrupted);
        }
        Err(error) if error.errno() == libc::EAGAIN => return Ok(Step::Again),
        Err(error) => return Err(format!("KVM_RUN: {error}")),
    };
    let counter = match exit {
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => &exits.io,
        VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => &exits.mmio,
        _ => &exits.other,
    };
    counter.fetch_add(1, Relaxed);
    match exit {
        VcpuExit::IoIn(port, data) => bus.read_port(port, data),
        VcpuExit::IoOut(port, data) => {
            if bus.write_port(port, data) == Flow::Stop {
                return Ok(Step::Stop);
            }
        }
        VcpuExit::MmioRead(address, data) => bus.read_memory(address, data),
        VcpuExit::MmioWrite(address, data) => bus.write_memory(address, data),
        // An exception while one was delivered whose delivery had failed.
        VcpuExit::Shutdown => return Err("triple fault".to_owned()),
        VcpuExit::FailEntry(reason, _) => return Err(format!("entry failed: {reason:#x}")),
        other => return Err(format!("unexpected exit: {other:?}")),
    }
    Ok(Step::Again)
}
