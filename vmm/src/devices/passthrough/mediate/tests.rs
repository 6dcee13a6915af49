//! Configuration spaces as real functions have them, and as nothing has them.

use proptest::prelude::*;

use super::*;

/// An NVMe controller: BAR 0 of 16 KiB, 64 bits; MSI-X, PCI Express, power management (hidden), MSI
/// of eight messages with masks, vendor's own.
fn nvme() -> ([u8; CONFIG_BYTES], [u64; 6]) {
    let mut bytes = [0; CONFIG_BYTES];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x04, 0x10, 0x00]);
    put(8, &[0x02, 0x02, 0x08, 0x01, 0x10, 0x40, 0x80, 0x00]);
    put(0x10, &[0x04, 0x00, 0x00, 0xfe, 0x01, 0, 0, 0]);
    put(0x2c, &[0xf4, 0x1a, 0x00, 0x11]);
    put(0x30, &[0x01, 0x00, 0xf0, 0xff, 0x40, 0, 0, 0]);
    put(0x3c, &[11, 1, 0, 0]);
    put(
        0x40,
        &[0x11, 0x80, 0x40, 0x80, 0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0],
    );
    put(
        0x80,
        &[0x10, 0xc0, 0x02, 0x00, 0x00, 0x80, 0x00, 0x10, 0x10, 0x28],
    );
    put(0xc0, &[0x01, 0xd0, 0x03, 0x00]);
    put(0xd0, &[0x05, 0xe8, 0x87, 0x01, 0x00, 0x10, 0xe0, 0xfe]);
    put(0xdc, &[0x31, 0x40, 0, 0, 0xff, 0, 0, 0, 1, 0, 0, 0]);
    put(0xe8, &[0x09, 0x00, 0x08, 0x01, 0xaa, 0xbb, 0xcc, 0xdd]);
    (bytes, [0x4000, 0, 0, 0, 0, 0])
}

#[test]
fn a_disk_shows_what_is_safe() {
    let (bytes, sizes) = nvme();
    let seen = mediate(&bytes, &sizes, false).unwrap();
    assert_eq!(seen.words[0], 0x0010_1b36);
    assert_eq!(seen.words[1], 0x0010_0000, "no command, a list");
    assert_eq!(seen.words[4..6], [4, 0], "at no address");
    assert_eq!(seen.writable[4..6], [0xffff_c000, u32::MAX]);
    assert_eq!((seen.words[12], seen.words[15]), (0, 0), "no ROM, no INTx");
    let bar = Bar {
        register: 0,
        size: 0x4000,
        wide: true,
    };
    assert_eq!(seen.bars, [bar]);
    let msix = seen.msix.unwrap();
    assert_eq!((msix.capability, msix.count), (0x40, 65));
    assert_eq!(msix.table, (0, 0x2000..0x2410));
    assert_eq!(msix.pending, (0, 0x3000..0x3010));
    // Off and unmasked, however the last guest left it.
    assert_eq!(seen.words[0x10], 0x0040_8011);
    assert_eq!(seen.writable[0x10], 0xc000_0000);
    assert_eq!(seen.express, Some(0x80));
    assert_eq!(seen.words[0x20] >> 8 & 0xff, 0xd0, "others are skipped");
    assert_eq!(seen.writable[0x22], 0x7fff);
    assert_eq!(seen.words[0x30], 0, "hidden");
    let place = MsiPlace {
        capability: 0xd0,
        wide: true,
    };
    assert_eq!(seen.msi, Some(place));
    // One message, off, without masks and without the last guest's address.
    assert_eq!(seen.words[0x34..0x3a], [0x0080_e805, 0, 0, 0, 0, 0]);
    let writable = [0x0001_0000, !3, u32::MAX, 0xffff, 0, 0];
    assert_eq!(seen.writable[0x34..0x3a], writable);
    assert_eq!(seen.words[0x3a..0x3c], [0x0108_0009, 0xddcc_bbaa]);
    assert_eq!(seen.writable[0x3a..0x3c], [0, 0]);
}

#[test]
fn what_cannot_be_shown_is_refused() {
    let (bytes, sizes) = nvme();
    let changed = |at: usize, value: u8| {
        let mut bytes = bytes;
        bytes[at] = value;
        bytes
    };
    let absent = mediate(&[0xff; CONFIG_BYTES], &sizes, false);
    assert_eq!(absent, Err(MediateError::Absent));
    let bridge = mediate(&changed(HEADER, 0x81), &sizes, false);
    assert_eq!(bridge, Err(MediateError::Header(1)));
    let beyond = mediate(&changed(0x45, 0x40), &sizes, false);
    assert_eq!(beyond, Err(MediateError::Msix));
    let no_bar = mediate(&changed(0x44, 0x02), &sizes, false);
    assert_eq!(no_bar, Err(MediateError::Msix));
    for (register, size) in [(0, 0x4001), (0, 8), (2, 1 << 32)] {
        let mut sizes = [0x4000, 0, 0, 0, 0, 0];
        sizes[usize::from(register)] = size;
        let narrow = changed(0x10, if register == 0 { 4 } else { 0 });
        let refused = mediate(&narrow, &sizes, false);
        assert_eq!(refused, Err(MediateError::Bar { register, size }));
    }
    let mut ports = bytes;
    ports[0x10..0x18].copy_from_slice(&[1, 0xc0, 0, 0, 0, 0, 0, 0]);
    let io = mediate(&ports, &[64, 0, 0, 0, 0, 0], false);
    assert_eq!(io, Err(MediateError::Msix), "an I/O BAR is none");
}

#[test]
fn a_list_that_runs_in_a_circle_ends() {
    let (mut bytes, sizes) = nvme();
    bytes[0xe9] = 0x40;
    assert!(mediate(&bytes, &sizes, true).is_ok());
    bytes[0x34] = 0xff;
    bytes[PIN] = 0;
    let seen = mediate(&bytes, &sizes, true).unwrap();
    assert!(seen.msix.is_none() && seen.msi.is_none());
}

#[test]
fn interrupts_by_the_pin_alone_are_refused() {
    let (mut bytes, sizes) = nvme();
    bytes[0x34] = 0x80;
    let seen = mediate(&bytes, &sizes, false).unwrap();
    assert!(seen.msix.is_none() && seen.msi.is_some());
    // The capability of MSI in its short form, and cut off by the end of the space.
    bytes[0xd2] = 0;
    let narrow = mediate(&bytes, &sizes, false).unwrap().msi.unwrap();
    assert_eq!((narrow.wide, narrow.data()), (false, 0xd8));
    bytes[0xc1] = 0xf8;
    bytes[0xf8] = 5;
    assert_eq!(mediate(&bytes, &sizes, false), Err(MediateError::Pin));
    bytes[PIN] = 0;
    assert!(mediate(&bytes, &sizes, false).unwrap().msi.is_none());
}

proptest! {
    #[test]
    fn any_bytes_give_a_space_that_hangs_together(
        bytes in prop::collection::vec(any::<u8>(), CONFIG_BYTES),
        plausible in any::<bool>(),
        sizes in prop::array::uniform6(prop_oneof![
            Just(0_u64), (4_u32..40).prop_map(|bits| 1 << bits), any::<u64>(),
        ]),
    ) {
        let mut bytes: [u8; CONFIG_BYTES] = bytes.try_into().unwrap();
        if plausible {
            bytes[HEADER] = 0;
            bytes[STATUS] = 0x10;
            bytes[0x34] = 0x40;
        }
        check::mediated(&bytes, &sizes);
    }
}
