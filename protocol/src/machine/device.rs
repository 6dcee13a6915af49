//! The devices of a machine, as the shim describes them.

use super::wire::{FieldError, List, Text, wire_choice, wire_code, wire_struct};

/// Longest name of a device in bytes.
pub const DEVICE_NAME_BYTES_MAX: usize = 32;

/// Longest serial number of a disk in bytes (virtio 1.2 §5.2.6, VIRTIO_BLK_T_GET_ID).
pub const SERIAL_BYTES_MAX: usize = 20;

/// Longest tag of a shared file system in bytes (virtio 1.2 §5.11.4).
pub const TAG_BYTES_MAX: usize = 36;

/// Queues of a disk, and queue pairs of a network interface: one a vCPU is the most that helps, and
/// a vector each must fit the MSI-X table of the transport.
pub const QUEUES_MAX: u16 = 16;

/// Connections that a guest may open to the host: one entry each.
pub const VSOCK_PORTS_MAX: usize = 16;

/// Smallest and largest MTU: RFC 791's minimum and the largest that the length field of IPv4 knows.
pub const MTU_MIN: u16 = 68;

/// Name of a device, unique in the machine, chosen by the shim; letters, digits, `-`, `_` and `.`.
pub type DeviceName = Text<DEVICE_NAME_BYTES_MAX>;

wire_struct! {
    /// Position of a descriptor among those of the same message.
    #[derive(Copy, Hash, PartialOrd, Ord)]
    Descriptor {
        /// Counts from 0.
        position: u8,
    }
}

wire_struct! {
    /// Two token buckets; a zero rate means no limit, a zero burst means one second's worth.
    #[derive(Copy, Default)]
    RateLimit {
        /// Operations (requests, packets) in a second.
        operations_per_s: u64,
        /// Operations that may come at once.
        operations_burst: u64,
        /// Bytes in a second.
        bytes_per_s: u64,
        /// Bytes that may come at once.
        bytes_burst: u64,
    }
}

wire_code! {
    /// When a disk's write is complete.
    CacheMode {
        /// When the host's page cache has it; flush makes it durable.
        WriteBack = 1,
        /// When it is durable; the guest need not flush.
        WriteThrough = 2,
        /// As `WriteBack`, and a flush is answered at once: for disks that die with the pod.
        Unsafe = 3,
    }
}

wire_struct! {
    /// A disk: a raw file or a block device.
    Blk {
        /// The file, open for reading, and for writing too unless `read_only`.
        file: Descriptor,
        /// Writes are refused.
        read_only: bool,
        /// What the guest sees in `/sys/block/*/serial`.
        serial: Text<SERIAL_BYTES_MAX>,
        /// Number of queues.
        queues: u16,
        /// When a write is complete.
        cache: CacheMode,
        /// Limit for requests and bytes of both directions together.
        limit: RateLimit,
    }
}

wire_struct! {
    /// A network interface on a tap device.
    Net {
        /// Its MAC address.
        mac: [u8; 6],
        /// Its MTU.
        mtu: u16,
        /// One tap descriptor a queue pair, in order; their number is the number of queue pairs.
        taps: List<Descriptor, { QUEUES_MAX as usize }>,
        /// One `/dev/vhost-net` descriptor a queue pair, or none: then the VMM moves the packets.
        vhosts: List<Descriptor, { QUEUES_MAX as usize }>,
        /// Checksum and segmentation offloads are offered to the guest.
        offloads: bool,
        /// Limit towards the guest; with vhost only zero is accepted.
        receive_limit: RateLimit,
        /// Limit from the guest; with vhost only zero is accepted.
        transmit_limit: RateLimit,
    }
}

wire_struct! {
    /// A shared file system behind a vhost-user socket.
    Fs {
        /// The tag to mount by.
        tag: Text<TAG_BYTES_MAX>,
        /// A connected socket to the daemon. Without one, requests wait: a machine that will be
        /// saved has a file system, and only those that go on from it have its files.
        socket: List<Descriptor, 1>,
        /// Request queues, besides the one for high priority.
        queues: u16,
    }
}

wire_struct! {
    /// One connection that the guest may open to the host.
    VsockPort {
        /// Port of the host (CID 2).
        port: u32,
        /// The already connected stream socket it gets. Several entries of one port are taken in
        /// order.
        socket: Descriptor,
    }
}

wire_struct! {
    /// The socket device.
    Vsock {
        /// The guest's context id.
        cid: u64,
        /// A listening unix stream socket: `CONNECT <port>\n` on it reaches a port of the guest.
        listener: Descriptor,
        /// What the guest may dial.
        ports: List<VsockPort, VSOCK_PORTS_MAX>,
    }
}

wire_struct! {
    /// A file as persistent memory, read-only, for DAX.
    Pmem {
        /// The file: its size is the region's, up to a multiple of 2 MiB, and what is past its
        /// end reads as zero.
        file: Descriptor,
    }
}

wire_struct! {
    /// Random numbers of the host.
    #[derive(Copy, Default)]
    Rng {}
}

wire_struct! {
    /// The guest's log, towards the host only.
    Console {
        /// Where its bytes go: a pipe, written without blocking; what does not fit is dropped and
        /// counted.
        output: Descriptor,
    }
}

wire_struct! {
    /// The balloon.
    Balloon {
        /// The guest may take pages back when it is out of memory.
        deflate_on_oom: bool,
        /// Free pages go back to the host at once.
        free_page_reporting: bool,
    }
}

wire_struct! {
    /// Memory beyond the boot memory, up to `Machine.memory_max_bytes`.
    Mem {
        /// Granularity; a power of two, at least 2 MiB.
        block_bytes: u64,
        /// Plugged at the start, without a request.
        requested_bytes: u64,
    }
}

wire_struct! {
    /// A PCI function of the host, passed through by VFIO.
    Function {
        /// The function, as its group opened it, or its own device node.
        function: Descriptor,
        /// Its group, in the container; none with iommufd.
        group: List<Descriptor, 1>,
        /// The group's number: functions of one group name the same.
        group_number: u32,
        /// What lets functions reach memory: the group's container, or iommufd. All functions of a
        /// machine name the same.
        view: Descriptor,
    }
}

wire_choice! {
    /// A kind of device with its parameters.
    DeviceKind {
        /// Disk.
        Blk(Blk) = 1,
        /// Network interface.
        Net(Net) = 2,
        /// Shared file system.
        Fs(Fs) = 3,
        /// Sockets.
        Vsock(Vsock) = 4,
        /// Persistent memory.
        Pmem(Pmem) = 5,
        /// Random numbers.
        Rng(Rng) = 6,
        /// Log.
        Console(Console) = 7,
        /// Balloon.
        Balloon(Balloon) = 8,
        /// Pluggable memory.
        Mem(Mem) = 9,
        /// A function of the host.
        Function(Function) = 10,
    }
}

wire_struct! {
    /// One device.
    Device {
        /// Its name.
        name: DeviceName,
        /// What it is.
        kind: DeviceKind,
    }
}

impl Device {
    /// Checks what the encoding cannot.
    ///
    /// # Errors
    /// Names the first field that is out of its bounds.
    pub fn check(&self) -> Result<(), FieldError> {
        check_name(self.name.as_str())?;
        match &self.kind {
            DeviceKind::Blk(blk) => within("Blk.queues", blk.queues, QUEUES_MAX),
            DeviceKind::Net(net) => net.check(),
            DeviceKind::Fs(fs) => fs.check(),
            DeviceKind::Vsock(vsock) => vsock.check(),
            DeviceKind::Mem(mem) => mem.check(),
            _ => Ok(()),
        }
    }
}

fn check_name(name: &str) -> Result<(), FieldError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || !name.chars().all(valid) {
        let reason = format!("{name:?} is not letters, digits, '-', '_' and '.'");
        return Err(FieldError::new("Device.name", reason));
    }
    Ok(())
}

fn within(field: &'static str, count: u16, max: u16) -> Result<(), FieldError> {
    if count == 0 || count > max {
        return Err(FieldError::new(
            field,
            format!("{count} is not between 1 and {max}"),
        ));
    }
    Ok(())
}

impl Net {
    fn check(&self) -> Result<(), FieldError> {
        let taps = self.taps.as_slice().len();
        let vhosts = self.vhosts.as_slice().len();
        if taps == 0 {
            return Err(FieldError::new("Net.taps", "there is no tap descriptor"));
        }
        if vhosts != 0 && vhosts != taps {
            let reason = format!("{vhosts} vhost descriptors for {taps} queue pairs");
            return Err(FieldError::new("Net.vhosts", reason));
        }
        let limited = self.receive_limit != RateLimit::default()
            || self.transmit_limit != RateLimit::default();
        if vhosts != 0 && limited {
            let reason =
                "vhost moves packets without limits: pass no vhost descriptor, or no limit";
            return Err(FieldError::new("Net.vhosts", reason));
        }
        if self.mtu < MTU_MIN {
            let reason = format!("{} is below {MTU_MIN}", self.mtu);
            return Err(FieldError::new("Net.mtu", reason));
        }
        if self.mac[0] & 1 != 0 {
            return Err(FieldError::new("Net.mac", "it is a group address"));
        }
        Ok(())
    }
}

impl Fs {
    fn check(&self) -> Result<(), FieldError> {
        if self.tag.is_empty() {
            return Err(FieldError::new("Fs.tag", "it is empty"));
        }
        within("Fs.queues", self.queues, QUEUES_MAX)
    }
}

impl Vsock {
    fn check(&self) -> Result<(), FieldError> {
        // 0 to 2 are reserved, and so is the highest number (virtio 1.2 §5.10.4).
        if self.cid < 3 || self.cid >= u64::from(u32::MAX) {
            let reason = format!("{} is not between 3 and {}", self.cid, u32::MAX - 1);
            return Err(FieldError::new("Vsock.cid", reason));
        }
        Ok(())
    }
}

impl Mem {
    fn check(&self) -> Result<(), FieldError> {
        if !self.block_bytes.is_power_of_two() || self.block_bytes < super::ALIGNMENT_BYTES {
            let reason = format!("{} is no power of two of 2 MiB or more", self.block_bytes);
            return Err(FieldError::new("Mem.block_bytes", reason));
        }
        if !self.requested_bytes.is_multiple_of(self.block_bytes) {
            let reason = format!("{} is no multiple of the block", self.requested_bytes);
            return Err(FieldError::new("Mem.requested_bytes", reason));
        }
        Ok(())
    }
}
