//! From a function's configuration space to the one that its guest sees.
//!
//! The guest reads a picture of ours and never the function: identity, BARs, and those capabilities
//! that are safe to know, at the places that they have in the function, because drivers look there.
//! What it may write of them is a mask; few of the bits go on to the function ([`COMMAND_PASSED`],
//! [`DEVICE_CONTROL_PASSED`]), and the kernel's vfio-pci looks at these again.
//!
//! Shown: PCI Express, MSI-X, MSI with one message and no mask, vendor's own (read-only). Hidden:
//! the expansion ROM, INTx, I/O BARs, power management (a function is always on), vital product
//! data (reading it has side effects), and everything beyond the first 256 bytes (SR-IOV, ATS,
//! resizable BARs).
//!
//! A function that has no other interrupt than its pin (INTx) is refused: the machine has no
//! controller for pins, and without one the kernel tells nobody when the guest has served one
//! (decision D21).
//!
//! The bytes are of a device that the last guest may have misled, so the list of capabilities is
//! walked as a stranger's: each offset once.

use std::ops::Range;

/// Bytes of configuration space that are looked at (PCI 3.0 §6.1).
pub(crate) const CONFIG_BYTES: usize = 256;
/// Words of it.
pub(crate) const WORDS: usize = CONFIG_BYTES / 4;

/// Registers by byte (PCI 3.0 §6.1).
const VENDOR: usize = 0x00;
/// Command.
pub(crate) const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const HEADER: usize = 0x0e;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const PIN: usize = 0x3d;
const HEADER_END: usize = 0x40;

/// Status: there is a list of capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;
/// Header type without the bit of other functions.
const HEADER_KIND: u8 = 0x7f;
const MULTIFUNCTION: u8 = 0x80;

/// Command: memory decoding, which is the bus's here; bus mastering; INTx disabled.
const COMMAND_WRITABLE: u16 = 1 << 1 | COMMAND_PASSED;
/// Command: what the function is told.
pub(crate) const COMMAND_PASSED: u16 = 1 << 2 | 1 << 10;

/// BAR: I/O space; kind of memory; 64 bits wide (§6.2.5.1).
const BAR_IO: u32 = 1;
const BAR_KIND: u32 = 0b0110;
const BAR_WIDE: u32 = 0b0100;
const BAR_FLAGS: u32 = 0b1111;

/// Ids of capabilities (PCI code and ID assignment 1.11 §2).
const MSI: u8 = 0x05;
const VENDOR_SPECIFIC: u8 = 0x09;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;

/// Device control of PCI Express (base specification 6.0 §7.5.3.4), from the capability's begin.
pub(crate) const DEVICE_CONTROL: usize = 8;
/// Device control: error reporting, relaxed ordering, payload, tags, no snoop, read request size.
pub(crate) const DEVICE_CONTROL_PASSED: u16 = 0x7fff;
/// Device control: reset the function; reads as zero.
pub(crate) const FUNCTION_RESET: u16 = 1 << 15;
/// Bytes of the capability in its versions 1 (without slot and root registers) and 2.
const EXPRESS_BYTES: [usize; 2] = [20, 60];

/// Bytes of the capability of MSI-X.
const MSIX_BYTES: usize = 12;
/// Bytes of a table entry, and vectors that the field can name.
const ENTRY_BYTES: u64 = 16;
/// Message control: enable and mask of the function.
const MSIX_WRITABLE: u16 = 1 << 15 | 1 << 14;

/// MSI (PCI 3.0 §6.8.1): message control: enabled; the address has two words.
pub(crate) const MSI_ENABLED: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;
/// Bytes of the capability with an address of one and of two words, without masks.
const MSI_BYTES: [usize; 2] = [10, 14];

/// A BAR of memory space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bar {
    /// Which register, 0 to 5.
    pub(crate) register: u8,
    /// Its bytes: a power of two.
    pub(crate) size: u64,
    /// It takes two registers.
    pub(crate) wide: bool,
}

/// Where MSI-X is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MsixPlace {
    /// Offset of the capability.
    pub(crate) capability: usize,
    /// Vectors: 1 to 2,048.
    pub(crate) count: u16,
    /// BAR of the table, and where in it.
    pub(crate) table: (u8, Range<u64>),
    /// BAR of the pending bits, and where in it.
    pub(crate) pending: (u8, Range<u64>),
}

/// Where MSI is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MsiPlace {
    /// Offset of the capability.
    pub(crate) capability: usize,
    /// Its address has two words.
    pub(crate) wide: bool,
}

impl MsiPlace {
    /// Offset of its data.
    pub(crate) fn data(&self) -> usize {
        self.capability + if self.wide { 12 } else { 8 }
    }

    /// Offsets of the words that it has a part in.
    pub(crate) fn range(&self) -> Range<usize> {
        self.capability..self.data() + 4
    }
}

/// What the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mediated {
    /// Every register's first value.
    pub(crate) words: [u32; WORDS],
    /// Bits that the guest may change.
    pub(crate) writable: [u32; WORDS],
    /// BARs.
    pub(crate) bars: Vec<Bar>,
    /// Interrupts by message, if the function has them.
    pub(crate) msix: Option<MsixPlace>,
    /// The same with a single message, if it has that.
    pub(crate) msi: Option<MsiPlace>,
    /// Offset of the PCI Express capability.
    pub(crate) express: Option<usize>,
}

/// A function that cannot be shown.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MediateError {
    /// It answers with ones: it is off, or gone.
    #[error("the function does not answer: it may have fallen off its bus; reset its slot")]
    Absent,
    /// A bridge.
    #[error("a function of header type {0:#x} cannot be passed through: only endpoints can")]
    Header(u8),
    /// A size that no BAR has.
    #[error("BAR {register} has {size:#x} bytes, which is no size of a BAR")]
    Bar {
        /// Which one.
        register: u8,
        /// What the kernel says.
        size: u64,
    },
    /// MSI-X outside its BAR.
    #[error("the table of MSI-X does not lie in a BAR of the function")]
    Msix,
    /// Interrupts that have no way into the guest.
    #[error(
        "the function interrupts by its pin alone (INTx), which has no way into a VM: one that \
            knows MSI or MSI-X, as those of PCI Express do, can be passed through"
    )]
    Pin,
}

fn half(bytes: &[u8; CONFIG_BYTES], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8; CONFIG_BYTES], at: usize) -> u32 {
    let [a, b] = half(bytes, at).to_le_bytes();
    let [c, d] = half(bytes, at + 2).to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// What the guest sees of the function whose configuration space is `bytes` and whose BARs have
/// `sizes` (0: none). `multifunction` is of the place on our bus.
pub(crate) fn mediate(
    bytes: &[u8; CONFIG_BYTES],
    sizes: &[u64; 6],
    multifunction: bool,
) -> Result<Mediated, MediateError> {
    if half(bytes, VENDOR) == u16::MAX {
        return Err(MediateError::Absent);
    }
    let kind = bytes[HEADER] & HEADER_KIND;
    if kind != 0 {
        return Err(MediateError::Header(kind));
    }
    let mut picture = Picture::default();
    for at in [VENDOR, REVISION, SUBSYSTEM] {
        picture.show(bytes, at..at + 4);
    }
    picture.bytes[HEADER] = if multifunction { MULTIFUNCTION } else { 0 };
    picture.allow(COMMAND, COMMAND_WRITABLE);
    let bars = show_bars(&mut picture, bytes, sizes)?;
    let found = show_capabilities(&mut picture, bytes, &bars)?;
    if bytes[PIN] != 0 && found.msix.is_none() && found.msi.is_none() {
        return Err(MediateError::Pin);
    }
    Ok(Mediated {
        words: std::array::from_fn(|index| word(&picture.bytes, index * 4)),
        writable: std::array::from_fn(|index| word(&picture.writable, index * 4)),
        bars,
        msix: found.msix,
        msi: found.msi,
        express: found.express,
    })
}

/// The picture as it is drawn.
#[derive(Debug)]
struct Picture {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
}

impl Default for Picture {
    fn default() -> Self {
        Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
        }
    }
}

impl Picture {
    fn show(&mut self, from: &[u8; CONFIG_BYTES], range: Range<usize>) {
        self.bytes[range.clone()].copy_from_slice(&from[range]);
    }

    fn allow(&mut self, at: usize, bits: u16) {
        self.writable[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    }

    fn set_word(bytes: &mut [u8; CONFIG_BYTES], at: usize, value: u32) {
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// BARs of memory space, at no address: the guest places them.
fn show_bars(
    picture: &mut Picture,
    bytes: &[u8; CONFIG_BYTES],
    sizes: &[u64; 6],
) -> Result<Vec<Bar>, MediateError> {
    let mut bars = Vec::new();
    let mut register = 0_u8;
    while register < 6 {
        let index = usize::from(register);
        let at = BARS + index * 4;
        let flags = word(bytes, at) & BAR_FLAGS;
        let size = sizes[index];
        let wide = flags & BAR_IO == 0 && flags & BAR_KIND == BAR_WIDE;
        if size != 0 && flags & BAR_IO == 0 {
            let fits = size.is_power_of_two()
                && size >= 16
                && if wide { register < 5 } else { size <= 1 << 31 };
            if !fits {
                return Err(MediateError::Bar { register, size });
            }
            let mask = !(size - 1);
            let [low, high] = [mask, mask >> 32]
                .map(|half| u32::try_from(half & u64::from(u32::MAX)).expect("32 bits are left"));
            Picture::set_word(&mut picture.bytes, at, flags);
            Picture::set_word(&mut picture.writable, at, low);
            if wide {
                Picture::set_word(&mut picture.writable, at + 4, high);
            }
            bars.push(Bar {
                register,
                size,
                wide,
            });
        }
        register += if wide { 2 } else { 1 };
    }
    Ok(bars)
}

/// What was found on the way through the list.
#[derive(Debug, Default)]
struct Found {
    msix: Option<MsixPlace>,
    msi: Option<MsiPlace>,
    express: Option<usize>,
}

/// Shows the capabilities that are safe, linked among themselves.
fn show_capabilities(
    picture: &mut Picture,
    bytes: &[u8; CONFIG_BYTES],
    bars: &[Bar],
) -> Result<Found, MediateError> {
    let mut found = Found::default();
    if half(bytes, STATUS) & HAS_CAPABILITIES == 0 {
        return Ok(found);
    }
    picture.bytes[STATUS] |= HAS_CAPABILITIES.to_le_bytes()[0];
    let offsets = offsets(bytes);
    let mut link = CAPABILITIES;
    for (index, at) in offsets.iter().copied().enumerate() {
        // A capability ends where another one begins, whatever its version says of its length.
        let above = offsets.iter().copied().filter(|other| *other > at);
        let end = above.min().unwrap_or(CONFIG_BYTES);
        let Some(length) = shown_bytes(bytes, at, end) else {
            continue;
        };
        let same = |other: &usize| bytes[*other] == bytes[at];
        if bytes[at] != VENDOR_SPECIFIC && offsets[..index].iter().any(same) {
            continue;
        }
        picture.show(bytes, at..at + length);
        picture.bytes[at + 1] = 0;
        picture.bytes[link] = u8::try_from(at).expect("below 256");
        link = at + 1;
        match bytes[at] {
            MSIX => found.msix = Some(show_msix(picture, bytes, at, bars)?),
            MSI => found.msi = Some(show_msi(picture, bytes, at)),
            EXPRESS => {
                picture.bytes[at + DEVICE_CONTROL + 1] &= !FUNCTION_RESET.to_le_bytes()[1];
                picture.allow(at + DEVICE_CONTROL, DEVICE_CONTROL_PASSED);
                found.express = Some(at);
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Where capabilities are, in the order of their list, each once.
fn offsets(bytes: &[u8; CONFIG_BYTES]) -> Vec<usize> {
    let mut offsets = Vec::new();
    let mut next = bytes[CAPABILITIES];
    loop {
        let at = usize::from(next & !3);
        if at < HEADER_END || offsets.contains(&at) {
            return offsets;
        }
        offsets.push(at);
        next = bytes[at + 1];
    }
}

/// Bytes of the capability at `at` when it is one that is shown and fits before `end`.
fn shown_bytes(bytes: &[u8; CONFIG_BYTES], at: usize, end: usize) -> Option<usize> {
    let room = end - at;
    match bytes[at] {
        VENDOR_SPECIFIC => Some(usize::from(bytes[at + 2]).clamp(3, room)),
        MSIX => (room >= MSIX_BYTES).then_some(MSIX_BYTES),
        MSI => {
            let wide = half(bytes, at + 2) & MSI_WIDE != 0;
            let length = MSI_BYTES[usize::from(wide)];
            (room >= length).then_some(length)
        }
        EXPRESS if bytes[at + 2] & 0xf >= 2 => Some(EXPRESS_BYTES[1].min(room)),
        EXPRESS => Some(EXPRESS_BYTES[0].min(room)),
        _ => None,
    }
    .filter(|_| bytes[at] != EXPRESS || room >= DEVICE_CONTROL + 4)
}

/// One message, without a mask, off: x86 guests use no more without interrupt remapping of their
/// own, and what is masked or waits would have to be read from the function.
fn show_msi(picture: &mut Picture, bytes: &[u8; CONFIG_BYTES], at: usize) -> MsiPlace {
    let control = half(bytes, at + 2) & MSI_WIDE;
    let place = MsiPlace {
        capability: at,
        wide: control != 0,
    };
    picture.bytes[at + 2..place.data() + 2].fill(0);
    picture.bytes[at + 2..at + 4].copy_from_slice(&control.to_le_bytes());
    picture.allow(at + 2, MSI_ENABLED);
    Picture::set_word(&mut picture.writable, at + 4, !3);
    if place.wide {
        Picture::set_word(&mut picture.writable, at + 8, u32::MAX);
    }
    picture.allow(place.data(), u16::MAX);
    place
}

fn show_msix(
    picture: &mut Picture,
    bytes: &[u8; CONFIG_BYTES],
    at: usize,
    bars: &[Bar],
) -> Result<MsixPlace, MediateError> {
    let control = half(bytes, at + 2);
    let count = (control & 0x7ff) + 1;
    picture.bytes[at + 2..at + 4].copy_from_slice(&(control & 0x7ff).to_le_bytes());
    picture.allow(at + 2, MSIX_WRITABLE);
    let place = |at: usize, length: u64| {
        let value = word(bytes, at);
        let register = u8::try_from(value & 7).expect("three bits");
        let start = u64::from(value & !7);
        let bar = bars.iter().find(|bar| bar.register == register);
        let range = start..start + length;
        bar.is_some_and(|bar| range.end <= bar.size)
            .then_some((register, range))
            .ok_or(MediateError::Msix)
    };
    let vectors = u64::from(count);
    Ok(MsixPlace {
        capability: at,
        count,
        table: place(at + 4, vectors * ENTRY_BYTES)?,
        pending: place(at + 8, vectors.div_ceil(64) * 8)?,
    })
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod check;
#[cfg(test)]
mod tests;
