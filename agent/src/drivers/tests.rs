//! A driver image in a folder: what of it is found, and which mistakes are named.

use std::fs;

use serde_json::json;

use super::*;

fn image(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    root
}

fn spec(host_path: &str) -> String {
    json!({
        "cdiVersion": "0.6.0", "kind": "example.com/card",
        "devices": [{"name": "card", "containerEdits": {
            "mounts": [{"hostPath": host_path, "containerPath": "/usr/lib/x.so"}]}}],
    })
    .to_string()
}

fn refusal(files: &[(&str, &str)]) -> String {
    let root = image(files);
    Drivers::read(root.path()).unwrap_err().to_string()
}

#[test]
fn links_lead_to_places_in_the_image() {
    let root = image(&[("lib/x.so.1", "x"), ("cdi/a.json", &spec("/lib/x.so"))]);
    std::os::unix::fs::symlink("/lib/x.so.1", root.path().join("lib/x.so")).unwrap();
    let drivers = Drivers::read(root.path()).unwrap();
    let real = drivers.path("/lib/x.so").unwrap();
    let expected = root.path().canonicalize().unwrap().join("lib/x.so.1");
    assert_eq!(real, expected);
    assert!(drivers.path("/etc/passwd").is_err());
    let function = Model {
        vendor: 1,
        device: 2,
        class: 3,
    };
    let mut container = Spec::default();
    drivers
        .edit(&mut container, &mut Vec::new(), &[function])
        .unwrap();
    let mounts = container.mounts().clone().unwrap();
    let added = mounts.last().unwrap();
    assert_eq!(added.source().as_deref(), Some(expected.as_path()));
    let mut without = Spec::default();
    drivers.edit(&mut without, &mut Vec::new(), &[]).unwrap();
    assert_eq!(without, Spec::default());
}

#[test]
fn a_mistake_names_file_and_remedy() {
    for (files, words) in [
        (
            &[("lib/x", "")][..],
            "modules.load, firmware/, cdi/: none of these is at its root",
        ),
        (
            &[("modules.load", "# a\na.so")][..],
            "modules.load:2: a.so is not a module",
        ),
        (&[("cdi/a.json", "{")][..], "cdi/a.json: EOF while parsing"),
        (&[("cdi/a.yaml", "")][..], "cdi/a.yaml: only JSON is read"),
        (
            &[("cdi/a.json", spec("/x").as_str())][..],
            "mounts[0].hostPath: /x is not in the image",
        ),
    ] {
        let error = refusal(files);
        assert!(error.starts_with("driver image: "), "{error}");
        assert!(error.contains(words), "{error}");
    }
    let long = " ".repeat(usize::try_from(modules::LIST_BYTES_MAX).unwrap() + 1);
    assert!(refusal(&[("modules.load", &long)]).contains("1048576 bytes"));
    let many: Vec<String> = (0..=SPECS_MAX)
        .map(|number| format!("cdi/{number}.json"))
        .collect();
    let many: Vec<_> = many.iter().map(|name| (name.as_str(), "{}")).collect();
    assert!(refusal(&many).contains("more than 64 files"));
}

#[test]
fn the_kernels_words_about_a_module_are_its_last() {
    let log = "[    1.000000] igb: old\n[    2.000000] igbvf: other\n[    3.000000] igb: a\n\
               [    3.000001] igb: b\n[    3.000002] igb: version magic 'x' should be 'y'\n";
    assert_eq!(
        words_about(log, "igb"),
        " (igb: a; igb: b; igb: version magic 'x' should be 'y')"
    );
    assert_eq!(words_about(log, "gb"), "");
}
