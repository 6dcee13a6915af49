//! The mount API of file system contexts: `fsopen(2)`, `fsconfig(2)`, `fsmount(2)`,
//! `move_mount(2)`.
//!
//! Preferred to `mount(2)`: options are not cut at one page (an overlay may have hundreds of
//! layers), a mount is made before it is visible anywhere, and the kernel says in words what it
//! disliked.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    ptr,
};

/// Longest message that [`FsContext::complaint`] reads from the kernel, in bytes.
const COMPLAINT_BYTES_MAX: usize = 1024;

/// A file system being configured.
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Begins a new instance of file system type `fs_type`.
    ///
    /// # Errors
    /// The kernel's: `ENODEV` when it does not know the type.
    pub fn open(fs_type: &CStr) -> io::Result<Self> {
        // SAFETY: `fs_type` is a NUL-terminated string that outlives the call; the kernel keeps no
        // pointer to it.
        let result = unsafe { libc::syscall(libc::SYS_fsopen, fs_type.as_ptr(), 1u32) };
        Ok(Self(owned(result)?))
    }

    /// Sets the option `key` to `value`.
    ///
    /// # Errors
    /// The kernel's; see [`Self::complaint`].
    pub fn set_string(&self, key: &CStr, value: &CStr) -> io::Result<()> {
        self.configure(libc::FSCONFIG_SET_STRING, Some(key), Some(value))
    }

    /// Sets the option `key`, which takes no value.
    ///
    /// # Errors
    /// The kernel's; see [`Self::complaint`].
    pub fn set_flag(&self, key: &CStr) -> io::Result<()> {
        self.configure(libc::FSCONFIG_SET_FLAG, Some(key), None)
    }

    /// Creates the file system and gives a mount of it that is attached nowhere yet.
    ///
    /// `attributes` are `MOUNT_ATTR_*`.
    ///
    /// # Errors
    /// The kernel's; see [`Self::complaint`].
    pub fn mount(&self, attributes: u64) -> io::Result<DetachedMount> {
        self.configure(libc::FSCONFIG_CMD_CREATE, None, None)?;
        // The attributes all lie in the lower half (uapi/linux/mount.h), and the call takes an
        // unsigned int.
        let attributes =
            u32::try_from(attributes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: takes numbers only; the descriptor is open as long as `self` lives.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                libc::FSMOUNT_CLOEXEC,
                attributes,
            )
        };
        Ok(DetachedMount(owned(result)?))
    }

    /// What the kernel says about the last error, if it said anything.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let mut buffer = [0u8; COMPLAINT_BYTES_MAX];
        let length = nix::unistd::read(&self.0, &mut buffer).ok()?;
        let text = String::from_utf8_lossy(&buffer[..length]);
        // Each message begins with its severity: "e overlay: No changes allowed".
        let text = text.trim_end();
        Some(
            text.split_once(' ')
                .map_or(text, |(_, rest)| rest)
                .to_owned(),
        )
    }

    fn configure(
        &self,
        command: libc::c_uint,
        key: Option<&CStr>,
        value: Option<&CStr>,
    ) -> io::Result<()> {
        // SAFETY: both pointers are null or NUL-terminated strings that outlive the call; the
        // kernel copies them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                key.map_or(ptr::null(), CStr::as_ptr),
                value.map_or(ptr::null(), CStr::as_ptr),
                0i32,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A mount that is attached nowhere; dropping it unmounts it.
#[derive(Debug)]
pub struct DetachedMount(OwnedFd);

/// Takes a descriptor that another process made so and passed on.
impl From<OwnedFd> for DetachedMount {
    fn from(mount: OwnedFd) -> Self {
        Self(mount)
    }
}

impl DetachedMount {
    /// Clones the mount at `path`, with all mounts beneath it when `recursive`, as a bind mount
    /// would.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clone_of(path: BorrowedFd<'_>, recursive: bool) -> io::Result<Self> {
        let recursion = if recursive {
            libc::AT_RECURSIVE.cast_unsigned()
        } else {
            0
        };
        let flags = libc::OPEN_TREE_CLONE
            | libc::OPEN_TREE_CLOEXEC
            | libc::AT_EMPTY_PATH.cast_unsigned()
            | recursion;
        // SAFETY: the descriptor is borrowed for the call, and the path is a static empty string.
        let result =
            unsafe { libc::syscall(libc::SYS_open_tree, path.as_raw_fd(), c"".as_ptr(), flags) };
        Ok(Self(owned(result)?))
    }

    /// Clones the mount of the file or directory at `path`, which is followed if it is a link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clone_at(path: &Path, recursive: bool) -> io::Result<Self> {
        let place = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)?;
        Self::clone_of(place.as_fd(), recursive)
    }

    /// Sets and clears `MOUNT_ATTR_*` of this mount, and of those beneath it when `recursive`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_attributes(&self, set: u64, clear: u64, recursive: bool) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: set,
            attr_clr: clear,
            propagation: 0,
            userns_fd: 0,
        };
        let recursion = if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: the structure lives on this stack through the call and its true size is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | recursion,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Attaches the mount over the file or directory that `target` is open on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(self, target: BorrowedFd<'_>) -> io::Result<()> {
        // MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
        // SAFETY: both descriptors are open through the call, and the paths are static empty
        // strings.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                target.as_raw_fd(),
                c"".as_ptr(),
                flags,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for DetachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A path or option as the kernel wants it.
///
/// # Errors
/// `EINVAL` when it holds a NUL.
pub fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel just made this descriptor for this call, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
