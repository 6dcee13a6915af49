//! The agent's log: lines on standard error, which the kernel opened on the console that the host
//! reads.
//!
//! There are few lines and no levels to configure, so a logging library would only cost memory and
//! boot time.

use std::{
    fmt::Arguments,
    io::{Write, stderr},
};

/// Something that was expected to work did not; the guest goes on.
pub(crate) fn warn(text: Arguments<'_>) {
    write(format_args!("pericarp-agent: warning: {text}\n"));
}

/// The agent cannot go on.
pub(crate) fn error(text: Arguments<'_>) {
    write(format_args!("pericarp-agent: error: {text}\n"));
}

fn write(line: Arguments<'_>) {
    // One write per line, so that lines of the kernel do not come between its parts. A console that
    // cannot be written to leaves nobody to tell.
    let _ = stderr().write_all(line.to_string().as_bytes());
}

/// An error with its causes, each after a colon.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
