//! containerd's configuration, as far as a runtime handler of ours goes. Pure.
//!
//! Version 2 (containerd 1.x) keeps handlers under the plugin `io.containerd.grpc.v1.cri`, versions
//! 3 and 4 (containerd 2.x) under `io.containerd.cri.v1.runtime` (containerd, docs/cri/config.md).

use toml::{Table, Value};

/// The runtime type that makes containerd run our shim.
pub(super) const RUNTIME_TYPE: &str = "io.containerd.pericarp.v2";

/// Plugins that have runtime handlers.
const HANDLER_PLUGINS: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];
const DEFAULT_SOCKET: &str = "/run/containerd/containerd.sock";

/// What concerns us.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ContainerdConfig {
    /// The layout's version; that of the main file, since imports may not be above it.
    pub(super) version: Option<i64>,
    /// The socket that clients dial.
    pub(super) socket: String,
    /// Handlers whose runtime type is ours.
    pub(super) handlers: Vec<Handler>,
    /// Names of all handlers.
    pub(super) all_handlers: Vec<String>,
}

/// One runtime handler.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Handler {
    pub(super) name: String,
    /// Path of the shim, when it is named.
    pub(super) runtime_path: Option<String>,
    pub(super) pod_annotations: Vec<String>,
    pub(super) privileged_without_host_devices: bool,
    /// The options table as text, for `RuntimeOptions::parse`.
    pub(super) options: String,
}

impl Handler {
    /// Do our annotations reach the shim? Patterns are Go's `path.Match`, where `*` stops at a
    /// slash.
    pub(super) fn passes_annotations(&self) -> bool {
        let pattern = |pattern: &String| {
            ["pericarp.dev/*", "*/*", "pericarp.*/*"].contains(&pattern.as_str())
        };
        self.pod_annotations.iter().any(pattern)
    }
}

/// Reads a configuration file, or the output of `containerd config dump`.
pub(super) fn parse(text: &str) -> Result<ContainerdConfig, String> {
    let root: Table = text
        .parse()
        .map_err(|error: toml::de::Error| error.message().to_owned())?;
    let mut config = ContainerdConfig {
        version: root.get("version").and_then(Value::as_integer),
        socket: socket(&root),
        handlers: Vec::new(),
        all_handlers: Vec::new(),
    };
    for plugin in HANDLER_PLUGINS {
        let path = ["plugins", plugin, "containerd", "runtimes"];
        let Some(runtimes) = at(&root, &path).and_then(Value::as_table) else {
            continue;
        };
        for (name, runtime) in runtimes {
            config.all_handlers.push(name.clone());
            if at_value(runtime, "runtime_type").and_then(Value::as_str) == Some(RUNTIME_TYPE) {
                config.handlers.push(handler(name, runtime));
            }
        }
    }
    Ok(config)
}

fn handler(name: &str, runtime: &Value) -> Handler {
    let text = |key| {
        at_value(runtime, key)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    };
    let list = at_value(runtime, "pod_annotations").and_then(Value::as_array);
    let options = at_value(runtime, "options").and_then(Value::as_table);
    Handler {
        name: name.to_owned(),
        runtime_path: text("runtime_path").map(str::to_owned),
        pod_annotations: list
            .into_iter()
            .flatten()
            .filter_map(|value| value.as_str().map(str::to_owned))
            .collect(),
        privileged_without_host_devices: at_value(runtime, "privileged_without_host_devices")
            .and_then(Value::as_bool)
            .unwrap_or(false),
        options: options.map(ToString::to_string).unwrap_or_default(),
    }
}

fn socket(root: &Table) -> String {
    let places: [&[&str]; 2] = [
        &["plugins", "io.containerd.server.v1.grpc", "address"],
        &["grpc", "address"],
    ];
    places
        .iter()
        .find_map(|path| {
            at(root, path)
                .and_then(Value::as_str)
                .filter(|text| !text.is_empty())
        })
        .unwrap_or(DEFAULT_SOCKET)
        .to_owned()
}

fn at_value<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.as_table()?.get(key)
}

fn at<'a>(root: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter()
        .try_fold(root.get(*first)?, |value, key| at_value(value, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "
        version = 2
        [grpc]
        address = '/run/k3s/containerd.sock'
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]
        runtime_type = 'io.containerd.runc.v2'
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.pericarp]
        runtime_type = 'io.containerd.pericarp.v2'
        pod_annotations = ['pericarp.dev/*']
        privileged_without_host_devices = true
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.pericarp.options]
        Flavour = 'gpu'
    ";

    #[test]
    fn both_layouts_are_read() {
        let config = parse(V2).unwrap();
        assert_eq!(config.socket, "/run/k3s/containerd.sock");
        assert_eq!(config.all_handlers, ["pericarp", "runc"]);
        let handler = &config.handlers[0];
        assert_eq!(
            (handler.name.as_str(), handler.runtime_path.as_deref()),
            ("pericarp", None)
        );
        assert!(handler.passes_annotations() && handler.privileged_without_host_devices);
        assert_eq!(handler.options.trim(), "Flavour = \"gpu\"");
        let v3 = V2
            .replace("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime")
            .replace("version = 2", "version = 3")
            .replace("[grpc]", "[plugins.'io.containerd.server.v1.grpc']");
        let newer = parse(&v3).unwrap();
        assert_eq!((config.version, newer.version), (Some(2), Some(3)));
        assert_eq!(
            ContainerdConfig {
                version: Some(2),
                ..newer
            },
            config
        );
    }

    #[test]
    fn the_drop_ins_that_we_ship_are_right() {
        for text in [
            include_str!("../../../deploy/containerd/pericarp.toml"),
            include_str!("../../../deploy/containerd/pericarp-1.7.toml"),
        ] {
            let config = parse(text).unwrap();
            let [handler] = config.handlers.as_slice() else {
                panic!("{config:?}")
            };
            assert_eq!(handler.name, "pericarp");
            assert!(handler.passes_annotations() && handler.privileged_without_host_devices);
        }
    }

    #[test]
    fn other_texts_are_no_handlers_and_no_panic() {
        assert_eq!(parse("").unwrap().handlers, []);
        assert_eq!(parse("").unwrap().socket, DEFAULT_SOCKET);
        assert_eq!(parse("plugins = 3").unwrap().handlers, []);
        assert!(parse("plugins = ").is_err());
        let handler = |annotations: &str| {
            let text = V2.replace("['pericarp.dev/*']", annotations);
            parse(&text).unwrap().handlers[0].passes_annotations()
        };
        assert!(!handler("[]") && !handler("['*']") && !handler("3"));
        assert!(handler("['a', '*/*']"));
    }
}
