//! Requests and configuration of a disk. Pure functions.

use pericarp_sys::disk_io::{PUNCH_HOLE, ZERO_RANGE};

/// Device ID (virtio 1.2 §5.2.1).
pub(crate) const DEVICE_TYPE: u16 = 2;
/// Queues of one disk: one per vCPU helps up to about this many.
pub(crate) const QUEUES_MAX: u16 = 16;
/// A sector of the protocol, whatever the disk's block size is (§5.2.6).
pub(crate) const SECTOR_BYTES: u64 = 512;
/// `struct virtio_blk_req` before its data: type, reserved, sector.
pub(crate) const HEADER_BYTES: usize = 16;
/// Bytes of the serial that a driver reads.
pub(crate) const SERIAL_BYTES: usize = 20;
/// `struct virtio_blk_discard_write_zeroes`: sector, count, flags.
pub(crate) const RANGE_BYTES: usize = 16;

// Feature bits (§5.2.3).
pub(crate) const F_SEG_MAX: u64 = 1 << 2;
pub(crate) const F_RO: u64 = 1 << 5;
pub(crate) const F_BLK_SIZE: u64 = 1 << 6;
pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_TOPOLOGY: u64 = 1 << 10;
pub(crate) const F_MQ: u64 = 1 << 12;
pub(crate) const F_DISCARD: u64 = 1 << 13;
pub(crate) const F_WRITE_ZEROES: u64 = 1 << 14;

// Request types (§5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
const FLAG_UNMAP: u32 = 1;

/// What a driver is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// Done.
    Ok = 0,
    /// Refused or failed.
    IoError = 1,
    /// Not known here.
    Unsupported = 2,
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Size in bytes: a multiple of [`SECTOR_BYTES`].
    pub(crate) bytes: u64,
    /// Nothing may be written.
    pub(crate) read_only: bool,
    /// The negotiated features.
    pub(crate) features: u64,
    /// The most bytes of one discard or write-zeroes request.
    pub(crate) range_bytes_max: u64,
}

/// A checked request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// Read `len` bytes at `offset`.
    Read { offset: u64, len: u64 },
    /// Write `len` bytes at `offset`.
    Write { offset: u64, len: u64 },
    /// Make what was written durable.
    Flush,
    /// Tell the serial.
    GetId,
    /// Discard a range, or make it read as zeroes when `zero`.
    Clear {
        offset: u64,
        len: u64,
        /// The mode of `fallocate`.
        mode: i32,
        zero: bool,
    },
    /// Nothing to do: an empty range.
    Nothing,
}

/// Checks a request: its header, the bytes of data in either direction, and for range requests the
/// data itself.
pub(crate) fn parse(
    header: &[u8; HEADER_BYTES],
    readable: u64,
    writable: u64,
    range: Option<&[u8; RANGE_BYTES]>,
    disk: &Disk,
) -> Result<Request, Status> {
    let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
    match kind {
        T_IN => span(sector, writable, disk).map(|offset| Request::Read {
            offset,
            len: writable,
        }),
        T_OUT if disk.read_only => Err(Status::IoError),
        T_OUT => span(sector, readable, disk).map(|offset| Request::Write {
            offset,
            len: readable,
        }),
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID if writable < SERIAL_BYTES as u64 => Err(Status::IoError),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD | T_WRITE_ZEROES => {
            let feature = if kind == T_DISCARD {
                F_DISCARD
            } else {
                F_WRITE_ZEROES
            };
            if disk.features & feature == 0 {
                return Err(Status::Unsupported);
            }
            if disk.read_only || readable != RANGE_BYTES as u64 {
                return Err(Status::IoError);
            }
            parse_range(range.ok_or(Status::IoError)?, kind == T_WRITE_ZEROES, disk)
        }
        _ => Err(Status::Unsupported),
    }
}

fn parse_range(range: &[u8; RANGE_BYTES], zero: bool, disk: &Disk) -> Result<Request, Status> {
    let sector = u64::from_le_bytes(range[..8].try_into().expect("8 bytes"));
    let sectors = u32::from_le_bytes(range[8..12].try_into().expect("4 bytes"));
    let flags = u32::from_le_bytes(range[12..].try_into().expect("4 bytes"));
    // §5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
    if flags & !FLAG_UNMAP != 0 || (!zero && flags != 0) {
        return Err(Status::Unsupported);
    }
    let len = u64::from(sectors) * SECTOR_BYTES;
    let offset = span(sector, len, disk)?;
    if len > disk.range_bytes_max {
        return Err(Status::IoError);
    }
    if len == 0 {
        return Ok(Request::Nothing);
    }
    let mode = if zero && flags & FLAG_UNMAP == 0 {
        ZERO_RANGE
    } else {
        PUNCH_HOLE
    };
    Ok(Request::Clear {
        offset,
        len,
        mode,
        zero,
    })
}

/// Byte offset of a range that is whole sectors and lies on the disk.
fn span(sector: u64, len: u64, disk: &Disk) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if len.is_multiple_of(SECTOR_BYTES) && end <= disk.bytes {
        Ok(offset)
    } else {
        Err(Status::IoError)
    }
}

/// Length of `struct virtio_blk_config` (§5.2.4).
pub(crate) const CONFIG_BYTES: usize = 60;

/// What stands in the configuration beside the size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) segments_max: u32,
    pub(crate) block_bytes: u32,
    pub(crate) queues: u16,
    pub(crate) range_bytes_max: u64,
}

/// Blocks of this size are written without reading first by most file systems below.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;

/// Device configuration.
pub(crate) fn config(bytes: u64, shape: Shape) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    let range_sectors = u32::try_from(shape.range_bytes_max / SECTOR_BYTES).unwrap_or(u32::MAX);
    let exponent = (PHYSICAL_BLOCK_BYTES / shape.block_bytes).max(1).ilog2();
    put(0, &(bytes / SECTOR_BYTES).to_le_bytes());
    put(12, &shape.segments_max.to_le_bytes());
    put(20, &shape.block_bytes.to_le_bytes());
    put(24, &exponent.to_le_bytes()[..1]);
    put(26, &1u16.to_le_bytes());
    put(34, &shape.queues.to_le_bytes());
    // Discard: sectors, ranges in a request, alignment in sectors.
    put(36, &range_sectors.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &(shape.block_bytes / 512).to_le_bytes());
    // Write zeroes: sectors, ranges in a request, whether it may give blocks back.
    put(48, &range_sectors.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    config
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: Disk = Disk {
        bytes: 1 << 20,
        read_only: false,
        features: F_DISCARD | F_WRITE_ZEROES,
        range_bytes_max: 1 << 19,
    };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; RANGE_BYTES] {
        let mut range = [0; RANGE_BYTES];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        range
    }

    #[test]
    fn reads_and_writes_stay_on_the_disk() {
        let io = Err(Status::IoError);
        for (kind, readable, writable) in [(T_IN, 0, 512), (T_OUT, 512, 0)] {
            let at = |sector| parse(&header(kind, sector), readable, writable, None, &DISK);
            assert!(at(0).is_ok());
            assert!(at(2047).is_ok());
            assert_eq!(at(2048), io);
            assert_eq!(at(u64::MAX), io);
            assert_eq!(at(u64::MAX / 512), io);
        }
        assert_eq!(parse(&header(T_IN, 0), 0, 511, None, &DISK), io);
        assert_eq!(parse(&header(T_IN, 0), 0, u64::MAX - 511, None, &DISK), io);
        let read_only = Disk {
            read_only: true,
            ..DISK
        };
        assert_eq!(parse(&header(T_OUT, 0), 512, 0, None, &read_only), io);
        assert_eq!(parse(&header(T_GET_ID, 0), 0, 19, None, &DISK), io);
        for kind in [2, 3, 5, 7, 9, 10, 12, 14, u32::MAX] {
            let answer = parse(&header(kind, 0), 0, 0, None, &DISK);
            assert_eq!(answer, Err(Status::Unsupported), "type {kind}");
        }
    }

    #[test]
    fn ranges_are_checked() {
        let clear = |kind, bytes: [u8; RANGE_BYTES], disk: &Disk| {
            parse(&header(kind, 0), 16, 0, Some(&bytes), disk)
        };
        assert_eq!(
            clear(T_DISCARD, range(1, 2, 0), &DISK),
            Ok(Request::Clear {
                offset: 512,
                len: 1024,
                mode: PUNCH_HOLE,
                zero: false
            })
        );
        assert_eq!(
            clear(T_WRITE_ZEROES, range(1, 2, 0), &DISK),
            Ok(Request::Clear {
                offset: 512,
                len: 1024,
                mode: ZERO_RANGE,
                zero: true
            })
        );
        assert_eq!(
            clear(T_DISCARD, range(1, 0, 0), &DISK),
            Ok(Request::Nothing)
        );
        let io = Err(Status::IoError);
        assert_eq!(clear(T_DISCARD, range(2048, 1, 0), &DISK), io);
        assert_eq!(clear(T_DISCARD, range(0, 1025, 0), &DISK), io);
        assert_eq!(clear(T_DISCARD, range(u64::MAX, u32::MAX, 0), &DISK), io);
        let unsupported = Err(Status::Unsupported);
        assert_eq!(clear(T_DISCARD, range(0, 1, 1), &DISK), unsupported);
        assert_eq!(clear(T_WRITE_ZEROES, range(0, 1, 2), &DISK), unsupported);
        let without = Disk {
            features: 0,
            ..DISK
        };
        assert_eq!(clear(T_DISCARD, range(0, 1, 0), &without), unsupported);
    }

    #[test]
    fn config_is_laid_out_as_the_specification_says() {
        let shape = Shape {
            segments_max: 254,
            block_bytes: 512,
            queues: 4,
            range_bytes_max: 1 << 20,
        };
        let config = config(5 << 20, shape);
        assert_eq!(config[..8], 10240u64.to_le_bytes());
        assert_eq!(config[12..16], 254u32.to_le_bytes());
        assert_eq!(config[20..24], 512u32.to_le_bytes());
        assert_eq!(config[24..28], [3, 0, 1, 0]);
        assert_eq!(config[34..36], [4, 0]);
        assert_eq!(config[36..40], 2048u32.to_le_bytes());
        assert_eq!(config[56], 1);
    }

    proptest! {
        /// Whatever a driver says, what is accepted lies on the disk and is whole sectors.
        #[test]
        fn what_is_accepted_lies_on_the_disk(
            mut header: [u8; HEADER_BYTES],
            small in any::<bool>(),
            readable in 0u64..1 << 34,
            writable in 0u64..1 << 34,
            mut range: [u8; RANGE_BYTES],
            sectors in 0u64..1 << 22,
            read_only: bool,
            features: u64,
        ) {
            if small {
                header[1..4].fill(0);
                header[10..].fill(0);
                range[2..8].fill(0);
            }
            let disk = Disk {
                bytes: sectors * SECTOR_BYTES,
                read_only,
                features,
                range_bytes_max: 1 << 22,
            };
            match parse(&header, readable, writable, Some(&range), &disk) {
                Ok(Request::Read { offset, len }) => {
                    prop_assert!(offset + len <= disk.bytes && len % 512 == 0 && len == writable);
                }
                Ok(Request::Write { offset, len }) => {
                    prop_assert!(offset + len <= disk.bytes && len % 512 == 0 && len == readable);
                    prop_assert!(!read_only);
                }
                Ok(Request::Clear { offset, len, .. }) => {
                    prop_assert!(offset + len <= disk.bytes && len > 0);
                    prop_assert!(!read_only && len <= disk.range_bytes_max);
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
}
