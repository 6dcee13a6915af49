//! A fuzzer's bytes as the choices of a program.

/// Hands out the bytes in order. A program ends when they do.
#[derive(Debug)]
pub(crate) struct Choices<'a> {
    rest: &'a [u8],
}

impl<'a> Choices<'a> {
    /// All of `bytes` are left.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.rest.split_first_chunk()?;
        self.rest = tail;
        Some(*head)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn half(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn word(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn long(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Up to `max` bytes, their number chosen first.
    pub(crate) fn some(&mut self, max: usize) -> Option<&'a [u8]> {
        let count = usize::from(self.byte()?) % (max + 1);
        let (head, tail) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = tail;
        Some(head)
    }

    /// One of a list.
    pub(crate) fn of<T: Copy>(&mut self, list: &[T]) -> Option<T> {
        let index = usize::from(self.byte()?);
        list.get(index % list.len()).copied()
    }
}
