//! Does an ELF file carry a PVH entry point? Bounded reads of a foreign file.
//!
//! ELF-64 object file format: file header, program headers, note sections. The note is
//! XEN_ELFNOTE_PHYS32_ENTRY of Xen's `public/elfnote.h`, which Linux emits with CONFIG_PVH.

use std::io::{self, Read, Seek, SeekFrom};

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Most program headers looked at; Linux has 4 to 5.
const PROGRAM_HEADERS_MAX: usize = 64;
/// Largest note segment in bytes; Linux's is below 1 KiB.
const NOTES_BYTES_MAX: u64 = 64 << 10;

/// What kind of kernel file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KernelFile {
    /// ELF with a PVH entry at this guest-physical address.
    Pvh(u32),
    /// ELF without one.
    NoPvhNote,
    /// ELF of another machine, of 32 bits or big-endian.
    OtherMachine,
    /// A compressed kernel (bzImage).
    BzImage,
    /// None of these.
    NotElf,
}

/// Reads the headers and notes of a kernel file.
pub(crate) fn inspect(file: &mut (impl Read + Seek)) -> io::Result<KernelFile> {
    let mut header = [0; HEADER_BYTES];
    file.seek(SeekFrom::Start(0))?;
    if !filled(file, &mut header)? || &header[..4] != b"\x7fELF" {
        return is_bzimage(file).map(|yes| {
            if yes {
                KernelFile::BzImage
            } else {
                KernelFile::NotElf
            }
        });
    }
    // e_ident[EI_CLASS] = 2 (64 bits), e_ident[EI_DATA] = 1 (little-endian), e_machine = 62
    // (x86-64).
    if header[4] != 2 || header[5] != 1 || u16_at(&header, 18) != Some(62) {
        return Ok(KernelFile::OtherMachine);
    }
    let table = u64_at(&header, 32).unwrap_or(0);
    let count = usize::from(u16_at(&header, 56).unwrap_or(0)).min(PROGRAM_HEADERS_MAX);
    let mut headers = vec![0; count * PROGRAM_HEADER_BYTES];
    file.seek(SeekFrom::Start(table))?;
    if usize::from(u16_at(&header, 54).unwrap_or(0)) != PROGRAM_HEADER_BYTES
        || !filled(file, &mut headers)?
    {
        return Ok(KernelFile::NoPvhNote);
    }
    for header in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        if u32_at(header, 0) != Some(PT_NOTE) {
            continue;
        }
        let (offset, size) = (
            u64_at(header, 8).unwrap_or(0),
            u64_at(header, 32).unwrap_or(0),
        );
        let mut notes = Vec::new();
        file.seek(SeekFrom::Start(offset))?;
        file.take(size.min(NOTES_BYTES_MAX))
            .read_to_end(&mut notes)?;
        if let Some(entry) = pvh_entry(&notes) {
            return Ok(KernelFile::Pvh(entry));
        }
    }
    Ok(KernelFile::NoPvhNote)
}

/// The PVH entry of a note segment.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    // Each turn takes at least the 12 bytes of a note's header, so the loop ends.
    while let (Some(name_size), Some(desc_size), Some(kind)) =
        (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
    {
        let name_size = usize::try_from(name_size).ok()?;
        let desc_size = usize::try_from(desc_size).ok()?;
        let desc_start = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let next = desc_start.checked_add(desc_size.checked_next_multiple_of(4)?)?;
        let name = notes.get(12..12usize.checked_add(name_size)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return u32_at(notes, desc_start);
        }
        notes = notes.get(next..)?;
    }
    None
}

/// Linux boot protocol, section "The real-mode kernel header": `HdrS` at 0x202.
fn is_bzimage(file: &mut (impl Read + Seek)) -> io::Result<bool> {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(0x202))?;
    Ok(filled(file, &mut magic)? && &magic == b"HdrS")
}

fn filled(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Cursor;

    use super::*;

    /// A kernel of nothing but headers and one note.
    pub(crate) fn kernel_with_note(name: &[u8; 4], kind: u32, entry: u32) -> Vec<u8> {
        let mut file = vec![0; HEADER_BYTES + PROGRAM_HEADER_BYTES];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 4;
        file[72] = 120;
        file[64 + 32] = 20;
        for part in [
            4u32.to_le_bytes(),
            4u32.to_le_bytes(),
            kind.to_le_bytes(),
            *name,
        ] {
            file.extend_from_slice(&part);
        }
        file.extend_from_slice(&entry.to_le_bytes());
        file
    }

    fn kind_of(file: Vec<u8>) -> KernelFile {
        inspect(&mut Cursor::new(file)).unwrap()
    }

    #[test]
    fn kernels_are_told_apart() {
        let good = kernel_with_note(b"Xen\0", 18, 0x100_0000);
        assert_eq!(kind_of(good.clone()), KernelFile::Pvh(0x100_0000));
        // The segment's size leaves room for the note's header and name only: the entry lies
        // outside.
        let mut short = good.clone();
        short[64 + 32] = 16;
        assert_eq!(kind_of(short), KernelFile::NoPvhNote);
        assert_eq!(
            kind_of(kernel_with_note(b"GNU\0", 18, 1)),
            KernelFile::NoPvhNote
        );
        let mut arm = good;
        arm[18] = 183;
        assert_eq!(kind_of(arm), KernelFile::OtherMachine);
        let mut bzimage = vec![0; 0x210];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kind_of(bzimage), KernelFile::BzImage);
        assert_eq!(kind_of(Vec::new()), KernelFile::NotElf);
        assert_eq!(kind_of(vec![7; 100]), KernelFile::NotElf);
    }

    #[test]
    fn no_cut_or_damaged_file_panics() {
        let whole = kernel_with_note(b"Xen\0", 18, 0x100_0000);
        for length in 0..whole.len() {
            kind_of(whole[..length].to_vec());
        }
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                // Offsets beyond what a file position can be are an error, not a panic.
                let _ = inspect(&mut Cursor::new(damaged));
            }
        }
    }
}
