//! TOML text to layers of checked values, each with its place. Pure.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use crate::keys::{self, KEYS, Key, SECTIONS};
use crate::kind::{BadValue, Value, quoted};
use crate::nearest::nearest;
use crate::problem::{Place, Problem};

/// The table whose sub-tables are flavours.
pub const FLAVOUR_TABLE: &str = "flavour";
/// Most problems listed of one file: enough to mend it, few enough to read.
pub const PROBLEMS_MAX: usize = 64;
/// Longest name of a flavour in bytes (a DNS label, as RuntimeClass handlers are).
pub const FLAVOUR_BYTES_MAX: usize = 63;

/// Checked values by key, each with the place it came from.
pub type Layer = BTreeMap<&'static str, (Value, Place)>;

/// What one file says.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// Settings of every pod.
    pub base: Layer,
    /// Settings of pods of one flavour.
    pub flavours: BTreeMap<String, Layer>,
    /// What is wrong; the layers hold the rest.
    pub problems: Vec<Problem>,
}

/// Reads one file's text.
#[must_use]
pub fn parse(file: &Path, text: &str) -> Parsed {
    let mut reader = Reader {
        file,
        text,
        problems: Vec::new(),
    };
    let mut parsed = Parsed::default();
    match DeTable::parse(text) {
        Ok(document) => reader.document(document.get_ref(), &mut parsed),
        Err(error) => {
            let offset = error.span().map_or(0, |span| span.start);
            reader.problem(
                offset,
                String::new(),
                format!("not TOML: {}", error.message()),
            );
        }
    }
    parsed.problems = reader.problems;
    // Tables come in the order of their names; people read a file from top to bottom.
    parsed
        .problems
        .sort_by(|left, right| left.place.cmp(&right.place));
    parsed
}

struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn place(&self, offset: usize) -> Place {
        Place::of(self.file.to_owned(), self.text, offset)
    }

    fn problem(&mut self, offset: usize, key: String, message: String) {
        if self.problems.len() < PROBLEMS_MAX {
            let place = Some(self.place(offset));
            self.problems.push(Problem {
                place,
                key,
                message,
            });
        }
    }

    fn document(&mut self, document: &DeTable<'_>, parsed: &mut Parsed) {
        for (name, value) in document {
            if name.get_ref() != FLAVOUR_TABLE {
                self.section("", name, value, &mut parsed.base);
                continue;
            }
            let Some(flavours) = value.get_ref().as_table() else {
                let message =
                    "write a table for each flavour: [flavour.<name>.<section>]".to_owned();
                self.problem(name.span().start, FLAVOUR_TABLE.to_owned(), message);
                continue;
            };
            for (name, value) in flavours {
                let layer = parsed
                    .flavours
                    .entry(name.get_ref().to_string())
                    .or_default();
                self.flavour(name, value, layer);
            }
        }
    }

    fn flavour(&mut self, name: &Name<'_>, value: &Spanned<DeValue<'_>>, layer: &mut Layer) {
        let prefix = format!("{FLAVOUR_TABLE}.{}", name.get_ref());
        let start = name.span().start;
        if !is_flavour_name(name.get_ref()) {
            let allowed = format!(
                "a flavour's name is 1 to {FLAVOUR_BYTES_MAX} of a-z, 0-9, `-` and `.`, like \
                 a RuntimeClass handler"
            );
            return self.problem(start, quoted(&prefix), allowed);
        }
        let Some(sections) = value.get_ref().as_table() else {
            let message = format!("write its settings in tables: [{prefix}.<section>]");
            return self.problem(start, prefix, message);
        };
        for (name, value) in sections {
            self.section(&format!("{prefix}."), name, value, layer);
        }
    }

    fn section(
        &mut self,
        prefix: &str,
        name: &Name<'_>,
        value: &Spanned<DeValue<'_>>,
        layer: &mut Layer,
    ) {
        let start = name.span().start;
        let known = SECTIONS
            .iter()
            .any(|(section, _)| section == name.get_ref());
        let written = shown(&format!("{prefix}{}", name.get_ref()));
        match (known, value.get_ref().as_table()) {
            (true, Some(table)) => {
                for (key, value) in table {
                    self.setting(prefix, name.get_ref(), key, value, layer);
                }
            }
            (true, None) => {
                self.problem(
                    start,
                    written,
                    format!("is a table: write [{prefix}{}]", name.get_ref()),
                );
            }
            (false, Some(_)) => {
                let names = SECTIONS
                    .iter()
                    .map(|(section, _)| *section)
                    .chain([FLAVOUR_TABLE]);
                let hint = nearest(name.get_ref(), names).unwrap_or_default();
                self.problem(
                    start,
                    written,
                    format!("unknown table; the nearest valid one is [{prefix}{hint}]"),
                );
            }
            (false, None) => {
                let hint =
                    nearest(name.get_ref(), KEYS.iter().map(|key| key.path)).unwrap_or_default();
                let message = format!(
                    "unknown key; the nearest valid key is `{hint}`, which stands in a table of \
                        its section"
                );
                self.problem(start, written, message);
            }
        }
    }

    fn setting(
        &mut self,
        prefix: &str,
        section: &str,
        name: &Name<'_>,
        value: &Spanned<DeValue<'_>>,
        layer: &mut Layer,
    ) {
        let path = format!("{section}.{}", name.get_ref());
        let Some(key) = keys::key(&path) else {
            let message = unknown_key(&path, section);
            return self.problem(
                name.span().start,
                shown(&format!("{prefix}{path}")),
                message,
            );
        };
        match checked(key, value.get_ref()) {
            Ok(checked) => {
                let place = self.place(name.span().start);
                layer.insert(key.path, (checked, place));
            }
            Err(bad) => {
                self.problem(
                    value.span().start,
                    format!("{prefix}{path}"),
                    bad.to_string(),
                );
            }
        }
    }
}

type Name<'a> = Spanned<std::borrow::Cow<'a, str>>;

fn unknown_key(path: &str, section: &str) -> String {
    // The same section first: `vm.memory_mib` means a key of [vm] even when another section has a
    // nearer name.
    let here = KEYS
        .iter()
        .filter(|key| key.section == section)
        .map(|key| key.path);
    let hint = nearest(path, here).unwrap_or_default();
    let leaf = path.rsplit('.').next().unwrap_or(path);
    match KEYS.iter().find(|key| key.name == leaf) {
        Some(elsewhere) => format!("unknown key; did you mean `{}`?", elsewhere.path),
        None => format!("unknown key; the nearest valid key is `{hint}`"),
    }
}

/// A foreign name for a message: as it is when plain, else escaped.
fn shown(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.len() <= 128 && name.chars().all(plain) {
        name.to_owned()
    } else {
        quoted(name)
    }
}

/// Is this a name that a RuntimeClass handler can have.
#[must_use]
pub fn is_flavour_name(name: &str) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    (1..=FLAVOUR_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain)
}

fn checked(key: &Key, value: &DeValue<'_>) -> Result<Value, BadValue> {
    let refuse = |found: String| BadValue {
        found,
        allowed: key.kind.to_string(),
    };
    let converted = match value {
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Integer(number) => {
            Value::Integer(unsigned(number).ok_or_else(|| refuse(number.to_string()))?)
        }
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Array(items) => Value::List(
            items
                .iter()
                .map(|item| match item.get_ref() {
                    DeValue::String(text) => Ok(text.to_string()),
                    other => Err(refuse(format!("a list with {}", article(other)))),
                })
                .collect::<Result<_, _>>()?,
        ),
        other => return Err(refuse(article(other))),
    };
    key.kind.check(converted)
}

fn article(value: &DeValue<'_>) -> String {
    match value {
        DeValue::Integer(_) | DeValue::Array(_) => format!("an {}", value.type_str()),
        _ => format!("a {}", value.type_str()),
    }
}

fn unsigned(number: &DeInteger<'_>) -> Option<u64> {
    u64::from_str_radix(number.as_str().trim_start_matches('+'), number.radix()).ok()
}

#[cfg(test)]
#[path = "raw_tests.rs"]
mod tests;
