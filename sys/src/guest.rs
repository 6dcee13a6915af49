//! What a guest's first process asks of its kernel and its C library, and `nix` does not offer:
//! entropy, the size of a terminal, a small heap.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Largest seed in bytes that [`add_entropy`] takes: twice what the kernel's generator can hold.
pub const ENTROPY_BYTES_MAX: usize = 64;

/// `struct rand_pool_info` of uapi/linux/random.h with room for the largest seed.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size_bytes: i32,
    bytes: [u8; ENTROPY_BYTES_MAX],
}

mod ioctls {
    // random(4): RNDADDENTROPY is _IOW('R', 0x03, int[2]).
    nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [i32; 2]);
    // random(4): RNDRESEEDCRNG is _IO('R', 0x07).
    nix::ioctl_none!(reseed, b'R', 0x07);
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
}

/// Mixes `seed` into the kernel's pool and credits it, so that `getrandom` need not wait.
///
/// # Errors
/// The seed is too long, or the kernel refuses (only root may credit entropy).
pub fn add_entropy(device: &File, seed: &[u8]) -> io::Result<()> {
    if seed.len() > ENTROPY_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let length = i32::try_from(seed.len()).map_err(io::Error::other)?;
    let mut info = PoolInfo {
        entropy_bits: length * 8,
        size_bytes: length,
        bytes: [0; ENTROPY_BYTES_MAX],
    };
    info.bytes[..seed.len()].copy_from_slice(seed);
    // SAFETY: the kernel reads the two numbers and then `size_bytes` bytes, all inside `info`,
    // which lives through the call; a `PoolInfo` begins with the two numbers that the request's
    // type names.
    unsafe { ioctls::add_entropy(device.as_raw_fd(), (&raw const info).cast()) }?;
    Ok(())
}

/// Has the kernel's generator draw its keys anew from the pool, at once: a machine that goes on
/// from a saved one shares them with every other until then.
///
/// # Errors
/// The kernel refuses (only root may ask).
pub fn reseed(device: &File) -> io::Result<()> {
    // SAFETY: the request has no argument.
    unsafe { ioctls::reseed(device.as_raw_fd()) }?;
    Ok(())
}

/// Makes all threads allocate from one arena.
///
/// glibc gives each thread an arena of its own, whose pages stay touched after the thread has
/// ended: much, for a process whose threads are few, short-lived and seldom at work together
/// (mallopt(3), `M_ARENA_MAX`).
pub fn use_one_arena() {
    // SAFETY: mallopt(3) takes two numbers and may be called at any time; a refusal leaves the
    // default.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Sets the size of the terminal whose master is `terminal`.
///
/// # Errors
/// The kernel's.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one `winsize`, which lives through the call.
    unsafe { ioctls::set_window_size(terminal.as_raw_fd(), &raw const size) }?;
    Ok(())
}
