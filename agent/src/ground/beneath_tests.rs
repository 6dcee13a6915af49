//! Trees with links in them, made by hand and at random.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
};

use proptest::prelude::*;

use super::*;

fn root() -> (tempfile::TempDir, OwnedFd) {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("root")).unwrap();
    let root = File::open(folder.path().join("root")).unwrap();
    (folder, root.into())
}

#[test]
fn missing_things_are_made_beneath() {
    let (folder, root) = root();
    create(root.as_fd(), "/a/b/c", Make::File).unwrap();
    assert!(folder.path().join("root/a/b/c").is_file());
    create(root.as_fd(), "a/d/", Make::Directory).unwrap();
    assert!(folder.path().join("root/a/d").is_dir());
}

#[test]
fn dangling_links_lead_beneath_too() {
    let (folder, root) = root();
    let base = folder.path().join("root");
    fs::create_dir(base.join("etc")).unwrap();
    symlink("../run/resolve/resolv.conf", base.join("etc/resolv.conf")).unwrap();
    create(root.as_fd(), "/etc/resolv.conf", Make::File).unwrap();
    assert!(base.join("run/resolve/resolv.conf").is_file());
    symlink("/../../../escaped", base.join("out")).unwrap();
    create(root.as_fd(), "/out/file", Make::File).unwrap();
    assert!(base.join("escaped/file").is_file());
    assert!(!folder.path().join("escaped").exists());
}

#[test]
fn circles_end() {
    let (folder, root) = root();
    let base = folder.path().join("root");
    symlink("two", base.join("one")).unwrap();
    symlink("one", base.join("two")).unwrap();
    let error = create(root.as_fd(), "/one", Make::File).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
}

#[test]
fn the_last_name_is_not_followed_for_a_parent() {
    let (folder, root) = root();
    symlink("/etc/passwd", folder.path().join("root/null")).unwrap();
    let (_, name) = parent(root.as_fd(), "/null").unwrap();
    assert_eq!(name, "null");
    assert!(parent(root.as_fd(), "/a/..").is_err());
    assert!(parent(root.as_fd(), "/a/\0").is_err());
    assert!(parent(root.as_fd(), "/").is_err());
}

#[test]
fn only_paths_beneath_the_base_are_taken() {
    let base = Path::new("/run/pericarp");
    let names = |path| components(base, Path::new(path));
    assert_eq!(names("/run/pericarp/a/b"), Some(vec!["a", "b"]));
    assert_eq!(names("/run/pericarp//a/./b/"), Some(vec!["a", "b"]));
    for path in [
        "/run/pericarp",
        "/run/pericarp/../x",
        "/run/pericarpx/a",
        "a",
        "/",
        "",
    ] {
        assert_eq!(names(path), None, "{path:?}");
    }
}

#[test]
fn no_symbolic_link_is_followed() {
    let base = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc", base.path().join("link")).unwrap();
    let error = open_names(base.path(), &["link", "passwd"], None).unwrap_err();
    assert!(
        matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)),
        "{error}"
    );
    open_names(base.path(), &["a", "b"], Some(Make::Directory)).unwrap();
    assert!(base.path().join("a/b").is_dir());
    open_names(base.path(), &["a", "f"], Some(Make::File)).unwrap();
    assert!(base.path().join("a/f").is_file());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    // Any path through any link stays beneath: everything that is made lies in `root`.
    #[test]
    fn nothing_is_made_outside(
        link in "[./a]{1,12}",
        path in "(l|a|b|\\.|\\.\\.)(/(l|a|b|\\.|\\.\\.)){0,6}",
    ) {
        let (folder, root) = root();
        let _ = symlink(&link, folder.path().join("root/l"));
        let _ = create(root.as_fd(), &path, Make::Directory);
        let outside: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        prop_assert_eq!(outside.len(), 1);
    }
}
