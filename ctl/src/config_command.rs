//! `pericarp config`: the configuration as a shim reads it.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use pericarp_runtime_config::reference::{example, reference};
use pericarp_runtime_config::{Config, KEYS, LoadError};

use crate::cli::{ConfigArguments, ConfigCommand};

pub(crate) fn run(arguments: &ConfigArguments, out: &mut impl Write) -> Result<ExitCode> {
    match &arguments.command {
        ConfigCommand::Reference => out.write_all(reference().as_bytes())?,
        ConfigCommand::Example => out.write_all(example().as_bytes())?,
        ConfigCommand::Check {
            config,
            show,
            flavour,
        } => {
            return check(config.as_deref(), *show, flavour.as_deref(), out);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check(
    file: Option<&Path>,
    show: bool,
    flavour: Option<&str>,
    out: &mut impl Write,
) -> Result<ExitCode> {
    let mut config = match Config::load(file, true) {
        Ok(config) => config,
        // One line each, `file:line:column: ...`, as editors understand it.
        Err(error @ LoadError::Invalid { .. }) => {
            writeln!(out, "{error}")?;
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(name) = flavour {
        config = config.with_flavour(name)?;
    }
    if !show {
        writeln!(out, "the configuration is right")?;
        return Ok(ExitCode::SUCCESS);
    }
    for key in KEYS {
        let Some((value, place)) = config.value(key.path) else {
            continue;
        };
        let origin = place.map_or("default".to_owned(), ToString::to_string);
        writeln!(out, "{} = {value}  # {origin}", key.path)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_with_their_origin() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        std::fs::write(
            &file,
            "[vm]\ndefault_vcpus = 3\n[flavour.x.log]\nlevel = 'warn'\n",
        )
        .unwrap();
        let mut out = Vec::new();
        check(Some(&file), true, Some("x"), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains(&format!("vm.default_vcpus = 3  # {}:2:1\n", file.display())),
            "{text}"
        );
        assert!(text.contains("log.level = \"warn\"  # "), "{text}");
        assert!(
            text.contains("log.guest_kernel = true  # default\n"),
            "{text}"
        );
        assert_eq!(text.lines().count(), KEYS.len());
        assert!(check(Some(&file), true, Some("y"), &mut Vec::new()).is_err());
        std::fs::write(&file, "vcpus = 3").unwrap();
        let mut out = Vec::new();
        assert_eq!(
            check(Some(&file), false, None, &mut out).unwrap(),
            ExitCode::FAILURE
        );
        let start = format!("{}:1:1: `vcpus`: unknown key", file.display());
        assert!(
            out.starts_with(start.as_bytes()),
            "{}",
            String::from_utf8_lossy(&out)
        );
    }
}
