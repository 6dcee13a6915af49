//! What a value may be: types, ranges and units, and their two spellings (TOML and annotation
//! text).

use std::fmt;
use std::path::{Path, PathBuf};

use crate::choice::{CpuModel, HugePages, LogLevel, TemplateUse, VirtiofsCache};
use crate::keys;
use crate::pci::{DeviceResource, PciAddress, PciSelector};

/// Longest text of one value in bytes, a path included (Linux's PATH_MAX).
pub const TEXT_BYTES_MAX: usize = 4096;
/// Longest part of a refused value that an error repeats, in characters.
const QUOTED_CHARS_MAX: usize = 64;

/// The type and the range of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number from `min` to `max`.
    Integer {
        /// Unit for people, such as "MiB"; empty for a plain count.
        unit: &'static str,
        /// Smallest value.
        min: u64,
        /// Largest value.
        max: u64,
    },
    /// One word of the list.
    Choice(&'static [&'static str]),
    /// An absolute path without `..`.
    Path,
    /// An absolute path without `..`, or nothing.
    OptionalPath,
    /// Printable ASCII.
    Text {
        /// Longest text in bytes.
        bytes_max: usize,
    },
    /// Several values.
    List {
        /// What each of them is.
        item: Item,
        /// Most values.
        items_max: usize,
    },
}

/// What a list holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// `+name` or `-name` of a CPU feature.
    CpuFeature,
    /// A PCI address or a vendor and device id.
    PciDevice,
    /// A PCI address.
    PciAddress,
    /// Functions that the device plugin offers under a name.
    DeviceResource,
    /// A key that a pod may override.
    Overridable,
}

/// A value that its [`Kind`] accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of [`Kind::Integer`].
    Integer(u64),
    /// Of [`Kind::Choice`], [`Kind::Path`], [`Kind::OptionalPath`] and [`Kind::Text`].
    Text(String),
    /// Of [`Kind::List`].
    List(Vec<String>),
}

/// Why a value was refused; the message names what was found and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found {found}; allowed: {allowed}")]
pub struct BadValue {
    /// The refused value, quoted and cut.
    pub found: String,
    /// What the setting takes.
    pub allowed: String,
}

/// A refused value for an error message: control characters escaped, length bounded.
#[must_use]
pub fn quoted(text: &str) -> String {
    let head: String = text.chars().take(QUOTED_CHARS_MAX).collect();
    let more = if head.len() < text.len() { "..." } else { "" };
    format!("{head:?}{more}")
}

impl Kind {
    fn refuse(self, found: impl Into<String>) -> BadValue {
        BadValue {
            found: found.into(),
            allowed: self.to_string(),
        }
    }

    /// Reads the spelling of annotations and of the table's defaults: lists are separated by
    /// commas.
    pub fn parse_text(self, text: &str) -> Result<Value, BadValue> {
        match self {
            Self::Bool => match text {
                "true" => Ok(Value::Bool(true)),
                "false" => Ok(Value::Bool(false)),
                _ => Err(self.refuse(quoted(text))),
            },
            // `u64::from_str` would take a leading plus sign.
            Self::Integer { .. } if !text.bytes().all(|b| b.is_ascii_digit()) => {
                Err(self.refuse(quoted(text)))
            }
            Self::Integer { .. } => match text.parse() {
                Ok(number) => self.check(Value::Integer(number)),
                Err(_) => Err(self.refuse(quoted(text))),
            },
            Self::List { .. } if text.trim().is_empty() => Ok(Value::List(Vec::new())),
            Self::List { .. } if text.len() > TEXT_BYTES_MAX => Err(self.refuse(quoted(text))),
            Self::List { .. } => self.check(Value::List(
                text.split(',').map(|item| item.trim().to_owned()).collect(),
            )),
            Self::Choice(_) | Self::Path | Self::OptionalPath | Self::Text { .. } => {
                self.check(Value::Text(text.to_owned()))
            }
        }
    }

    /// Accepts a value of the right type only when it is in range.
    pub(crate) fn check(self, value: Value) -> Result<Value, BadValue> {
        let bad = match (self, &value) {
            (Self::Bool, Value::Bool(_)) => None,
            (Self::Integer { min, max, .. }, Value::Integer(number)) => {
                (!(min..=max).contains(number)).then(|| number.to_string())
            }
            (Self::Choice(words), Value::Text(text)) => {
                (!words.contains(&text.as_str())).then(|| quoted(text))
            }
            (Self::OptionalPath, Value::Text(text)) if text.is_empty() => None,
            (Self::Path | Self::OptionalPath, Value::Text(text)) => {
                (!is_plain_absolute(text)).then(|| quoted(text))
            }
            (Self::Text { bytes_max }, Value::Text(text)) => {
                (text.len() > bytes_max || !is_printable(text)).then(|| quoted(text))
            }
            (Self::List { item, items_max }, Value::List(items)) => {
                return check_list(self, item, items_max, items).map(|()| value);
            }
            (_, Value::Bool(found)) => Some(found.to_string()),
            (_, Value::Integer(found)) => Some(found.to_string()),
            (_, Value::Text(found)) => Some(quoted(found)),
            (_, Value::List(_)) => Some("a list".to_owned()),
        };
        match bad {
            None => Ok(value),
            Some(found) => Err(self.refuse(found)),
        }
    }
}

fn check_list(kind: Kind, item: Item, items_max: usize, items: &[String]) -> Result<(), BadValue> {
    if items.len() > items_max {
        return Err(kind.refuse(format!("{} values", items.len())));
    }
    for text in items {
        let good = match item {
            Item::CpuFeature => CpuFeature::parse(text).is_some(),
            Item::PciDevice => PciSelector::parse(text).is_some(),
            Item::PciAddress => PciAddress::parse(text).is_some(),
            Item::DeviceResource => DeviceResource::parse(text).is_some(),
            Item::Overridable => keys::key(text).is_some_and(|key| key.pod_may_override),
        };
        if !good {
            let mut bad = kind.refuse(quoted(text));
            if item == Item::Overridable {
                bad.allowed = keys::explain_overridable(text);
            }
            return Err(bad);
        }
    }
    Ok(())
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

fn is_plain_absolute(text: &str) -> bool {
    let path = Path::new(text);
    text.len() <= TEXT_BYTES_MAX
        && !text.contains('\0')
        && path.is_absolute()
        && !path
            .components()
            .any(|part| part == std::path::Component::ParentDir)
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool => f.write_str("true or false"),
            Self::Integer { unit, min, max } => {
                write!(
                    f,
                    "{min} to {max}{}{unit}",
                    if unit.is_empty() { "" } else { " " }
                )
            }
            Self::Choice(words) => {
                let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
                write!(f, "one of {}", quoted.join(", "))
            }
            Self::Path => f.write_str("an absolute path without `..`"),
            Self::OptionalPath => f.write_str("an absolute path without `..`, or \"\" for none"),
            Self::Text { bytes_max } => {
                write!(f, "printable ASCII text of at most {bytes_max} bytes")
            }
            Self::List { item, items_max } => write!(f, "a list of at most {items_max} {item}"),
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuFeature => "CPU features, each \"+name\" or \"-name\"",
            Self::PciDevice => {
                "PCI devices, each \"0000:3b:00.0\" (address) or \"10de:2331\" (vendor:device)"
            }
            Self::PciAddress => "PCI addresses, each \"0000:3b:00.0\"",
            Self::DeviceResource => {
                "resources, each \"gpu=class:03\" (class), \"gpu=vendor:10de\" (vendor), \
                 \"gpu=10de:2331\" (vendor:device) or \"gpu=0000:3b:00.0\" (address)"
            }
            Self::Overridable => "keys that a pod may override",
        })
    }
}

impl fmt::Display for Value {
    /// The spelling of TOML.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Text(value) => write!(f, "{value:?}"),
            Self::List(values) => write!(f, "{values:?}"),
        }
    }
}

/// A CPU feature that the guest is given or denied against the model's choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeature {
    /// Name as in `/proc/cpuinfo`.
    pub name: String,
    /// `+`: shown to the guest; `-`: hidden from it.
    pub shown: bool,
}

/// Longest name of a CPU feature in bytes; Linux's longest is 20.
const CPU_FEATURE_BYTES_MAX: usize = 32;

impl CpuFeature {
    /// Reads `+name` or `-name`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (shown, name) = match text.split_at_checked(1)? {
            ("+", name) => (true, name),
            ("-", name) => (false, name),
            _ => return None,
        };
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        (!name.is_empty() && name.len() <= CPU_FEATURE_BYTES_MAX && name.bytes().all(good)).then(
            || Self {
                name: name.to_owned(),
                shown,
            },
        )
    }
}

/// A type that a field of [`keys::Settings`] can have.
pub(crate) trait Setting: Sized {
    /// The field's value of a checked [`Value`]; `None` when the table pairs a kind with another
    /// kind's type.
    fn of(value: &Value) -> Option<Self>;
}

macro_rules! setting {
    ($type:ty, $pattern:pat => $result:expr) => {
        impl Setting for $type {
            fn of(value: &Value) -> Option<Self> {
                match value {
                    $pattern => $result,
                    _ => None,
                }
            }
        }
    };
}

setting!(bool, Value::Bool(value) => Some(*value));
setting!(u32, Value::Integer(value) => u32::try_from(*value).ok());
setting!(u64, Value::Integer(value) => Some(*value));
setting!(String, Value::Text(value) => Some(value.clone()));
setting!(PathBuf, Value::Text(value) => Some(PathBuf::from(value)));
setting!(Option<PathBuf>, Value::Text(value) => {
    Some((!value.is_empty()).then(|| PathBuf::from(value)))
});
setting!(CpuModel, Value::Text(value) => Self::from_word(value));
setting!(HugePages, Value::Text(value) => Self::from_word(value));
setting!(LogLevel, Value::Text(value) => Self::from_word(value));
setting!(VirtiofsCache, Value::Text(value) => Self::from_word(value));
setting!(TemplateUse, Value::Text(value) => Self::from_word(value));
setting!(Vec<String>, Value::List(values) => Some(values.clone()));
setting!(Vec<CpuFeature>, Value::List(values) => {
    values.iter().map(|text| CpuFeature::parse(text)).collect()
});
setting!(Vec<PciSelector>, Value::List(values) => {
    values.iter().map(|text| PciSelector::parse(text)).collect()
});
setting!(Vec<PciAddress>, Value::List(values) => {
    values.iter().map(|text| PciAddress::parse(text)).collect()
});
setting!(Vec<DeviceResource>, Value::List(values) => {
    values.iter().map(|text| DeviceResource::parse(text)).collect()
});
