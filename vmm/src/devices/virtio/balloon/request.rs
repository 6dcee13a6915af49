//! Page lists, ranges and figures of the balloon's driver. Pure functions.

/// Device ID (virtio 1.2 §5.5.1).
pub(crate) const DEVICE_TYPE: u16 = 5;
/// A page of the protocol, whatever the guest's pages are (§5.5.6).
pub(crate) const PAGE_BYTES: u64 = 4096;
/// Pages of one buffer; Linux sends 256.
pub(crate) const PFNS_MAX: usize = 1024;
/// Figures of one buffer; the specification knows 10, Linux 16.
pub(crate) const STATISTICS_MAX: usize = 32;

// Feature bits (§5.5.3).
pub(crate) const F_STATS: u64 = 1 << 1;
pub(crate) const F_DEFLATE_ON_OOM: u64 = 1 << 2;
pub(crate) const F_REPORTING: u64 = 1 << 5;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Pages into the balloon.
    Inflate,
    /// Pages out of it.
    Deflate,
    /// Figures.
    Statistics,
    /// Free pages.
    Reporting,
}

/// The role of a queue: queues of features that were not negotiated are left out of the numbering,
/// as Linux does (`drivers/virtio/virtio_pci_common.c`, `vp_find_vqs_msix`).
pub(crate) fn role(queue: u16, features: u64) -> Option<Role> {
    let optional = [(F_STATS, Role::Statistics), (F_REPORTING, Role::Reporting)];
    match queue {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        queue => optional
            .into_iter()
            .filter(|(feature, _)| features & feature != 0)
            .nth(usize::from(queue) - 2)
            .map(|(_, role)| role),
    }
}

/// A run of guest memory: address and length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) address: u64,
    pub(crate) len: u64,
}

/// Turns a list of little-endian page numbers into as few runs as possible. Bytes after the last
/// whole number are ignored.
pub(crate) fn runs(bytes: &[u8]) -> Vec<Run> {
    let mut pages: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|page| u32::from_le_bytes(page.try_into().expect("4 bytes")))
        .collect();
    pages.sort_unstable();
    pages.dedup();
    let mut runs: Vec<Run> = Vec::new();
    for page in pages {
        let address = u64::from(page) * PAGE_BYTES;
        match runs.last_mut() {
            Some(run) if run.address + run.len == address => run.len += PAGE_BYTES,
            _ => runs.push(Run {
                address,
                len: PAGE_BYTES,
            }),
        }
    }
    runs
}

/// The whole pages inside a range; `None` when there are none.
pub(crate) fn whole_pages(address: u64, len: u64) -> Option<Run> {
    let end = address.checked_add(len)?;
    let start = address.checked_next_multiple_of(PAGE_BYTES)?;
    let end = end - end % PAGE_BYTES;
    (start < end).then(|| Run {
        address: start,
        len: end - start,
    })
}

/// Names of the figures by their tag (§5.5.6.4), in the counters of the device.
const STATISTICS: [&str; 10] = [
    "guest_swap_in_bytes",
    "guest_swap_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_disk_caches_bytes",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
];

/// `struct virtio_balloon_stat`: tag and value, packed.
const STATISTIC_BYTES: usize = 10;

/// Bytes of the figures that are read at most.
pub(crate) const STATISTICS_BYTES_MAX: usize = STATISTICS_MAX * STATISTIC_BYTES;

/// Parses the figures that have a name; others are skipped.
pub(crate) fn parse_statistics(bytes: &[u8]) -> Vec<(&'static str, u64)> {
    bytes
        .chunks_exact(STATISTIC_BYTES)
        .take(STATISTICS_MAX)
        .filter_map(|figure| {
            let (tag, value) = figure.split_first_chunk::<2>()?;
            let name = STATISTICS.get(usize::from(u16::from_le_bytes(*tag)))?;
            Some((*name, u64::from_le_bytes(value.try_into().ok()?)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn queues_without_their_feature_are_not_counted() {
        let both = F_STATS | F_REPORTING;
        for (queue, features, expected) in [
            (0, 0, Some(Role::Inflate)),
            (1, 0, Some(Role::Deflate)),
            (2, 0, None),
            (2, both, Some(Role::Statistics)),
            (3, both, Some(Role::Reporting)),
            (4, both, None),
            (2, F_REPORTING, Some(Role::Reporting)),
            (3, F_REPORTING, None),
            (u16::MAX, both, None),
        ] {
            assert_eq!(
                role(queue, features),
                expected,
                "queue {queue} with {features:#x}"
            );
        }
    }

    #[test]
    fn figures_are_named() {
        let mut bytes = vec![4, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend([0xff, 0xff, 9, 9, 9, 9, 9, 9, 9, 9]);
        bytes.extend([5, 0, 0, 1]);
        assert_eq!(parse_statistics(&bytes), [("guest_free_bytes", 1)]);
    }

    proptest! {
        /// The runs cover the named pages, each once, and nothing else.
        #[test]
        fn runs_cover_the_pages(pages in proptest::collection::vec(0u32..64, 0..200), high: u32) {
            let mut bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
            bytes.extend(high.to_le_bytes());
            bytes.push(1);
            let mut wanted: Vec<u64> = pages.iter().map(|page| u64::from(*page)).collect();
            wanted.push(u64::from(high));
            wanted.sort_unstable();
            wanted.dedup();
            let covered: Vec<u64> = runs(&bytes)
                .iter()
                .flat_map(|run| {
                    let first = run.address / PAGE_BYTES;
                    first..first + run.len / PAGE_BYTES
                })
                .collect();
            prop_assert_eq!(covered, wanted);
        }

        #[test]
        fn whole_pages_lie_inside(address: u64, len: u64) {
            if let Some(run) = whole_pages(address, len) {
                prop_assert!(run.address >= address);
                prop_assert!(run.address + run.len <= address + len);
                prop_assert!(run.address.is_multiple_of(PAGE_BYTES));
                prop_assert!(run.len.is_multiple_of(PAGE_BYTES));
                prop_assert!(run.len > 0);
            }
        }

        #[test]
        fn figures_of_any_bytes_are_bounded(bytes: Vec<u8>) {
            prop_assert!(parse_statistics(&bytes).len() <= STATISTICS_MAX);
        }
    }
}
