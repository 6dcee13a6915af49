//! The generated files are current, and the example is a valid configuration with and without its
//! comments.

use std::path::Path;

use super::*;
use crate::Config;

fn assert_current(path: &str, printed: &str, command: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    let stored = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        stored == printed,
        "{path} is old: run `cargo run -p pericarp -- {}` > {path}",
        &command[9..]
    );
}

#[test]
fn generated_files_are_current() {
    assert_current("docs/reference.md", &reference(), REFERENCE_COMMAND);
    assert_current("deploy/config.toml", &example(), EXAMPLE_COMMAND);
}

#[test]
fn the_example_means_the_defaults_also_when_every_key_is_uncommented() {
    let uncommented: String = example()
        .lines()
        .map(|line| {
            line.strip_prefix('#')
                .filter(|rest| !rest.starts_with(' '))
                .unwrap_or(line)
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let before_flavour = uncommented.split("[flavour").next().unwrap().to_owned();
    for text in [example(), before_flavour, uncommented] {
        let config = Config::from_texts([(Path::new("example"), text.as_str())]).unwrap();
        assert_eq!(config.settings, Config::default().settings);
    }
}

#[test]
fn every_key_is_documented_in_both_files() {
    for key in KEYS {
        assert!(
            reference().contains(&format!("| `{}` |", key.name)),
            "{}",
            key.path
        );
        assert!(
            example().contains(&format!("\n#{} = ", key.name)),
            "{}",
            key.path
        );
        assert!(
            key.doc.trim().ends_with('.'),
            "{}: a sentence ends with a full stop",
            key.path
        );
        assert!(!key.doc.contains('|'), "{}: breaks the table", key.path);
    }
}
