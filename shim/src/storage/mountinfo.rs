//! The kernel's table of mounts as text (proc_pid_mountinfo(5)), read by pure functions.
//!
//! Tenants choose names of directories that the kernel writes into the text: a line that cannot be
//! read is left out.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Component, Path, PathBuf},
};

/// Mounts that the calling thread sees.
pub(crate) const OWN: &str = "/proc/thread-self/mountinfo";

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Unique among the mounts that exist, as `STATX_MNT_ID` has it.
    pub(crate) id: u64,
    /// `major:minor` of the file system.
    pub(crate) device: String,
    /// Path within the file system.
    pub(crate) root: PathBuf,
    /// Path as the reader sees it.
    pub(crate) point: PathBuf,
    /// Options of the mount, not of the file system.
    pub(crate) options: String,
    /// Peer group that it belongs to.
    pub(crate) shared: Option<u32>,
    /// Peer group that it receives mounts from.
    pub(crate) master: Option<u32>,
    /// For example `ext4`.
    pub(crate) fs_type: String,
    /// Options of the file system.
    pub(crate) parameters: String,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let device = fields.nth(1)?;
        let (root, point, options) = (fields.next()?, fields.next()?, fields.next()?);
        let (mut shared, mut master) = (None, None);
        loop {
            let field = fields.next()?;
            if field == b"-" {
                break;
            }
            let field = std::str::from_utf8(field).unwrap_or_default();
            match field.split_once(':') {
                Some(("shared", group)) => shared = group.parse().ok(),
                Some(("master", group)) => master = group.parse().ok(),
                _ => {}
            }
        }
        let (fs_type, _device, parameters) = (fields.next()?, fields.next()?, fields.next()?);
        let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
        Some(Self {
            id,
            device: text(device),
            root: path(root),
            point: path(point),
            options: text(options),
            shared,
            master,
            fs_type: text(fs_type),
            parameters: text(parameters),
        })
    }

    /// Whether the mount itself refuses writes; its file system may all the same.
    pub(crate) fn is_read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }
}

/// Reads the whole text, in its order: of mounts on one path the last one is seen.
pub(crate) fn parse(text: &[u8]) -> Vec<Mount> {
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(Mount::parse).collect()
}

/// Decodes the three octal digits that the kernel writes for spaces and similar bytes.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, others)) = rest.split_first() {
        let digits = others.get(..3).filter(|_| *first == b'\\');
        let octal = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() {
            &others[3..]
        } else {
            others
        };
    }
    OsString::from_vec(bytes).into()
}

/// `root` without its first slash; `None` when it leads upwards, or when what was there has been
/// deleted: the kernel appends `//deleted`.
pub(crate) fn plain(root: &Path) -> Option<PathBuf> {
    if root.as_os_str().as_encoded_bytes().ends_with(b"//deleted") {
        return None;
    }
    let mut way = PathBuf::new();
    for component in root.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => way.push(name),
            _ => return None,
        }
    }
    Some(way)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_read_and_names_decoded() {
        let text = b"\
84 22 0:51 /a\\040b\\134c /mnt/\\011x rw,noexec,ro shared:9 master:2 propagate_from:7 - tmpfs t rw
85 22 8:1 / / rw,relatime - ext4 /dev/sda1 rw,errors=remount-ro
86 22 8:1 /gone//deleted /mnt/gone rw,ro_but_not shared:1 - ext4 /dev/sda1 ro
";
        let mounts = parse(text);
        let first = Mount {
            id: 84,
            device: "0:51".to_owned(),
            root: "/a b\\c".into(),
            point: "/mnt/\tx".into(),
            options: "rw,noexec,ro".to_owned(),
            shared: Some(9),
            master: Some(2),
            fs_type: "tmpfs".to_owned(),
            parameters: "rw".to_owned(),
        };
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0], first);
        let read_only: Vec<_> = mounts.iter().map(Mount::is_read_only).collect();
        assert_eq!(read_only, [true, false, false]);
        assert_eq!((mounts[1].shared, mounts[1].master), (None, None));
        let ways: Vec<_> = mounts.iter().map(|mount| plain(&mount.root)).collect();
        assert_eq!(ways, [Some("a b\\c".into()), Some(PathBuf::new()), None]);
        assert_eq!(plain(Path::new("/../x")), None);
    }

    #[test]
    fn lines_that_make_no_sense_are_left_out() {
        for line in [
            "",
            "84",
            "x 22 0:51 / / rw - tmpfs t rw",
            "84 22 0:51 / / rw shared:9 tmpfs t rw",
            "84 22 0:51 / / rw - tmpfs t",
        ] {
            assert_eq!(parse(line.as_bytes()), [], "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in prop::collection::vec(any::<u8>(), 0..400)) {
            for mount in parse(&text) {
                prop_assert!(plain(&mount.root).is_none_or(|way| way.is_relative()));
            }
            let _ = path(&text);
        }
    }
}
