//! The key table as text for people: the reference page and the commented example. Both files in
//! the repository are printed from here and compared by a test.

use std::fmt::Write;

use crate::annotations::ANNOTATION_PREFIX;
use crate::keys::{KEYS, Key, SECTIONS};
use crate::kind::{Kind, Value};

/// Command that prints the reference page.
pub const REFERENCE_COMMAND: &str = "pericarp config reference";
/// Command that prints the example.
pub const EXAMPLE_COMMAND: &str = "pericarp config example";
/// Width to which the example's comments are wrapped.
const COMMENT_COLUMNS: usize = 100;

fn keys_of(section: &str) -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(move |key| key.section == section)
}

fn default_in_words(key: &Key) -> String {
    match key.default_value() {
        Value::Text(text) if text.is_empty() => "none".to_owned(),
        Value::List(items) if items.is_empty() => "none".to_owned(),
        value => format!("`{value}`"),
    }
}

fn kind_in_words(kind: Kind) -> String {
    match kind {
        Kind::Choice(words) => words
            .iter()
            .map(|word| format!("`\"{word}\"`"))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    }
}

/// `docs/reference.md`.
#[must_use]
pub fn reference() -> String {
    let mut page = format!(
        "# Configuration reference\n\n\
         <!-- Printed by `{REFERENCE_COMMAND}` from the key table in \
         runtime-config/src/keys.rs. Change it there. -->\n\n\
         How the file, its drop-ins, flavours and annotations fit together is told in\n\
         [configuration.md](configuration.md). *Pod* says whether a pod may set the key by the \
         annotation\n\
         `{ANNOTATION_PREFIX}<section>.<key>`, provided that `security.allowed_annotations` \
         names it.\n"
    );
    for (section, doc) in SECTIONS {
        write_section(&mut page, section, doc.trim());
    }
    page
}

fn write_section(page: &mut String, section: &str, doc: &str) {
    let head = "| Key | Allowed | Default | Pod | Meaning |\n|---|---|---|---|---|";
    append(page, format_args!("\n## [{section}]\n\n{doc}\n\n{head}\n"));
    for key in keys_of(section) {
        let pod = if key.pod_may_override { "yes" } else { "no" };
        let (allowed, default) = (kind_in_words(key.kind), default_in_words(key));
        append(
            page,
            format_args!(
                "| `{}` | {allowed} | {default} | {pod} | {} |\n",
                key.name,
                key.doc.trim()
            ),
        );
    }
}

/// `deploy/config.toml`: every key with its default, commented out.
#[must_use]
pub fn example() -> String {
    let mut file = format!(
        "# Pericarp's configuration: every key with its default. Remove the `#` before a key to \
            change it.\n\
         # Printed by `{EXAMPLE_COMMAND}`. `pericarp config check` tells whether what \
         you wrote is right.\n\
         # Drop-ins beside this file, config.d/*.toml, are laid over it in the order \
         of their names.\n"
    );
    for (section, doc) in SECTIONS {
        append(&mut file, format_args!("\n# {}\n[{section}]\n", doc.trim()));
        for key in keys_of(section) {
            write_example_key(&mut file, key);
        }
    }
    file.push_str(
        "\n# Settings of the pods of one runtime handler alone: name the flavour in the options \
            of containerd's\n\
         # runtime handler (`Flavour = \"large\"`) and write here what differs.\n\
         #[flavour.large.vm]\n#default_memory_mib = 4096\n",
    );
    file
}

fn write_example_key(file: &mut String, key: &Key) {
    file.push('\n');
    let pod = if key.pod_may_override {
        " A pod may override it if allowed."
    } else {
        ""
    };
    let text = format!("{} Allowed: {}.{pod}", key.doc.trim(), key.kind);
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > COMMENT_COLUMNS {
            append(file, format_args!("{line}\n"));
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    append(
        file,
        format_args!("{line}\n#{} = {}\n", key.name, key.default_value()),
    );
}

fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments)
        .expect("writing to a String does not fail");
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
