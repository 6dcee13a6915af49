//! What an image can influence while its container is built, for the fuzz targets.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::symlink,
    },
};

use super::passwd::home;
use crate::ground::beneath::{self, Make};

/// Entries that one input makes.
const ENTRIES_MAX: usize = 16;

/// A tree and paths in it, a line each: `name>target` is a symbolic link, `name/` a directory,
/// anything else a path that is made. Nothing is made or found outside of the root.
pub(crate) fn paths(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let folder = tempfile::tempdir().expect("a folder for the root");
    let base = folder.path().join("root");
    fs::create_dir(&base).expect("the root");
    let root = File::open(&base).expect("the root");
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']);
    for line in text.lines().take(ENTRIES_MAX) {
        if let Some((name, target)) = line.split_once('>') {
            if is_name(name) {
                // It may be there already, or lead nowhere that a link can name.
                let _ = symlink(target, base.join(name));
            }
            continue;
        }
        let make = match line.ends_with('/') {
            true => Make::Directory,
            false => Make::File,
        };
        if let Ok(found) = beneath::create(root.as_fd(), line, make) {
            let place = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()));
            let place = place.expect("a descriptor has a place");
            assert!(
                place.starts_with(&base),
                "{line:?} leads to {}",
                place.display()
            );
        }
        if let Ok((_, name)) = beneath::parent(root.as_fd(), line) {
            assert!(is_name(&name), "{line:?}: {name:?}");
        }
    }
    let outside = fs::read_dir(folder.path()).expect("the folder").count();
    assert_eq!(outside, 1, "{text:?} made something outside");
}

/// An `/etc/passwd`: a home is an absolute path of one line.
pub(crate) fn passwd(data: &[u8]) {
    for uid in [0, 1000, u32::MAX] {
        if let Some(home) = home(data, uid) {
            assert!(home.starts_with('/') && !home.contains(['\0', '\n', ':']));
        }
    }
}
