//! An empty ext4 file system, as the few blocks that are not zero in it.
//!
//! Format: the kernel's `Documentation/filesystems/ext4`. What is chosen here:
//!
//! * 4 KiB blocks, groups of 128 MiB, one inode for every 16 KiB.
//! * A journal, so that a disk whose VM was killed mounts consistent again.
//! * Group checksums (`uninit_bg`): groups say that their bitmaps are not written. Group 0's are,
//!   and the last one's for its end, which e2fsck wants marked.
//! * No copies of the superblock (`sparse_super2` with none named): nobody repairs such a disk.
//! * No `lost+found`: a volume begins empty.
//!
//! The result is a pure function of its arguments. `e2fsck` is asked about it in the tests.

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks of a group: what one block of bitmap can tell.
const GROUP_BLOCKS: u64 = 8 * BLOCK as u64;
/// Bytes of an inode.
const INODE_BYTES: usize = 256;
/// Inodes of one block of the table.
const INODES_PER_BLOCK: u64 = (BLOCK / INODE_BYTES) as u64;
/// Blocks for each inode: 16 KiB.
const BLOCKS_PER_INODE: u64 = 4;
/// Inodes 1 to 10 are the file system's own.
const RESERVED_INODES: u64 = 10;
/// Bytes of a group's descriptor without the `64bit` feature.
const DESCRIPTOR_BYTES: usize = 32;
/// The kernel takes no journal with fewer blocks (`JBD2_MIN_JOURNAL_BLOCKS`).
const JOURNAL_BLOCKS_MIN: u64 = 1024;
/// 16 MiB: a commit of a busy container fits, and no more space of the host is ever taken by it.
const JOURNAL_BLOCKS_MAX: u64 = 4096;
/// A last group must hold its own tables and be of some use.
const LAST_GROUP_SPARE_BLOCKS: u64 = 64;

/// Smallest disk in bytes: half of it is the journal.
pub(super) const DISK_BYTES_MIN: u64 = 8 << 20;
/// Largest disk in bytes: block numbers of 32 bits, less the one that would not fit.
pub(super) const DISK_BYTES_MAX: u64 = (1 << 44) - BLOCK as u64;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_EXT_ATTR: u32 = 0x8;
const COMPAT_DIR_INDEX: u32 = 0x20;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT_FILETYPE: u32 = 0x2;
const INCOMPAT_EXTENTS: u32 = 0x40;
const RO_COMPAT_LARGE_FILE: u32 = 0x2;
const RO_COMPAT_HUGE_FILE: u32 = 0x8;
const RO_COMPAT_GDT_CSUM: u32 = 0x10;
const RO_COMPAT_DIR_NLINK: u32 = 0x20;
const RO_COMPAT_EXTRA_ISIZE: u32 = 0x40;

const GROUP_INODES_UNUSED: u16 = 0x1;
const GROUP_BLOCKS_UNUSED: u16 = 0x2;

const ROOT_INODE: u64 = 2;
const JOURNAL_INODE: u64 = 8;
const INODE_EXTENTS: u32 = 0x8_0000;
const MODE_DIRECTORY: u16 = 0o040_755;
const MODE_FILE: u16 = 0o100_600;

/// What makes one file system differ from another of its size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    /// Its UUID.
    pub(super) uuid: [u8; 16],
    /// Seed of the hashes in directories.
    pub(super) hash_seed: [u8; 16],
    /// Seconds since the epoch.
    pub(super) now_s: u32,
}

/// Bytes to be written at an offset.
pub(super) type Extent = (u64, Vec<u8>);

/// Where things lie, in blocks.
#[derive(Debug, Clone, Copy)]
struct Layout {
    blocks: u64,
    groups: u64,
    inodes_per_group: u64,
    table_blocks: u64,
    journal_blocks: u64,
    /// First block after superblock and descriptors.
    bitmap: u64,
}

impl Layout {
    fn of(disk_bytes: u64) -> Option<Self> {
        if !(DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&disk_bytes) {
            return None;
        }
        let mut blocks = disk_bytes / BLOCK as u64;
        let inodes = blocks.min(GROUP_BLOCKS) / BLOCKS_PER_INODE;
        let inodes_per_group = inodes.next_multiple_of(INODES_PER_BLOCK);
        let table_blocks = inodes_per_group / INODES_PER_BLOCK;
        let last = blocks % GROUP_BLOCKS;
        if blocks > GROUP_BLOCKS && last < 2 + table_blocks + LAST_GROUP_SPARE_BLOCKS {
            blocks -= last;
        }
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let descriptor_blocks = (groups * DESCRIPTOR_BYTES as u64).div_ceil(BLOCK as u64);
        Some(Self {
            blocks,
            groups,
            inodes_per_group,
            table_blocks,
            journal_blocks: (blocks / 64).clamp(JOURNAL_BLOCKS_MIN, JOURNAL_BLOCKS_MAX),
            bitmap: 1 + descriptor_blocks,
        })
    }

    /// First of the inode table's blocks in group 0, after both bitmaps.
    fn table(&self) -> u64 {
        self.bitmap + 2
    }

    fn root(&self) -> u64 {
        self.table() + self.table_blocks
    }

    fn journal(&self) -> u64 {
        self.root() + 1
    }

    /// Blocks in use in group 0, from its first on.
    fn used(&self) -> u64 {
        self.journal() + self.journal_blocks
    }

    fn blocks_of(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP_BLOCKS).min(GROUP_BLOCKS)
    }

    fn free_of(&self, group: u64) -> u64 {
        match group {
            0 => self.blocks_of(0) - self.used(),
            _ => self.blocks_of(group) - 2 - self.table_blocks,
        }
    }
}

/// The blocks of an empty file system on a disk of `disk_bytes`, in ascending order; `None` when
/// the size is not within [`DISK_BYTES_MIN`] and [`DISK_BYTES_MAX`].
pub(super) fn make(disk_bytes: u64, identity: &Identity) -> Option<Vec<Extent>> {
    let layout = Layout::of(disk_bytes)?;
    // Superblock, descriptors, both bitmaps and the table's first block lie side by side.
    let mut head = vec![0; BLOCK];
    head[1024..2048].copy_from_slice(&superblock(&layout, identity));
    head.extend(descriptors(&layout, &identity.uuid));
    head.resize(at(layout.bitmap), 0);
    head.extend(bitmap(layout.used(), layout.blocks_of(0)));
    head.extend(bitmap(RESERVED_INODES, layout.inodes_per_group));
    head.extend(inodes(&layout, identity.now_s));
    let mut extents = vec![
        (0, head),
        (layout.root() * BLOCK as u64, root_directory()),
        (
            layout.journal() * BLOCK as u64,
            journal_superblock(&layout, &identity.uuid),
        ),
    ];
    let last = layout.groups - 1;
    if last > 0 {
        let used = layout.blocks_of(last) - layout.free_of(last);
        extents.push((
            last * GROUP_BLOCKS * BLOCK as u64,
            bitmap(used, layout.blocks_of(last)),
        ));
    }
    Some(extents)
}

/// Offset of one of the first blocks: those of a head in memory.
fn at(block: u64) -> usize {
    usize::try_from(block).map_or(0, |block| block * BLOCK)
}

/// The low half of a number that the format has no high half for: [`DISK_BYTES_MAX`] keeps it.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn short(value: u64) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

/// A record of little-endian fields at given offsets.
struct Record<const N: usize>([u8; N]);

impl<const N: usize> Record<N> {
    fn new() -> Self {
        Self([0; N])
    }

    fn bytes(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u16(&mut self, offset: usize, value: u16) -> &mut Self {
        self.bytes(offset, &value.to_le_bytes())
    }

    fn u32(&mut self, offset: usize, value: u32) -> &mut Self {
        self.bytes(offset, &value.to_le_bytes())
    }
}

/// Offsets: `Documentation/filesystems/ext4/super.rst`.
fn superblock(layout: &Layout, identity: &Identity) -> [u8; 1024] {
    let inodes = layout.inodes_per_group * layout.groups;
    let free: u64 = (0..layout.groups).map(|group| layout.free_of(group)).sum();
    let compat = COMPAT_HAS_JOURNAL | COMPAT_EXT_ATTR | COMPAT_DIR_INDEX | COMPAT_SPARSE_SUPER2;
    let ro_compat = RO_COMPAT_LARGE_FILE
        | RO_COMPAT_HUGE_FILE
        | RO_COMPAT_GDT_CSUM
        | RO_COMPAT_DIR_NLINK
        | RO_COMPAT_EXTRA_ISIZE;
    let mut record = Record::<1024>::new();
    record
        .u32(0x00, low(inodes))
        .u32(0x04, low(layout.blocks))
        .u32(0x0c, low(free))
        .u32(0x10, low(inodes - RESERVED_INODES))
        .u32(0x18, 2) // log2(block / 1 KiB)
        .u32(0x1c, 2)
        .u32(0x20, low(GROUP_BLOCKS))
        .u32(0x24, low(GROUP_BLOCKS))
        .u32(0x28, low(layout.inodes_per_group))
        .u32(0x30, identity.now_s)
        .u16(0x36, u16::MAX) // no check after so many mounts
        .u16(0x38, 0xef53)
        .u16(0x3a, 1) // clean
        .u16(0x3c, 2) // on errors: read-only
        .u32(0x40, identity.now_s)
        .u32(0x4c, 1) // revision with dynamic inode sizes
        .u32(0x54, low(RESERVED_INODES + 1))
        .u16(0x58, short(INODE_BYTES as u64))
        .u32(0x5c, compat)
        .u32(0x60, INCOMPAT_FILETYPE | INCOMPAT_EXTENTS)
        .u32(0x64, ro_compat)
        .bytes(0x68, &identity.uuid)
        .u32(0xe0, low(JOURNAL_INODE))
        .bytes(0xec, &identity.hash_seed)
        .bytes(0xfc, &[1, 1]) // half MD4; a copy of the journal's blocks follows
        .u32(0x100, 0xc) // user_xattr, acl
        .u32(0x108, identity.now_s)
        .bytes(0x10c, &extent(layout.journal(), layout.journal_blocks))
        .u32(0x14c, low(layout.journal_blocks * BLOCK as u64))
        .u16(0x15c, 32)
        .u16(0x15e, 32)
        .u32(0x160, 1); // signed directory hashes
    record.0
}

fn descriptors(layout: &Layout, uuid: &[u8; 16]) -> Vec<u8> {
    let seed = crc16(u16::MAX, uuid);
    (0..layout.groups)
        .flat_map(|group| {
            let first = group * GROUP_BLOCKS;
            let (bitmap, free_inodes, flags) = match group {
                0 => (layout.bitmap, layout.inodes_per_group - RESERVED_INODES, 0),
                _ if group == layout.groups - 1 => {
                    (first, layout.inodes_per_group, GROUP_INODES_UNUSED)
                }
                _ => (
                    first,
                    layout.inodes_per_group,
                    GROUP_INODES_UNUSED | GROUP_BLOCKS_UNUSED,
                ),
            };
            let mut record = Record::<DESCRIPTOR_BYTES>::new();
            record
                .u32(0x00, low(bitmap))
                .u32(0x04, low(bitmap + 1))
                .u32(0x08, low(bitmap + 2))
                .u16(0x0c, short(layout.free_of(group)))
                .u16(0x0e, short(free_inodes))
                .u16(0x10, u16::from(group == 0)) // directories: the root
                .u16(0x12, flags)
                .u16(0x1c, short(free_inodes)); // at the end of the table, never used
            let sum = crc16(crc16(seed, &low(group).to_le_bytes()), &record.0[..0x1e]);
            record.u16(0x1e, sum);
            record.0
        })
        .collect()
}

/// A block of bits: `used` ones, zeroes up to `count`, and ones for what does not exist.
fn bitmap(used: u64, count: u64) -> Vec<u8> {
    (0..BLOCK as u64)
        .map(|byte| {
            (0..8).fold(0, |bits, bit| {
                let index = byte * 8 + bit;
                bits | u8::from(index < used || index >= count) << bit
            })
        })
        .collect()
}

/// The first block of the inode table: the root and the journal are in it.
fn inodes(layout: &Layout, now_s: u32) -> Vec<u8> {
    let mut table = vec![0; BLOCK];
    for (number, mode, links, first, blocks) in [
        (ROOT_INODE, MODE_DIRECTORY, 2, layout.root(), 1),
        (
            JOURNAL_INODE,
            MODE_FILE,
            1,
            layout.journal(),
            layout.journal_blocks,
        ),
    ] {
        let mut record = Record::<INODE_BYTES>::new();
        record
            .u16(0x00, mode)
            .u32(0x04, low(blocks * BLOCK as u64))
            .u32(0x08, now_s)
            .u32(0x0c, now_s)
            .u32(0x10, now_s)
            .u16(0x1a, links)
            .u32(0x1c, low(blocks * (BLOCK as u64 / 512)))
            .u32(0x20, INODE_EXTENTS)
            .bytes(0x28, &extent(first, blocks))
            .u16(0x80, 32)
            .u32(0x90, now_s);
        let offset = usize::try_from(number - 1).map_or(0, |index| index * INODE_BYTES);
        table[offset..offset + INODE_BYTES].copy_from_slice(&record.0);
    }
    table
}

/// The `i_block` of a file in one piece (`Documentation/filesystems/ext4/ifork.rst`).
fn extent(first: u64, blocks: u64) -> [u8; 60] {
    let mut record = Record::<60>::new();
    record
        .u16(0, 0xf30a)
        .u16(2, 1)
        .u16(4, 4)
        .u16(16, short(blocks))
        .u32(20, low(first));
    record.0
}

fn root_directory() -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    let mut record = Record::<24>::new();
    let rest = BLOCK as u64 - 12;
    record
        .u32(0, low(ROOT_INODE))
        .u16(4, 12)
        .bytes(6, &[1, 2, b'.'])
        .u32(12, low(ROOT_INODE))
        .u16(16, short(rest))
        .bytes(18, &[2, 2, b'.', b'.']);
    block[..24].copy_from_slice(&record.0);
    block
}

/// Big-endian (`Documentation/filesystems/ext4/journal.rst`). Its start is 0: nothing to replay.
fn journal_superblock(layout: &Layout, uuid: &[u8; 16]) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    for (offset, value) in [
        (0x00, 0xc03b_3998),
        (0x04, 4), // superblock, version 2
        (0x0c, low(BLOCK as u64)),
        (0x10, low(layout.journal_blocks)),
        (0x14, 1), // first block of the log
        (0x18, 1), // first transaction
        (0x40, 1), // users
    ] {
        block[offset..offset + 4].copy_from_slice(&u32::to_be_bytes(value));
    }
    block[0x30..0x40].copy_from_slice(uuid);
    block
}

/// CRC-16 with polynomial 0x8005, reflected.
fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xa001 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt, process::Command};

    use super::*;

    const IDENTITY: Identity = Identity {
        uuid: *b"pericarp's uuid.",
        hash_seed: [7; 16],
        now_s: 1_700_000_000,
    };

    #[test]
    fn the_checksum_is_crc_16_arc() {
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for bytes in [0, DISK_BYTES_MIN - 1, DISK_BYTES_MAX + 1, u64::MAX] {
            assert!(make(bytes, &IDENTITY).is_none(), "{bytes}");
        }
        assert!(make(DISK_BYTES_MAX, &IDENTITY).is_some());
    }

    #[test]
    fn e2fsck_finds_nothing_to_mend() {
        if Command::new("e2fsck").arg("-V").output().is_err() {
            eprintln!("skipped: no e2fsck here");
            return;
        }
        const MIB: u64 = 1 << 20;
        let sizes = [
            DISK_BYTES_MIN,
            64 * MIB,
            128 * MIB,
            // A last group that is dropped, and one that is not.
            129 * MIB,
            140 * MIB + 512,
            10 << 30,
            (1 << 40) + 3 * MIB,
        ];
        for bytes in sizes {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(bytes).unwrap();
            for (offset, extent) in make(bytes, &IDENTITY).unwrap() {
                file.as_file().write_all_at(&extent, offset).unwrap();
            }
            let output = Command::new("e2fsck")
                .arg("-fn")
                .arg(file.path())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{bytes} bytes: {said}");
        }
    }

    #[test]
    fn e2fsck_would_find_a_wrong_group() {
        if Command::new("e2fsck").arg("-V").output().is_err() {
            eprintln!("skipped: no e2fsck here");
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DISK_BYTES_MIN).unwrap();
        for (offset, extent) in make(DISK_BYTES_MIN, &IDENTITY).unwrap() {
            file.as_file().write_all_at(&extent, offset).unwrap();
        }
        let file_again: &File = file.as_file();
        file_again.write_all_at(&[0xff, 0xff], 4096 + 0x0c).unwrap();
        let checked = Command::new("e2fsck").arg("-fn").arg(file.path()).output();
        assert!(!checked.unwrap().status.success());
    }
}
