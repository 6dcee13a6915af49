//! Number of threads that a user can create.

use std::thread;

use serde_json::{Value, json};

use super::name;

/// Smallest stack of a thread.
const STACK_BYTES: usize = 16 << 10;

/// Creates threads that do not end, until there are `count` or the kernel refuses.
pub(crate) fn make(count: usize) -> Value {
    for made in 0..count {
        let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn(|| {
            loop {
                thread::park();
            }
        });
        if let Err(error) = thread {
            return json!({"threads": made, "error": name(&error)});
        }
    }
    json!({"threads": count})
}
