//! `-v` and `-info`.

use std::io::{self, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

/// Prints the version for people.
pub(crate) fn version() -> io::Result<()> {
    writeln!(
        io::stdout(),
        "containerd-shim-pericarp-v2 {}",
        env!("CARGO_PKG_VERSION")
    )
}

/// Prints `RuntimeInfo` for containerd.
pub(crate) fn runtime_info() -> io::Result<()> {
    let info = RuntimeInfo {
        name: "io.containerd.pericarp.v2".to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let bytes = info.write_to_bytes().map_err(io::Error::other)?;
    io::stdout().write_all(&bytes)
}
