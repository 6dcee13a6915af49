//! Making a file system on a blank disk.
//!
//! The formatting programs are those of the guest's image; an image without them says so. A disk
//! counts as blank when its beginning holds nothing but zeroes: whatever else is there might be
//! somebody's data, and is left to `mount` to judge.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    process::Command,
};

use super::StorageError;

/// Bytes at the beginning of a disk that are looked at: the superblocks and partition tables of all
/// that the guest can mount begin within them.
const LOOKED_AT_BYTES: u64 = 1 << 20;

/// Output of a formatting program that an error carries, in bytes.
const OUTPUT_BYTES_MAX: usize = 512;

/// The program that makes a file system of this type, and its arguments before the device.
pub(crate) fn format_program(fs_type: &str) -> Option<(&'static str, &'static [&'static str])> {
    let candidates: &[(&str, &[&str])] = match fs_type {
        "ext4" => &[
            ("/sbin/mke2fs", &["-q", "-F", "-t", "ext4", "-m", "0"]),
            ("/sbin/mkfs.ext4", &["-q", "-F", "-m", "0"]),
        ],
        "xfs" => &[("/sbin/mkfs.xfs", &["-q", "-f"])],
        _ => &[],
    };
    candidates
        .iter()
        .find(|(program, _)| Path::new(program).exists())
        .copied()
}

/// Formats `device` unless something is on it.
pub(super) fn format_if_blank(device: &Path, fs_type: &str) -> Result<(), StorageError> {
    let blank = is_blank(device)
        .map_err(|source| StorageError::kernel("read disk", device.display())(source))?;
    if !blank {
        return Ok(());
    }
    let failed = |reason: String| StorageError::Format {
        device: device.display().to_string(),
        fs_type: fs_type.to_owned(),
        reason,
    };
    let (program, arguments) = format_program(fs_type)
        .ok_or_else(|| failed("the guest's image has no program for that".to_owned()))?;
    let output = Command::new(program)
        .args(arguments)
        .arg(device)
        .output()
        .map_err(|error| failed(format!("{program}: {error}")))?;
    if !output.status.success() {
        let said = &output.stderr[..output.stderr.len().min(OUTPUT_BYTES_MAX)];
        let said = String::from_utf8_lossy(said);
        return Err(failed(format!(
            "{program}: {}: {}",
            output.status,
            said.trim()
        )));
    }
    Ok(())
}

fn is_blank(device: &Path) -> io::Result<bool> {
    let mut left = File::open(device)?.take(LOOKED_AT_BYTES);
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
    fn only_zeroes_are_blank() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 << 20).unwrap();
        assert!(is_blank(file.path()).unwrap());
        file.write_all(&[0, 0, 1]).unwrap();
        assert!(!is_blank(file.path()).unwrap());
    }
}
