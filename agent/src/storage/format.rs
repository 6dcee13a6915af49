//! Making a file system on a blank disk.
//!
//! The guest's image has no formatting program: [`ext4`] is the one file system that is made here,
//! in the size of the disk, by a handful of writes to the page cache. A disk counts as blank when
//! its beginning holds nothing but zeroes: whatever else is there might be somebody's data, and is
//! left to `mount` to judge.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use pericarp_sys::random;

use super::{
    StorageError,
    ext4::{self, Identity},
};

/// Bytes at the beginning of a disk that are looked at: the superblocks and partition tables of all
/// that the guest can mount begin within them.
const LOOKED_AT_BYTES: u64 = 1 << 20;

/// Formats `device` unless something is on it.
pub(super) fn format_if_blank(device: &Path, fs_type: &str) -> Result<(), StorageError> {
    let read = |source| StorageError::kernel("read disk", device.display())(source);
    let mut file = File::open(device).map_err(read)?;
    if !is_blank(&file).map_err(read)? {
        return Ok(());
    }
    let failed = |reason: String| StorageError::Format {
        device: device.display().to_string(),
        fs_type: fs_type.to_owned(),
        reason,
    };
    if fs_type != "ext4" {
        return Err(failed("ext4 is what can be made here".to_owned()));
    }
    let bytes = file.seek(SeekFrom::End(0)).map_err(read)?;
    let identity = identity().map_err(|error| failed(format!("random bytes: {error}")))?;
    let extents = ext4::make(bytes, &identity).ok_or_else(|| {
        let (min, max) = (ext4::DISK_BYTES_MIN, ext4::DISK_BYTES_MAX);
        failed(format!("it has {bytes} bytes; {min} to {max} are possible"))
    })?;
    let write = || {
        let device = OpenOptions::new().write(true).open(device)?;
        extents
            .iter()
            .try_for_each(|(offset, bytes)| device.write_all_at(bytes, *offset))
    };
    write().map_err(|source| StorageError::kernel("write disk", device.display())(source))
}

fn identity() -> io::Result<Identity> {
    let mut uuid = [0; 16];
    random::fill(&mut uuid)?;
    // RFC 9562 §5.4: version 4 and its variant.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    let mut hash_seed = [0; 16];
    random::fill(&mut hash_seed)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_s = now.map_or(0, |now| u32::try_from(now.as_secs()).unwrap_or(u32::MAX));
    Ok(Identity {
        uuid,
        hash_seed,
        now_s,
    })
}

fn is_blank(device: &File) -> io::Result<bool> {
    let mut left = device.take(LOOKED_AT_BYTES);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match left.read(&mut buffer)? {
            0 => return Ok(true),
            length if buffer[..length].iter().any(|byte| *byte != 0) => return Ok(false),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn only_zeroes_are_blank_and_are_formatted_once() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let open = |path: &Path| File::open(path).unwrap();
        assert!(is_blank(&open(file.path())).unwrap());
        let error = format_if_blank(file.path(), "xfs").unwrap_err().to_string();
        assert!(error.contains("xfs"), "{error}");
        format_if_blank(file.path(), "ext4").unwrap();
        let first = std::fs::read(file.path()).unwrap();
        format_if_blank(file.path(), "ext4").unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), first);

        file.as_file().set_len(0).unwrap();
        file.as_file().set_len(2 << 20).unwrap();
        let error = format_if_blank(file.path(), "ext4")
            .unwrap_err()
            .to_string();
        assert!(error.contains("2097152 bytes"), "{error}");
        file.write_all(&[0, 0, 1]).unwrap();
        assert!(!is_blank(&open(file.path())).unwrap());
    }
}
