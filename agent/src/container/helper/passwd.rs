//! `/etc/passwd` of an image: a file that anybody may have written.

/// Most bytes that are read of it.
pub(super) const PASSWD_BYTES_MAX: u64 = 1 << 20;

/// The home of the user `uid` in the text of a passwd(5) file: the first entry that has this id and
/// an absolute path.
pub(super) fn home(text: &[u8], uid: u32) -> Option<String> {
    text.split(|byte| *byte == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        // name:password:uid:gid:comment:home:shell
        let fields: Vec<_> = line.splitn(8, ':').collect();
        let [name, _, id, _, _, home, ..] = fields[..] else {
            return None;
        };
        let matches = !name.is_empty() && id.parse() == Ok(uid);
        (matches && home.starts_with('/') && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn entries() {
        let text = b"root:x:0:0:root:/root:/bin/sh\n# \
            comment\nbad\nuser:x:1000:1000:,,,:/home/user:/bin/sh\n\
            relative:x:7:7::home:\nno-shell:x:8:8::/srv\nutf8:x:9:9:\xff:/x:/y";
        assert_eq!(home(text, 0).as_deref(), Some("/root"));
        assert_eq!(home(text, 1000).as_deref(), Some("/home/user"));
        assert_eq!(home(text, 7), None);
        assert_eq!(home(text, 8).as_deref(), Some("/srv"));
        assert_eq!(home(text, 9), None);
        assert_eq!(home(text, 1), None);
        assert_eq!(home(b"", 0), None);
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_absolute_home_or_none(
            text in prop::collection::vec(any::<u8>(), 0..400),
            uid: u32,
        ) {
            if let Some(home) = home(&text, uid) {
                prop_assert!(home.starts_with('/') && !home.contains(['\0', '\n', ':']));
            }
        }

        #[test]
        fn lines_of_the_right_form_are_found(uid: u32, path in "/[a-z/]{0,20}") {
            let other = uid.wrapping_add(1);
            let text = format!("x:y:{other}:0::/other:\nu:x:{uid}:0:c:{path}:/bin/sh\n");
            prop_assert_eq!(home(text.as_bytes(), uid), Some(path));
        }
    }
}
