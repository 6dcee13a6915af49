//! What the reader of references sees and skips.

use super::{Sources, edges};

fn sources(files: &[(&str, &str)]) -> Sources {
    files
        .iter()
        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
        .collect()
}

/// Edges of a crate that also has `lib.rs` with modules `a` (folder with `b`), `c` and `d`.
fn edges_with(path: &str, text: &str) -> Vec<String> {
    let mut files = sources(&[
        ("lib.rs", "mod a; mod c; mod d;"),
        ("a/mod.rs", "pub(crate) mod b;"),
        ("a/b.rs", ""),
        ("c.rs", ""),
        ("d.rs", ""),
    ]);
    let text = match files.get(path) {
        Some(declarations) => format!("{declarations}\n{text}"),
        None => text.to_owned(),
    };
    files.insert(path.to_owned(), text);
    edges(&files, "pericarp_x")
        .into_iter()
        .map(|edge| format!("{}:{} -> {}", edge.from, edge.line, edge.to))
        .collect()
}

#[test]
fn nested_use() {
    let text = "use crate::{\n    a::{\n        self,\n        b::{Item, Other as Name},\n    },\n\
                d::*,\n};\n";
    assert_eq!(
        edges_with("c.rs", text),
        ["c.rs:5 -> a/b.rs", "c.rs:4 -> a/mod.rs", "c.rs:7 -> d.rs"]
    );
}

#[test]
fn super_and_self() {
    assert_eq!(
        edges_with(
            "a/b.rs",
            "use super::Item;\nuse super::super::d::Item as Other;"
        ),
        ["a/b.rs:2 -> a/mod.rs", "a/b.rs:3 -> d.rs"]
    );
    assert_eq!(
        edges_with("a/mod.rs", "use self::b::Item;\npub use b::Other;"),
        ["a/mod.rs:2 -> a/b.rs"]
    );
    let inline = "mod inner {\n    use super::super::d;\n    fn f() { self::g(); super::h(); }\n}";
    assert_eq!(edges_with("c.rs", inline), ["c.rs:3 -> d.rs"]);
}

#[test]
fn inline_paths() {
    let text = "fn f() -> crate::d::Item {\n    super::super::c::g::<u8>(|x| x.y::<u8>())\n}\n";
    assert_eq!(
        edges_with("a/b.rs", text),
        ["a/b.rs:3 -> c.rs", "a/b.rs:2 -> d.rs"]
    );
    let through_imports = "use crate::a as other;\nfn f() {\n    other::b::g();\n}\n";
    assert_eq!(
        edges_with("c.rs", through_imports),
        ["c.rs:4 -> a/b.rs", "c.rs:2 -> a/mod.rs"]
    );
    let macros = "macro_rules! m {\n    () => { $crate::d::f() };\n}\n";
    assert_eq!(edges_with("c.rs", macros), ["c.rs:3 -> d.rs"]);
    assert_eq!(
        edges_with("c.rs", "fn f() { pericarp_x::d::g(); }"),
        ["c.rs:2 -> d.rs"]
    );
}

#[test]
fn re_exports_lead_to_their_module() {
    let files = sources(&[
        ("main.rs", "mod a; mod c;"),
        ("a/mod.rs", "mod b;\npub(crate) use b::Item;"),
        ("a/b.rs", "pub(crate) struct Item;"),
        ("c.rs", "use crate::a::Item;"),
    ]);
    let found: Vec<(String, String)> = edges(&files, "pericarp_x")
        .into_iter()
        .map(|edge| (edge.from, edge.to))
        .collect();
    let expected = [("a/mod.rs", "a/b.rs"), ("c.rs", "a/mod.rs")]
        .map(|(from, to)| (from.to_owned(), to.to_owned()));
    assert_eq!(found, expected);
}

#[test]
fn files_of_modules() {
    let files = sources(&[
        (
            "main.rs",
            "mod a;\n#[path = \"x/y.rs\"]\nmod z;\nfn f() { z::g(); a::b::g(); }",
        ),
        ("a.rs", "mod b;\nmod inner { mod c; fn f() { c::g(); } }"),
        ("a/b.rs", ""),
        ("a/inner/c.rs", ""),
        ("x/y.rs", ""),
        ("bin/tool.rs", "fn main() { crate::f(); }"),
    ]);
    let found: Vec<String> = edges(&files, "pericarp_x")
        .into_iter()
        .map(|edge| format!("{} -> {}", edge.from, edge.to))
        .collect();
    let expected = [
        "a.rs -> a/inner/c.rs",
        "main.rs -> a/b.rs",
        "main.rs -> x/y.rs",
    ];
    assert_eq!(found, expected);
}

#[test]
fn test_code_is_skipped() {
    for text in [
        "#[cfg(test)]\nmod tests {\n    use crate::d::Item;\n}",
        "#[cfg(test)]\n#[expect(dead_code)]\npub(crate) fn f(x: [u8; 2]) { crate::d::g() }",
        "#[cfg(all(test, unix))]\nuse crate::d::{A, B};",
        "#[cfg(test)]\nmod c_tests;",
    ] {
        assert_eq!(edges_with("c.rs", text), [""; 0], "{text}");
        // The code behind it counts.
        let text = format!("{text}\nuse crate::a::Item;");
        let found = edges_with("c.rs", &text);
        assert!(
            found.len() == 1 && found[0].ends_with("-> a/mod.rs"),
            "{found:?}"
        );
    }
    let field = "struct S {\n    #[cfg(test)]\n    x: crate::d::X,\n    y: crate::a::Y,\n}";
    assert_eq!(edges_with("c.rs", field), ["c.rs:5 -> a/mod.rs"]);
    let feature = "#[cfg(any(test, feature = \"fuzzing\"))]\nuse crate::d::Item;";
    assert_eq!(edges_with("c.rs", feature), ["c.rs:3 -> d.rs"]);
}

#[test]
fn what_is_not_a_use() {
    for text in [
        "// use crate::d::Item;",
        "/* /* nested */ crate::d::f() */",
        "//! [`crate::d::Item`]",
        "const TEXT: &str = \"crate::d::f() \\\" crate::d::g()\";",
        "const RAW: &str = r#\"\" crate::d::f()\"#;",
        "const QUOTES: [char; 2] = ['\"', '\\''];",
        "pub(in crate::d) struct S;",
        "use ::d::Item;\nuse std::{fs, io::Read};\nfn f() { std::fs::read(); ::d::g(); }",
        "fn f<'a>(x: &'a str) -> impl Fn() + use<'a> { move || drop(x) }",
        "fn f() { Vec::<d::X>::new::<u8>(); Self::d::<u8>(); }",
    ] {
        assert_eq!(edges_with("c.rs", text), [""; 0], "{text}");
    }
}
