//! The encoding of the machine messages: little-endian, fixed-size, no padding other than zeros.
//!
//! A message type is declared once, as a table, by the three macros of this module; size, encoder
//! and decoder follow from it, and a decoder's error names the field. What decodes also encodes to
//! the same bytes: there is one spelling of each value.

use std::fmt;

/// Why bytes are no message, or a value is none that may be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct FieldError {
    /// The field, as `Type.field`.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

impl FieldError {
    /// Names a field and what is wrong with it.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
        }
    }
}

/// A value of a fixed size on the wire.
pub trait Wire: Sized {
    /// Its size in bytes.
    const SIZE: usize;
    /// Appends exactly [`Self::SIZE`] bytes.
    fn put(&self, out: &mut Vec<u8>);
    /// Reads exactly [`Self::SIZE`] bytes, for `field`.
    ///
    /// # Errors
    /// The bytes are too few or are no such value.
    fn get(input: &mut &[u8], field: &'static str) -> Result<Self, FieldError>;
}

fn take<'a>(
    input: &mut &'a [u8],
    count: usize,
    field: &'static str,
) -> Result<&'a [u8], FieldError> {
    let (head, tail) = input
        .split_at_checked(count)
        .ok_or_else(|| FieldError::new(field, "the message ends before it"))?;
    *input = tail;
    Ok(head)
}

macro_rules! wire_integer {
    ($($kind:ty),*) => {$(
        impl Wire for $kind {
            const SIZE: usize = size_of::<$kind>();
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn get(input: &mut &[u8], field: &'static str) -> Result<Self, FieldError> {
                let mut bytes = [0; size_of::<$kind>()];
                bytes.copy_from_slice(take(input, size_of::<$kind>(), field)?);
                Ok(<$kind>::from_le_bytes(bytes))
            }
        }
    )*};
}
wire_integer!(u8, u16, u32, u64);

impl Wire for bool {
    const SIZE: usize = 1;
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
    fn get(input: &mut &[u8], field: &'static str) -> Result<Self, FieldError> {
        match u8::get(input, field)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(FieldError::new(
                field,
                format!("{other} is neither 0 nor 1"),
            )),
        }
    }
}

impl<const N: usize> Wire for [u8; N] {
    const SIZE: usize = N;
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn get(input: &mut &[u8], field: &'static str) -> Result<Self, FieldError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(take(input, N, field)?);
        Ok(bytes)
    }
}

/// UTF-8 text of at most `N` bytes without NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Text<const N: usize>(String);

impl<const N: usize> Text<N> {
    /// Checks and takes a text; `field` is named when it is refused.
    ///
    /// # Errors
    /// It is longer than `N` bytes or has a NUL.
    pub fn new(field: &'static str, text: impl Into<String>) -> Result<Self, FieldError> {
        let text = text.into();
        if text.len() > N {
            let reason = format!("{} bytes are more than {N}", text.len());
            return Err(FieldError::new(field, reason));
        }
        if text.contains('\0') {
            return Err(FieldError::new(field, "it has a NUL byte"));
        }
        Ok(Self(text))
    }

    /// As much of a text as fits, cut at a character; for diagnoses. NULs become spaces.
    #[must_use]
    pub fn lossy(text: &str) -> Self {
        let mut end = text.len().min(N);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self(text[..end].replace('\0', " "))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<const N: usize> Wire for Text<N> {
    const SIZE: usize = 2 + N;
    fn put(&self, out: &mut Vec<u8>) {
        let length = u16::try_from(self.0.len()).expect("every N of this protocol fits 16 bits");
        length.put(out);
        out.extend_from_slice(self.0.as_bytes());
        out.resize(out.len() + N - self.0.len(), 0);
    }
    fn get(input: &mut &[u8], field: &'static str) -> Result<Self, FieldError> {
        let length = usize::from(u16::get(input, field)?);
        let bytes = take(input, N, field)?;
        let (text, padding) = bytes
            .split_at_checked(length)
            .ok_or_else(|| FieldError::new(field, format!("{length} bytes are more than {N}")))?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(FieldError::new(field, "its padding is not zero"));
        }
        let text =
            std::str::from_utf8(text).map_err(|_| FieldError::new(field, "it is not UTF-8"))?;
        Self::new(field, text)
    }
}

/// At most `N` values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List<T, const N: usize>(Vec<T>);

impl<T, const N: usize> Default for List<T, N> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T, const N: usize> List<T, N> {
    /// Checks and takes a list; `field` is named when it is refused.
    ///
    /// # Errors
    /// There are more than `N`.
    pub fn new(field: &'static str, values: Vec<T>) -> Result<Self, FieldError> {
        if values.len() > N {
            let reason = format!("{} are more than {N}", values.len());
            return Err(FieldError::new(field, reason));
        }
        Ok(Self(values))
    }

    /// The values.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        &self.0
    }
}

impl<T: Wire, const N: usize> Wire for List<T, N> {
    const SIZE: usize = 2 + N * T::SIZE;
    fn put(&self, out: &mut Vec<u8>) {
        let count = u16::try_from(self.0.len()).expect("every N of this protocol fits 16 bits");
        count.put(out);
        for value in &self.0 {
            value.put(out);
        }
        out.resize(out.len() + (N - self.0.len()) * T::SIZE, 0);
    }
    fn get(input: &mut &[u8], field: &'static str) -> Result<Self, FieldError> {
        let count = usize::from(u16::get(input, field)?);
        let mut bytes = take(input, N * T::SIZE, field)?;
        if count > N {
            return Err(FieldError::new(field, format!("{count} are more than {N}")));
        }
        let values = (0..count)
            .map(|_| T::get(&mut bytes, field))
            .collect::<Result<_, _>>()?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Err(FieldError::new(field, "its padding is not zero"));
        }
        Ok(Self(values))
    }
}

/// Larger of two sizes, for the size of a choice.
#[must_use]
pub const fn larger(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

/// Declares a struct: its fields in the order of the wire.
macro_rules! wire_struct {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $kind,)* }

        impl $crate::machine::wire::Wire for $name {
            const SIZE: usize = 0 $(+ <$kind as $crate::machine::wire::Wire>::SIZE)*;
            fn put(&self, out: &mut Vec<u8>) {
                $($crate::machine::wire::Wire::put(&self.$field, out);)*
                let _ = out;
            }
            fn get(
                input: &mut &[u8],
                _field: &'static str,
            ) -> Result<Self, $crate::machine::wire::FieldError> {
                $(let $field = $crate::machine::wire::Wire::get(
                    input,
                    concat!(stringify!($name), ".", stringify!($field)),
                )?;)*
                let _ = &input;
                Ok(Self { $($field,)* })
            }
        }
    };
}

/// Declares an enum without data: its 16-bit codes.
macro_rules! wire_code {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$code_meta:meta])* $variant:ident = $code:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$code_meta])* $variant,)* }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
        }

        impl $crate::machine::wire::Wire for $name {
            const SIZE: usize = 2;
            fn put(&self, out: &mut Vec<u8>) {
                let code: u16 = match self { $(Self::$variant => $code,)* };
                code.put(out);
            }
            fn get(
                input: &mut &[u8],
                field: &'static str,
            ) -> Result<Self, $crate::machine::wire::FieldError> {
                match <u16 as $crate::machine::wire::Wire>::get(input, field)? {
                    $($code => Ok(Self::$variant),)*
                    other => Err($crate::machine::wire::FieldError::new(
                        field,
                        format!("{other} is no {}", stringify!($name)),
                    )),
                }
            }
        }
    };
}

/// Declares an enum with one payload a variant: a 16-bit tag, then the payload, padded to the
/// largest one.
macro_rules! wire_choice {
    ($(#[$meta:meta])* $name:ident {
        $($(#[$tag_meta:meta])* $variant:ident($payload:ty) = $tag:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $name { $($(#[$tag_meta])* $variant($payload),)* }

        impl $crate::machine::wire::Wire for $name {
            const SIZE: usize = {
                let largest = 0;
                $(let largest = $crate::machine::wire::larger(
                    largest,
                    <$payload as $crate::machine::wire::Wire>::SIZE,
                );)*
                2 + largest
            };
            fn put(&self, out: &mut Vec<u8>) {
                let end = out.len() + Self::SIZE;
                match self {
                    $(Self::$variant(payload) => {
                        let tag: u16 = $tag;
                        tag.put(out);
                        payload.put(out);
                    })*
                }
                out.resize(end, 0);
            }
            fn get(
                input: &mut &[u8],
                field: &'static str,
            ) -> Result<Self, $crate::machine::wire::FieldError> {
                use $crate::machine::wire::{FieldError, Wire};
                let Some((mut bytes, rest)) = input.split_at_checked(Self::SIZE) else {
                    return Err(FieldError::new(field, "the message ends before it"));
                };
                *input = rest;
                let value = match u16::get(&mut bytes, field)? {
                    $($tag => Self::$variant(<$payload as Wire>::get(&mut bytes, field)?),)*
                    other => {
                        let reason = format!("{other} is no {}", stringify!($name));
                        return Err(FieldError::new(field, reason));
                    }
                };
                if bytes.iter().any(|byte| *byte != 0) {
                    return Err(FieldError::new(field, "its padding is not zero"));
                }
                Ok(value)
            }
        }
    };
}

pub(crate) use {wire_choice, wire_code, wire_struct};
