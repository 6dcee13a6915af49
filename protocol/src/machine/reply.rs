//! What the VMM answers and tells.

use std::fmt;

use super::device::DeviceName;
use super::request::{Bytes, Nothing};
use super::wire::{List, Text, wire_choice, wire_code, wire_struct};

/// Longest text of an error or event in bytes; longer ones are cut.
pub const REASON_BYTES_MAX: usize = 480;

/// Longest name of a counter in bytes.
pub const COUNTER_NAME_BYTES_MAX: usize = 32;

/// Counters of one device in one reply.
pub const COUNTERS_MAX: usize = 40;

/// Text of an error or event.
pub type Reason = Text<REASON_BYTES_MAX>;

wire_code! {
    /// Why a request failed: whose doing it was.
    ErrorCode {
        /// The message or a field of it is wrong; the text begins with the field.
        Invalid = 1,
        /// Not now: the text says what state the machine is in.
        WrongState = 2,
        /// There is no such device.
        NotFound = 3,
        /// A device of that name exists.
        Exists = 4,
        /// No slot, address or memory is left.
        Exhausted = 5,
        /// The device or the host cannot do that.
        Unsupported = 6,
        /// A system call of the host failed.
        Host = 7,
    }
}

wire_struct! {
    /// A failed request.
    Failure {
        /// Whose doing.
        code: ErrorCode,
        /// What and why, in words.
        reason: Reason,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl std::error::Error for Failure {}

wire_struct! {
    /// Where a device sits on the guest's bus; shown as `0000:00:05.0`.
    #[derive(Copy, Hash, PartialOrd, Ord)]
    PciAddress {
        /// Segment group.
        segment: u16,
        /// Bus.
        bus: u8,
        /// Device, 0 to 31.
        device: u8,
        /// Function, 0 to 7.
        function: u8,
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            segment,
            bus,
            device,
            function,
        } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

wire_struct! {
    /// Counters of the machine since it began.
    #[derive(Copy, Default)]
    Statistics {
        /// Exits of all vCPUs for port I/O.
        exits_io: u64,
        /// Exits for memory-mapped I/O.
        exits_mmio: u64,
        /// Exits of all other kinds that reached the VMM.
        exits_other: u64,
        /// Runs of a vCPU that a signal ended.
        exits_interrupted: u64,
        /// Interrupts that devices raised by message.
        interrupts: u64,
        /// The most memory that the VMM's process had resident, guest memory included.
        resident_peak_bytes: u64,
        /// Guest memory that the host holds, counted in its files. For a restored machine these are
        /// the pages of the saved machine's file, not its own private copies.
        guest_resident_bytes: u64,
        /// vCPUs that may run.
        vcpus: u64,
        /// Boot memory; what is plugged and what the balloon holds are counters of those devices.
        memory_bytes: u64,
    }
}

wire_struct! {
    /// One counter.
    Counter {
        /// Its name, such as `read_bytes`.
        name: Text<COUNTER_NAME_BYTES_MAX>,
        /// Its value.
        value: u64,
    }
}

wire_struct! {
    /// Counters of one device.
    DeviceStatistics {
        /// All of them.
        counters: List<Counter, COUNTERS_MAX>,
    }
}

wire_choice! {
    /// The result of a request.
    Success {
        /// It is done.
        Done(Nothing) = 1,
        /// The device is on the bus.
        Added(PciAddress) = 2,
        /// Counters of the machine.
        Statistics(Statistics) = 3,
        /// Counters of a device.
        DeviceStatistics(DeviceStatistics) = 4,
    }
}

wire_struct! {
    /// A vCPU could not go on.
    VcpuError {
        /// Which one.
        vcpu: u16,
        /// Why.
        reason: Reason,
    }
}

wire_struct! {
    /// A device serves no more until it is reset.
    DeviceBroken {
        /// Which one.
        device: DeviceName,
        /// Why.
        reason: Reason,
    }
}

wire_struct! {
    /// Other functions of the machine do not reach the registers of this one.
    PeersApart {
        /// Which one.
        device: DeviceName,
        /// Why.
        reason: Reason,
    }
}

wire_code! {
    /// How a guest ended.
    ShutdownKind {
        /// It switched itself off.
        PowerOff = 1,
        /// It asked for a reset.
        Reset = 2,
    }
}

wire_struct! {
    /// The guest ended. The VMM ends too, with status 0.
    #[derive(Copy)]
    GuestShutdown {
        /// How.
        kind: ShutdownKind,
    }
}

wire_choice! {
    /// Something happened that nobody asked for.
    Event {
        /// The vCPUs run.
        Started(Nothing) = 1,
        /// The guest ended.
        GuestShutdown(GuestShutdown) = 2,
        /// The guest's kernel panicked; with `panic=-1` a GuestShutdown follows.
        GuestPanicked(Nothing) = 3,
        /// A vCPU could not go on. The VMM ends.
        VcpuError(VcpuError) = 4,
        /// A device serves no more until it is reset.
        DeviceBroken(DeviceBroken) = 5,
        /// What ResizeMemory or SetBalloon asked for is reached: the memory that the guest has now.
        MemoryReached(Bytes) = 6,
        /// Functions of the host reach the guest's memory, but not each other. Told once.
        PeersApart(PeersApart) = 7,
    }
}

wire_choice! {
    /// A message of the VMM.
    Message {
        /// The request of the same number succeeded.
        Success(Success) = 1,
        /// The request of the same number failed.
        Failure(Failure) = 2,
        /// An event; its number is 0.
        Event(Event) = 3,
    }
}
