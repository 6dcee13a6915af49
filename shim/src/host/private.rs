//! Directories and files that are root's alone.
//!
//! A pod's state directory leads to layers with set-user-ID programs and to Secrets, which the
//! kubelet and containerd keep from other users of the node by the modes of their own directories
//! (compare CVE-2021-41103). So nobody else may pass through ours: modes are set when something is
//! made, not afterwards.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    unistd::linkat,
};

/// What others than the owner may do.
const OTHERS: u32 = 0o077;

/// Makes a directory, and its parents where they are missing, that its owner alone may use. One
/// that exists is closed to others too.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let mode = fs::metadata(path)?.permissions().mode();
    // Directly beneath the root are directories of the system, such as /run.
    if mode & OTHERS != 0 && fs::canonicalize(path)?.components().count() > 2 {
        fs::set_permissions(path, Permissions::from_mode(mode & 0o700))?;
    }
    Ok(())
}

/// Options to open a file that, if it is made, its owner alone may read and write.
pub(crate) fn file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

/// Replaces a file, or makes it. Readers see all of `content` or none of it, and of several writers
/// the last one wins. Only its owner may read and write it.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}", std::process::id()));
    let mut file = file()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&partial)?;
    file.write_all(content)?;
    fs::rename(partial, path)
}

/// Makes a file without a name on the file system of `directory`. It is removed when it is closed,
/// unless it was given a [`name`].
pub(crate) fn nameless(directory: &Path) -> io::Result<File> {
    file()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(directory)
}

/// Gives a nameless file its name and makes it read-only.
pub(crate) fn name(file: &File, path: &Path) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o400))?;
    let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    // Through /proc, as linkat(2) says: the empty path needs CAP_DAC_READ_SEARCH.
    linkat(
        AT_FDCWD,
        descriptor.as_str(),
        AT_FDCWD,
        path,
        AtFlags::AT_SYMLINK_FOLLOW,
    )
    .map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn directories_and_files_are_the_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (outer, inner) = (dir.path().join("outer"), dir.path().join("outer/inner"));
        make_directory(&inner).unwrap();
        assert_eq!((mode(&outer), mode(&inner)), (0o700, 0o700));
        let path = inner.join("file");
        file().write(true).create(true).open(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_replaced_file_is_whole_and_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        for content in ["a longer one", "short"] {
            replace(&path, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(mode(&path), 0o600);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_directory_of_an_older_version_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("open");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        make_directory(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn a_directory_of_the_system_stays_as_it_is() {
        let before = mode(Path::new("/usr"));
        make_directory(Path::new("/usr")).unwrap();
        assert_eq!(mode(Path::new("/usr")), before);
    }
}
