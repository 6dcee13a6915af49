//! Ids of sandboxes, containers and execs, which become names of directories and keyrings.

use pericarp_protocol::limits::ID_BYTES_MAX;

/// Checks an id; the error says what is wrong.
pub(crate) fn check(id: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let fits = (1..=ID_BYTES_MAX).contains(&id.len()) && !id.starts_with('.');
    if fits && id.bytes().all(plain) {
        return Ok(());
    }
    Err(format!(
        "{id:?} is not an id: 1 to {ID_BYTES_MAX} letters, digits, '_', '.' and '-', not \
            beginning with '.'"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_directories() {
        for id in ["a", "0123456789abcdef", "a_b.c-d"] {
            assert!(check(id).is_ok(), "{id:?}");
        }
        let long = "a".repeat(ID_BYTES_MAX + 1);
        for id in ["", ".", "..", ".a", "a/b", "a b", "a\0", "ä", long.as_str()] {
            assert!(check(id).is_err(), "{id:?}");
        }
    }
}
