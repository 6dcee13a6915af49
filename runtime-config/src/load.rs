//! Reads the file and its drop-ins. The only module that touches the file system.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::problem::Problem;
use crate::raw::{self, Layer};

/// The file that is read when no other is named; it may be absent.
pub const DEFAULT_FILE: &str = "/etc/pericarp/config.toml";
/// Drop-ins stand in this directory beside the file.
pub const DROP_IN_DIRECTORY: &str = "config.d";
/// Largest file in bytes: the example with every key is a tenth of it.
pub const FILE_BYTES_MAX: u64 = 256 << 10;
/// Most drop-ins.
pub const DROP_INS_MAX: usize = 256;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file or directory cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is larger than any sensible configuration.
    #[error("the configuration {} is larger than {FILE_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// Which one.
        path: PathBuf,
    },
    /// More drop-ins than any sensible configuration has.
    #[error("more than {DROP_INS_MAX} drop-ins in {}", path.display())]
    TooManyDropIns {
        /// Their directory.
        path: PathBuf,
    },
    /// The text is wrong.
    #[error("{}", list(problems))]
    Invalid {
        /// What to change.
        problems: Vec<Problem>,
    },
}

fn list(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(Problem::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

impl Config {
    /// Reads `path`, or the default file if it exists, and the drop-ins beside it in the order of
    /// their names.
    pub fn load(path: Option<&Path>, drop_ins: bool) -> Result<Self, LoadError> {
        let file = path.unwrap_or(Path::new(DEFAULT_FILE));
        let mut texts = Vec::new();
        match read(file) {
            Ok(text) => texts.push((file.to_owned(), text)),
            Err(LoadError::Read { source, .. })
                if path.is_none() && source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if drop_ins && let Some(parent) = file.parent() {
            for path in drop_in_files(&parent.join(DROP_IN_DIRECTORY))? {
                let text = read(&path)?;
                texts.push((path, text));
            }
        }
        Self::from_texts(
            texts
                .iter()
                .map(|(file, text)| (file.as_path(), text.as_str())),
        )
    }

    /// Puts files' texts together, the later over the earlier. Pure.
    pub fn from_texts<'a>(
        texts: impl IntoIterator<Item = (&'a Path, &'a str)>,
    ) -> Result<Self, LoadError> {
        let mut base = Layer::new();
        let mut flavours: BTreeMap<String, Layer> = BTreeMap::new();
        let mut problems = Vec::new();
        for (file, text) in texts {
            let parsed = raw::parse(file, text);
            base.extend(parsed.base);
            for (name, layer) in parsed.flavours {
                flavours.entry(name).or_default().extend(layer);
            }
            problems.extend(parsed.problems);
        }
        match Self::build(base, flavours) {
            Ok(config) if problems.is_empty() => Ok(config),
            Ok(_) => Err(LoadError::Invalid { problems }),
            Err(contradictions) => {
                problems.extend(contradictions);
                Err(LoadError::Invalid { problems })
            }
        }
    }
}

fn read(path: &Path) -> Result<String, LoadError> {
    let failed = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// The drop-ins of a directory in the order in which they are laid over each other; none when it is
/// absent.
pub fn drop_in_files(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Read {
        path: directory.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        // Editors leave hidden files and backups; only `name.toml` counts.
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        if files.len() == DROP_INS_MAX {
            return Err(LoadError::TooManyDropIns {
                path: directory.to_owned(),
            });
        }
        files.push(path);
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
