//! Volumes in memory: whose they are, and what the guest is asked for. Folders stand for the
//! mounts; the mounts themselves are in `tests/tests/node_storage.rs`.

use std::{fs::Permissions, os::unix::fs::PermissionsExt};

use super::*;

/// A place in a folder that stands for a volume.
fn place(volume: &Path, beneath: &str, mounted: &[&str]) -> Place {
    Place {
        volume: volume.to_owned(),
        beneath: beneath.into(),
        bind: (!beneath.is_empty()).then(|| vec!["nodev".to_owned()]),
        options: vec!["nosuid".to_owned()],
        size_bytes: Some(1 << 20),
        mounted: mounted.iter().map(PathBuf::from).collect(),
    }
}

#[test]
fn only_directories_of_sub_paths_leave_a_volume_unused() {
    let folder = tempfile::tempdir().unwrap();
    let volume = folder.path();
    assert!(is_unused(&place(volume, "", &[])).unwrap());
    fs::create_dir_all(volume.join("a/b")).unwrap();
    assert!(is_unused(&place(volume, "a/b", &[])).unwrap());
    assert!(is_unused(&place(volume, "", &["a/b/c"])).unwrap());
    // A directory that nobody mounts may mean something to whoever made it.
    assert!(!is_unused(&place(volume, "", &[])).unwrap());
    assert!(!is_unused(&place(volume, "a", &["ab"])).unwrap());
    fs::write(volume.join("a/b/f"), "").unwrap();
    assert!(!is_unused(&place(volume, "a/b/f", &[])).unwrap());
}

#[test]
fn a_decision_stays() {
    let folder = tempfile::tempdir().unwrap();
    let volumes = MemoryVolumes::default();
    let first = folder.path().join("first");
    fs::create_dir(&first).unwrap();
    let guests = volumes.decide(&place(&first, "", &[])).unwrap().unwrap();
    fs::write(first.join("f"), "").unwrap();
    let again = volumes.decide(&place(&first, "", &[])).unwrap().unwrap();
    assert!(Arc::ptr_eq(&guests, &again));
    let second = folder.path().join("second");
    fs::create_dir(&second).unwrap();
    fs::write(second.join("f"), "").unwrap();
    assert!(volumes.decide(&place(&second, "", &[])).unwrap().is_none());
    fs::remove_file(second.join("f")).unwrap();
    assert!(volumes.decide(&place(&second, "", &[])).unwrap().is_none());
    let third = folder.path().join("third");
    fs::create_dir(&third).unwrap();
    let other = volumes.decide(&place(&third, "", &[])).unwrap().unwrap();
    assert_ne!(other.storage.mount_point, guests.storage.mount_point);
}

#[test]
fn the_guests_volume_is_made_like_the_hosts() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o2770)).unwrap();
    let mut place = place(folder.path(), "", &[]);
    let of = |place: &Place| volume_storage(place, "/m".to_owned(), 2 << 20).unwrap();
    let storage = of(&place);
    for option in ["nosuid", "mode=2770"] {
        assert!(storage.options.iter().any(|one| one == option), "{storage}");
    }
    let scratch = |storage: &Storage| match &storage.source {
        Some(Source::Scratch(scratch)) => scratch.size_bytes,
        _ => panic!("{storage}"),
    };
    assert_eq!(scratch(&storage), 1 << 20);
    let unbound = |storage: &Storage| storage.options.iter().any(|one| one == "size=0");
    assert!(!unbound(&storage));
    place.size_bytes = None;
    // The kernel's own bound, as for a size that the VM could not hold.
    for size in [None, Some(2 << 20), Some(u64::MAX)] {
        place.size_bytes = size;
        let storage = of(&place);
        assert!(scratch(&storage) == 0 && !unbound(&storage));
    }
    place.size_bytes = Some(0);
    assert!(unbound(&of(&place)));
}

#[test]
fn a_sub_path_is_made_like_the_hosts() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("a/b");
    fs::create_dir_all(&deep).unwrap();
    fs::set_permissions(&deep, Permissions::from_mode(0o1750)).unwrap();
    let part = |beneath| {
        let place = place(folder.path(), beneath, &[]);
        part_storage(&place, "/volume".to_owned(), "/part".to_owned())
    };
    let storage = part("a/b").unwrap();
    assert_eq!(storage.options, ["nodev"]);
    let Some(Source::Bind(bind)) = &storage.source else {
        panic!("{storage}")
    };
    let names: Vec<_> = bind.beneath.iter().map(|one| one.name.as_str()).collect();
    assert_eq!((bind.path.as_str(), names), ("/volume", vec!["a", "b"]));
    assert_eq!(bind.beneath[1].mode, 0o1750);
    assert_eq!(bind.beneath[1].owner_id, deep.metadata().unwrap().uid());
    fs::write(deep.join("f"), "").unwrap();
    let error = part("a/b/f").unwrap_err().to_string();
    assert!(error.contains("a/b/f"), "{error}");
}
