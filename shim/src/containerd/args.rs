//! The command line that containerd gives a shim: Go-style single-dash flags and one action.
//!
//! Source: containerd `docs/runtime-v2.md`, "Commands". Flags this shim has no use for are
//! accepted, because newer versions of containerd add some; a flag without its value is an error.

use std::path::PathBuf;

use crate::machine::template_maker;

/// What the process was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a daemon for a sandbox, or answer the address of the one that runs.
    Start,
    /// Remove what a dead daemon left.
    Delete,
    /// Print version and revision.
    Version,
    /// Print `RuntimeInfo`.
    Info,
    /// Serve: the mode that `start` launches.
    Daemon,
    /// Make the template that standard input asks for.
    Template,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    /// What to do.
    pub(crate) action: Action,
    /// `-id`: container or sandbox.
    pub(crate) id: String,
    /// `-namespace`: containerd's.
    pub(crate) namespace: String,
    /// `-address`: containerd's gRPC socket.
    pub(crate) address: String,
    /// `-publish-binary`: path of containerd.
    pub(crate) publish_binary: String,
    /// `-bundle`: the bundle to delete.
    pub(crate) bundle: Option<PathBuf>,
    /// `-debug`.
    pub(crate) debug: bool,
    /// `-config`: another configuration file, from the handler's options (`daemon` alone).
    pub(crate) config: Option<PathBuf>,
    /// `-flavour`: from the handler's options (`daemon` alone).
    pub(crate) flavour: Option<String>,
}

/// What is wrong with a command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgsError {
    #[error("flag -{0} has no value")]
    NoValue(String),
    #[error("no action: expected one of start, delete, -v, -info")]
    NoAction,
    #[error("unknown action {0:?}: expected start or delete")]
    UnknownAction(String),
    #[error("-{0} is required for this action")]
    Missing(&'static str),
}

impl Args {
    /// Parses what follows the program's name.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut args = Self::empty();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                return args.with_action(&word);
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => args.debug = inline.is_none_or(|value| value != "false"),
                "v" | "info" => return args.with_action(name),
                _ => {
                    let value = inline.or_else(|| words.next());
                    args.set(
                        name,
                        value.ok_or_else(|| ArgsError::NoValue(name.to_owned()))?,
                    );
                }
            }
        }
        Err(ArgsError::NoAction)
    }

    fn empty() -> Self {
        Self {
            action: Action::Start,
            id: String::new(),
            namespace: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            bundle: None,
            debug: false,
            config: None,
            flavour: None,
        }
    }

    fn set(&mut self, name: &str, value: String) {
        match name {
            "id" => self.id = value,
            "namespace" => self.namespace = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "bundle" => self.bundle = Some(value.into()),
            "config" => self.config = Some(value.into()),
            "flavour" => self.flavour = Some(value),
            _ => {}
        }
    }

    fn with_action(mut self, word: &str) -> Result<Self, ArgsError> {
        self.action = match word {
            "start" => Action::Start,
            "delete" => Action::Delete,
            "daemon" => Action::Daemon,
            template_maker::ACTION => Action::Template,
            "v" => Action::Version,
            "info" => Action::Info,
            other => return Err(ArgsError::UnknownAction(other.to_owned())),
        };
        if matches!(
            self.action,
            Action::Version | Action::Info | Action::Template
        ) {
            return Ok(self);
        }
        if self.id.is_empty() {
            return Err(ArgsError::Missing("id"));
        }
        if self.namespace.is_empty() {
            return Err(ArgsError::Missing("namespace"));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn start_as_containerd_calls_it() {
        let args =
            parse("-namespace k8s.io -address /a.sock -publish-binary /c -id x -debug start")
                .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!((args.id.as_str(), args.namespace.as_str()), ("x", "k8s.io"));
        assert_eq!(args.publish_binary, "/c");
        assert!(args.debug);
    }

    #[test]
    fn delete_with_bundle_and_unknown_flag() {
        let args = parse("-namespace=n -id=x -socket-dir /s -bundle /b delete").unwrap();
        assert_eq!(args.action, Action::Delete);
        assert_eq!(args.bundle, Some("/b".into()));
    }

    #[test]
    fn version_and_info_need_nothing_else() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("template").unwrap().action, Action::Template);
    }

    #[test]
    fn refuses() {
        assert_eq!(parse(""), Err(ArgsError::NoAction));
        assert_eq!(
            parse("-id x -namespace n stop"),
            Err(ArgsError::UnknownAction("stop".into()))
        );
        assert_eq!(parse("-namespace n start"), Err(ArgsError::Missing("id")));
        assert_eq!(parse("-id x start"), Err(ArgsError::Missing("namespace")));
        assert_eq!(parse("-id"), Err(ArgsError::NoValue("id".into())));
    }
}
