//! The line of a guest's log that says why its kernel panicked.
//!
//! The log goes with the pod, and what a panicked guest had to say is wanted after that. The guest
//! writes what it likes: one line a pod is passed on, and no more of it than
//! [`LINE_BYTES_MAX`].

/// What the kernel's line has (`kernel/panic.c`).
const MARK: &[u8] = b"Kernel panic - not syncing";

/// Bytes of a line that are kept.
const LINE_BYTES_MAX: usize = 512;

/// Looks for the line while the log comes.
#[derive(Debug, Default)]
pub(crate) struct Finder {
    line: Vec<u8>,
    found: bool,
}

impl Finder {
    /// Takes more of the log; gives the line when it is complete, once.
    pub(crate) fn find(&mut self, bytes: &[u8]) -> Option<String> {
        for byte in bytes {
            if self.found {
                return None;
            }
            if *byte != b'\n' {
                if self.line.len() < LINE_BYTES_MAX {
                    self.line.push(*byte);
                }
                continue;
            }
            if self.line.windows(MARK.len()).any(|words| words == MARK) {
                self.found = true;
                return Some(String::from_utf8_lossy(&self.line).trim().to_owned());
            }
            self.line.clear();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_once_across_reads_and_cut() {
        let mut finder = Finder::default();
        assert_eq!(finder.find(b"one\n[ 1.0] Kernel panic - not"), None);
        let found = finder.find(b" syncing: Out of memory\r\nmore\n");
        let line = "[ 1.0] Kernel panic - not syncing: Out of memory";
        assert_eq!(found.as_deref(), Some(line));
        assert_eq!(finder.find(b"Kernel panic - not syncing: again\n"), None);

        let mut finder = Finder::default();
        let mut long = MARK.to_vec();
        long.extend([b'x'; 2 * LINE_BYTES_MAX]);
        long.push(b'\n');
        assert_eq!(
            finder.find(&long).map(|line| line.len()),
            Some(LINE_BYTES_MAX)
        );
    }
}
