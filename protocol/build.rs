//! Generates the guest protocol and containerd's pod options from their `.proto` files with a
//! parser written in Rust: no protoc is needed on the machine.

use std::{env, error::Error, fs, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=guest.proto");
    println!("cargo::rerun-if-changed=cri.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["guest.proto", "cri.proto"])
        .include(".")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default())
        .run()?;
    // Inner attributes are refused in an included file.
    for name in ["guest.rs", "guest_ttrpc.rs", "cri.rs"] {
        let path = out.join(name);
        let text = fs::read_to_string(&path)?;
        let kept: String = text
            .lines()
            .filter(|line| !line.starts_with("#!["))
            .map(|line| match line.strip_prefix("//!") {
                Some(text) => format!("//{text}\n"),
                None => format!("{line}\n"),
            })
            .collect();
        fs::write(&path, kept)?;
    }
    Ok(())
}
