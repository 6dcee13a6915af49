//! Made-up crates that the rules accept and refuse.

use super::{
    Floor,
    tree::{Tree, Violation},
};

const FLOORS: &[Floor] = &[
    ("main", "top ground"),
    ("top", "side ground"),
    ("side", "ground"),
    ("ground: files log", ""),
];

/// A crate with floors in order, changed by `changes`.
fn tree(changes: &[(&str, &str)]) -> Tree {
    let files = [
        (
            "main.rs",
            "mod top; mod side; mod files; mod log; use top::run;",
        ),
        (
            "top/mod.rs",
            "mod inner; pub use inner::run; use crate::side::Side;",
        ),
        ("top/inner.rs", "use super::Top; use crate::log::warn;"),
        ("side/mod.rs", "use crate::files;"),
        ("files.rs", "use crate::log;"),
        ("log.rs", ""),
    ];
    let sources = files
        .iter()
        .chain(changes)
        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
        .collect();
    Tree::new("crate", sources)
}

/// Asserts that there is one violation, and returns it as text.
fn only(violations: &[Violation]) -> String {
    let [(path, line, what)] = violations else {
        panic!("not one violation: {violations:?}");
    };
    format!("{path}:{line}: {what}")
}

#[test]
fn downward_edges_are_accepted() {
    let tree = tree(&[]);
    assert_eq!(tree.floor_violations(FLOORS), []);
    assert_eq!(tree.cycle_violations(), []);
    let listing = tree.listing(FLOORS);
    assert!(
        listing.contains("crate: top -> side: 1 edges\n"),
        "{listing}"
    );
    assert!(!listing.contains("NOT ALLOWED"), "{listing}");
}

#[test]
fn an_upward_edge_is_refused() {
    let tree = tree(&[("side/mod.rs", "use std::fs;\nuse crate::top::{self, Top};")]);
    let found = only(&tree.floor_violations(FLOORS));
    let expected = "crate/src/side/mod.rs:2: side -> top, an upward edge (crate::top, \
                    crate::top::Top): ";
    assert!(found.starts_with(expected), "{found}");
    assert!(
        tree.listing(FLOORS)
            .contains("side -> top: 1 edges, NOT ALLOWED")
    );
}

#[test]
fn an_edge_without_a_line_is_refused() {
    let skips = tree(&[(
        "main.rs",
        "mod top; mod side; mod files; mod log;\nuse side::Side;",
    )]);
    let found = only(&skips.floor_violations(FLOORS));
    assert!(
        found.contains(":2: main -> side, an edge that FLOORS does not list"),
        "{found}"
    );

    let new_folder = tree(&[("new/mod.rs", "")]);
    let found = only(&new_folder.floor_violations(FLOORS));
    assert!(found.contains("`new` has no line in FLOORS"), "{found}");

    let new_file = tree(&[("other.rs", "")]);
    let found = only(&new_file.floor_violations(FLOORS));
    assert!(found.contains("`.` has no line in FLOORS"), "{found}");

    let gone = [FLOORS, &[("gone", "")]].concat();
    let found = only(&tree(&[]).floor_violations(&gone));
    assert!(found.contains("FLOORS names `gone`"), "{found}");
}

#[test]
fn a_cycle_between_folders_is_refused() {
    let tree = tree(&[
        ("side/mod.rs", "mod near; mod far;"),
        ("side/near.rs", "\nuse crate::top::run;"),
        ("side/far.rs", "use super::near;"),
        (
            "top/mod.rs",
            "mod inner; pub use inner::run; use crate::side::{near, far};",
        ),
    ]);
    let found = only(&tree.cycle_violations());
    let expected = "crate/src/side/near.rs:2: a cycle between folders: side/near.rs:2 -> \
                    top/mod.rs:1 -> side/near.rs (4 files depend on each other): ";
    assert!(found.starts_with(expected), "{found}");
    let listing = tree.listing(FLOORS);
    assert!(listing.contains("a cycle of 4 files"), "{listing}");
}

#[test]
fn a_cycle_within_a_folder_is_accepted() {
    // `top/mod.rs` and `top/inner.rs` use each other; `x.rs` belongs to the folder `x`.
    let tree = tree(&[
        ("main.rs", "mod top; mod side; mod x;"),
        ("x.rs", "mod y; use y::Y;"),
        ("x/y.rs", "use super::X;"),
    ]);
    assert_eq!(tree.cycle_violations(), []);
}
