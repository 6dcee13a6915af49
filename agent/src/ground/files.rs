//! Small files of `/proc`, `/sys` and cgroupfs, and paths that stay beneath a directory.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
};
use tokio::io::unix::AsyncFd;

/// Largest pseudo file in bytes that is read: `memory.stat` and `/proc/self/mountinfo` of a full
/// guest stay far below.
const PSEUDO_FILE_BYTES_MAX: u64 = 4 << 20;

/// Deepest path that is made or resolved, in components.
const PATH_COMPONENTS_MAX: usize = 64;

/// Reads a small file of a pseudo file system.
pub(crate) fn read(path: impl AsRef<Path>) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(PSEUDO_FILE_BYTES_MAX)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a value to a file of a pseudo file system with one `write(2)`, and makes no file.
pub(crate) fn write(path: impl AsRef<Path>, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// The components of an absolute `path` beneath `base`, if it lies strictly beneath it and holds no
/// `..`.
pub(crate) fn components_beneath<'a>(base: &Path, path: &'a Path) -> Option<Vec<&'a str>> {
    let rest = path.strip_prefix(base).ok()?;
    let mut names = Vec::new();
    for component in rest.components() {
        match component {
            Component::Normal(name) => names.push(name.to_str()?),
            _ => return None,
        }
    }
    (!names.is_empty() && names.len() <= PATH_COMPONENTS_MAX).then_some(names)
}

/// What a path shall be made as when it is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Report it.
    Refuse,
    /// Make a directory, and those above it.
    Directory,
    /// Make an empty file, and the directories above it.
    File,
}

/// Opens `names` beneath `base` with `O_PATH`. No component may be a symbolic link: a container can
/// write some of the directories beneath.
pub(crate) fn open_beneath(base: &Path, names: &[&str], missing: Missing) -> io::Result<OwnedFd> {
    let mut directory: OwnedFd = File::open(base)?.into();
    for (index, name) in names.iter().enumerate() {
        let last = index + 1 == names.len();
        directory = match open_component(&directory, name) {
            Err(nix::Error::ENOENT) if missing != Missing::Refuse => {
                if last && missing == Missing::File {
                    make_file(&directory, name)?;
                } else {
                    match mkdirat(&directory, *name, Mode::from_bits_truncate(0o755)) {
                        Ok(()) | Err(nix::Error::EEXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                open_component(&directory, name)?
            }
            other => other?,
        };
    }
    Ok(directory)
}

// Without `O_NOFOLLOW`: with it `openat2(2)` would open a last component that is a link, rather
// than refuse it.
fn open_component(directory: &OwnedFd, name: &str) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    openat2(directory, name, how)
}

fn make_file(directory: &OwnedFd, name: &str) -> io::Result<()> {
    let how = OpenHow::new()
        .flags(OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .mode(Mode::from_bits_truncate(0o600))
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(directory, name, how)?;
    Ok(())
}

/// The path by which a descriptor of this process can be named in calls that take no descriptor.
pub(crate) fn descriptor_path(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Registers the owner of a descriptor with the runtime, so that tasks can wait for it.
#[expect(
    deprecated,
    reason = "its successor is unsafe for owners that close early; `OwnedFd` and `Inotify` close \
        when dropped"
)]
pub(crate) fn watch<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_beneath_the_base_are_taken() {
        let base = Path::new("/run/pericarp");
        let names = |path| components_beneath(base, Path::new(path));
        assert_eq!(names("/run/pericarp/a/b"), Some(vec!["a", "b"]));
        assert_eq!(names("/run/pericarp//a/./b/"), Some(vec!["a", "b"]));
        for path in [
            "/run/pericarp",
            "/run/pericarp/../x",
            "/run/pericarpx/a",
            "a",
            "/",
            "",
        ] {
            assert_eq!(names(path), None, "{path:?}");
        }
    }

    #[test]
    fn no_symbolic_link_is_followed() {
        let base = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", base.path().join("link")).unwrap();
        let error = open_beneath(base.path(), &["link", "passwd"], Missing::Refuse).unwrap_err();
        assert!(
            matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)),
            "{error}"
        );
        open_beneath(base.path(), &["a", "b"], Missing::Directory).unwrap();
        assert!(base.path().join("a/b").is_dir());
        open_beneath(base.path(), &["a", "f"], Missing::File).unwrap();
        assert!(base.path().join("a/f").is_file());
    }
}
