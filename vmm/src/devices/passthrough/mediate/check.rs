//! What must hold for every configuration space that a guest is shown; for tests and fuzzing.

use super::{CONFIG_BYTES, Mediated, mediate};

/// Shows a function and checks the picture: every capability is one of those that are shown, the
/// list ends, and registers of the host are out of the guest's reach.
pub(crate) fn mediated(bytes: &[u8; CONFIG_BYTES], sizes: &[u64; 6]) -> Option<Mediated> {
    let seen = mediate(bytes, sizes, false).ok()?;
    let byte = |at: usize| seen.words[at / 4].to_le_bytes()[at % 4];
    let mut at = usize::from(byte(0x34));
    // A capability has four bytes at least.
    for _ in 0..CONFIG_BYTES / 4 {
        if at == 0 {
            break;
        }
        assert!(at >= 0x40 && at.is_multiple_of(4));
        let id = byte(at);
        assert!(matches!(id, 0x05 | 0x09 | 0x10 | 0x11), "{id:#x}");
        at = usize::from(byte(at + 1));
    }
    assert_eq!(at, 0, "the list of capabilities does not end");
    assert_eq!(seen.writable[0], 0, "the identity is the function's");
    assert_eq!(
        seen.writable[1] & !0x406,
        0,
        "few bits of the command register"
    );
    assert_eq!(
        (seen.words[12], seen.writable[12]),
        (0, 0),
        "there is no ROM"
    );
    if let Some(place) = &seen.msi {
        let control = seen.words[place.capability / 4] >> 16;
        assert_eq!(control & !0x80, 0, "one message, off, without masks");
        assert!(place.data() + 2 <= CONFIG_BYTES);
    }
    for bar in &seen.bars {
        assert!(bar.size.is_power_of_two());
        let index = 4 + usize::from(bar.register);
        let mask = u64::from(seen.writable[index])
            | if bar.wide {
                u64::from(seen.writable[index + 1]) << 32
            } else {
                !0 << 32
            };
        assert_eq!(!mask, bar.size - 1);
    }
    for place in seen
        .msix
        .iter()
        .flat_map(|msix| [&msix.table, &msix.pending])
    {
        let bar = seen.bars.iter().find(|bar| bar.register == place.0);
        assert!(bar.is_some_and(|bar| place.1.end <= bar.size));
    }
    Some(seen)
}
