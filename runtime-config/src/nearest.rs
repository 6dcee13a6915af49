//! Which valid name a mistyped one is nearest to.

/// Longest part of a name that is compared, in bytes: foreign names must not cost quadratic time
/// without a bound.
const COMPARED_BYTES_MAX: usize = 96;

/// The candidate with the fewest edits from `name`; the first of equals.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A key without its section is compared with the last parts, so that `vcpus` finds
    // `vm.default_vcpus`' section too.
    let leaf_only = !name.contains('.');
    candidates.min_by_key(|candidate| {
        let leaf = candidate.rsplit('.').next().unwrap_or(candidate);
        let compared = if leaf_only { leaf } else { candidate };
        // A name that the candidate contains (`vm.vcpus` in `vm.default_vcpus` by its last word) is
        // a likely meaning.
        let last = name.rsplit('.').next().unwrap_or(name);
        let contained = last.len() >= 4 && leaf.contains(last);
        (distance(name, compared)).saturating_sub(if contained {
            leaf.len() - last.len()
        } else {
            0
        })
    })
}

/// Edits (insert, remove, replace, swap neighbours) that turn one name into the other; bytes beyond
/// a bound are ignored.
#[must_use]
pub fn distance(left: &str, right: &str) -> usize {
    let left = &left.as_bytes()[..left.len().min(COMPARED_BYTES_MAX)];
    let right = &right.as_bytes()[..right.len().min(COMPARED_BYTES_MAX)];
    let mut before_last = vec![0; right.len() + 1];
    let mut last: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in right.iter().enumerate() {
            let replaced = last[j] + usize::from(a != b);
            let mut best = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == right[j - 1] && left[i - 1] == *b {
                best = best.min(before_last[j - 1] + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[right.len()]
}
