//! Which parts of a BAR are mapped into the guest: whole pages that the kernel lets us map, but
//! those with the table of MSI-X or its pending bits, which are ours.

use std::ops::Range;

/// Pages of the host, which are those of KVM's slots.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Parts of one BAR, each a slot of KVM.
pub(crate) const WINDOWS_MAX: usize = 16;

/// The parts of a BAR of `size` bytes that are mapped, sorted and disjoint: `mappable` without the
/// pages that `trapped` touches. A BAR smaller than a page is not mapped: the guest may place
/// something else in the rest of that page.
pub(crate) fn windows(
    size: u64,
    mappable: &[(u64, u64)],
    trapped: &[Range<u64>],
) -> Vec<Range<u64>> {
    let down = |at: u64| at & !(PAGE_BYTES - 1);
    let mut parts: Vec<Range<u64>> = mappable
        .iter()
        .filter_map(|(start, length)| {
            let end = start.checked_add(*length)?.min(size);
            Some(start.checked_next_multiple_of(PAGE_BYTES)?..down(end))
        })
        .collect();
    for trap in trapped.iter().filter(|trap| !trap.is_empty()) {
        let first = down(trap.start);
        let last = trap.end.checked_next_multiple_of(PAGE_BYTES);
        let last = last.unwrap_or(u64::MAX);
        let cut = |part: Range<u64>| {
            [
                part.start..part.end.min(first),
                part.start.max(last)..part.end,
            ]
        };
        parts = parts.into_iter().flat_map(cut).collect();
    }
    parts.retain(|part| part.start < part.end);
    parts.sort_by_key(|part| part.start);
    // The kernel's parts do not overlap; of a broken kernel's the first counts.
    let mut end = 0;
    parts.retain(|part| {
        let disjoint = part.start >= end;
        end = end.max(part.end);
        disjoint
    });
    parts.truncate(WINDOWS_MAX);
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pages_of_the_table_are_left_out() {
        let whole = [(0, 0x4000)];
        assert_eq!(
            windows(0x4000, &whole, &[0x2000..0x2410, 0x3000..0x3008]),
            vec![0..0x2000]
        );
        let trap = |start, end| vec![Range { start, end }];
        assert_eq!(
            windows(0x4000, &whole, &trap(0x1ff0, 0x2010)),
            [0..0x1000, 0x3000..0x4000]
        );
        assert_eq!(windows(0x4000, &whole, &[]), vec![0..0x4000]);
        assert!(windows(0x1000, &[(0, 0x1000)], &trap(0, 0x10)).is_empty());
        assert!(windows(0x100, &[(0, 0x100)], &[]).is_empty());
        assert!(windows(0x4000, &[], &[]).is_empty());
    }

    proptest! {
        #[test]
        fn windows_are_pages_of_the_bar_and_never_trapped(
            size in 0_u64..1 << 40,
            mappable in prop::collection::vec((any::<u64>(), any::<u64>()), 0..6),
            low in prop::collection::vec((0_u64..1 << 20, 0_u64..1 << 20), 0..6),
            trapped in prop::collection::vec((0_u64..1 << 20, 0_u64..1 << 16), 0..4),
        ) {
            let mappable: Vec<_> = mappable.into_iter().chain(low).collect();
            let trapped: Vec<_> = trapped.into_iter().map(|(at, len)| at..at + len).collect();
            let mut end = 0;
            for window in windows(size, &mappable, &trapped) {
                prop_assert!(window.start >= end && window.start < window.end);
                prop_assert!(window.end <= size);
                prop_assert!(window.start % PAGE_BYTES == 0 && window.end % PAGE_BYTES == 0);
                for trap in &trapped {
                    let disjoint = trap.is_empty()
                        || trap.end <= window.start
                        || trap.start >= window.end;
                    prop_assert!(disjoint, "{trap:?} in {window:?}");
                }
                end = window.end;
            }
        }
    }
}
