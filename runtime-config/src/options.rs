//! The options of containerd's runtime handler, which the shim gets as text.
//!
//! containerd hands a shim of another maker than its own a `runtimeoptions.v1.Options` with the
//! handler's `ConfigPath`, or, when that is empty, the handler's whole `options` table as TOML in
//! `config_body` (containerd 2.3, `internal/cri/config/config.go`, `GenerateRuntimeOptions`).

use std::path::PathBuf;

use toml::de::{DeTable, DeValue};

use crate::kind::quoted;
use crate::raw::is_flavour_name;

/// Which configuration a runtime handler uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// `ConfigPath`: another file than the default.
    pub config_path: Option<PathBuf>,
    /// `Flavour`: the `[flavour.<name>]` tables to lay over it.
    pub flavour: Option<String>,
}

/// What is wrong with the options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The text is not TOML.
    #[error("the options of containerd's runtime handler are not TOML: {0}")]
    NotToml(String),
    /// A name that is none of ours.
    #[error("unknown option {0} of containerd's runtime handler; valid: ConfigPath, Flavour")]
    Unknown(String),
    /// A value that the option does not take.
    #[error("option {name} of containerd's runtime handler: {allowed}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// What it takes.
        allowed: &'static str,
    },
}

impl RuntimeOptions {
    /// Reads `config_body`. Names are compared without case, as containerd does.
    pub fn parse(body: &str) -> Result<Self, OptionsError> {
        let table =
            DeTable::parse(body).map_err(|e| OptionsError::NotToml(e.message().to_owned()))?;
        let mut options = Self::default();
        for (name, value) in table.get_ref() {
            let text = value.get_ref().as_str().unwrap_or_default();
            match name.get_ref().to_ascii_lowercase().as_str() {
                "configpath" | "config_path" if text.starts_with('/') => {
                    options.config_path = Some(PathBuf::from(text));
                }
                // containerd writes fields of its own type with their zero values.
                "configpath" | "config_path" if is_empty(value.get_ref()) => {}
                "configpath" | "config_path" => {
                    let allowed = "an absolute path";
                    return Err(OptionsError::BadValue {
                        name: "ConfigPath",
                        allowed,
                    });
                }
                "flavour" if is_flavour_name(text) => options.flavour = Some(text.to_owned()),
                "flavour" => {
                    let allowed = "the name of a [flavour.<name>] table";
                    return Err(OptionsError::BadValue {
                        name: "Flavour",
                        allowed,
                    });
                }
                "typeurl" | "type_url" | "configbody" | "config_body" => {}
                _ => return Err(OptionsError::Unknown(quoted(name.get_ref()))),
            }
        }
        Ok(options)
    }
}

fn is_empty(value: &DeValue<'_>) -> bool {
    value.as_str() == Some("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_or_refused() {
        let read = |body: &str| RuntimeOptions::parse(body).map_err(|error| error.to_string());
        assert_eq!(read("").unwrap(), RuntimeOptions::default());
        let gpu = read("Flavour = \"gpu\"\nConfigPath = \"\"\n").unwrap();
        assert_eq!(
            (gpu.flavour.as_deref(), gpu.config_path),
            (Some("gpu"), None)
        );
        let other = read("ConfigPath = '/etc/pericarp/b.toml'").unwrap();
        assert_eq!(
            other.config_path.unwrap().to_str(),
            Some("/etc/pericarp/b.toml")
        );
        assert!(read("Flavor = 'gpu'").unwrap_err().contains("\"Flavor\""));
        assert!(read("Flavour = 3").unwrap_err().contains("Flavour"));
        assert!(read("ConfigPath = 'x'").unwrap_err().contains("absolute"));
        assert!(read("=").unwrap_err().contains("not TOML"));
    }
}
