//! `probe`: runs in containers of the test node and prints its findings as one line of JSON.
//!
//! Tests run it under two handlers and compare the lines. It is linked statically
//! ([`pericarp_tests::node::probe`]) so that it runs in every image. A shell would merge duplicate
//! variables and change signals.

mod devices;
mod inherits;
mod peer;
mod threads;
mod unique;
mod volumes;
mod walk;

use anyhow::{Result, bail};
use nix::errno::Errno;
use serde_json::Value;

#[expect(clippy::print_stdout, reason = "the line is the program's purpose")]
fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    println!("{}", found(&words)?);
    Ok(())
}

fn found(words: &[&str]) -> Result<Value> {
    match words {
        ["inherits", process] => inherits::look(process),
        ["devices"] => devices::look(),
        ["unique"] => unique::look(),
        ["tun"] => devices::tun(),
        ["threads", count] => Ok(threads::make(count.parse()?)),
        ["walk", root] => walk::as_nobody(root),
        ["serve", port] => peer::serve(port.parse()?),
        ["volumes", writer, reader] => volumes::compare(writer.parse()?, reader.parse()?),
        _ => bail!("unknown arguments {words:?}: see tests/src/bin/probe/main.rs"),
    }
}

/// `ok`, or the name of the error number.
fn outcome<T>(result: std::io::Result<T>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => name(&error),
    }
}

/// The name of an error's number, such as `EACCES`.
fn name(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", Errno::from_raw(number)),
        None => error.to_string(),
    }
}
