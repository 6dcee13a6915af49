//! Capabilities of the calling thread. Sets are bit masks: bit n is the capability number n of
//! capabilities(7).

use std::io;

/// `_LINUX_CAPABILITY_VERSION_3` of uapi/linux/capability.h: 64 bits in two words.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Number of the last capability that the kernel knows.
///
/// # Errors
/// `EINVAL` when even the first is unknown.
pub fn last() -> io::Result<u32> {
    // PR_CAPBSET_READ fails with EINVAL beyond the last (prctl(2)); 63 is the most that a mask of
    // 64 bits holds.
    (0..64u32)
        .rev()
        .find(|number| prctl(libc::PR_CAPBSET_READ, *number, 0).is_ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Takes `capability` out of the bounding set, for good.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn drop_bounding(capability: u32) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, capability, 0)
}

/// Sets the three sets of the thread.
///
/// # Errors
/// `EPERM` when a set holds more than the thread may give itself.
pub fn set(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let word = |set: u64, index: u32| {
        let bits = (set >> (32 * index)) & u64::from(u32::MAX);
        u32::try_from(bits).expect("masked to 32 bits")
    };
    let words = [0, 1].map(|index| Words {
        effective: word(effective, index),
        permitted: word(permitted, index),
        inheritable: word(inheritable, index),
    });
    // SAFETY: header and both words live through the call; with version 3 the kernel reads exactly
    // two words.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Empties the ambient set.
///
/// # Errors
/// The kernel's.
pub fn clear_ambient() -> io::Result<()> {
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL.cast_unsigned(),
        0,
    )
}

/// Adds `capability` to the ambient set; it must be permitted and inheritable.
///
/// # Errors
/// `EPERM` when it is not.
pub fn raise_ambient(capability: u32) -> io::Result<()> {
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_RAISE.cast_unsigned(),
        capability,
    )
}

fn prctl(option: libc::c_int, second: u32, third: u32) -> io::Result<()> {
    let [second, third] = [second, third].map(libc::c_ulong::from);
    let zero: libc::c_ulong = 0;
    // SAFETY: the options used here take numbers only.
    if unsafe { libc::prctl(option, second, third, zero, zero) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
