//! Checks of volumes that two containers share.
//!
//! A writer and a reader ([`super::peer`]) run in a container each. This process sends them
//! requests in turn over TCP, so the reader only looks after the writer is done, and anything old
//! that it sees is stale.
//!
//! The containers have these mounts:
//!
//! | volume | writer | reader |
//! |---|---|---|
//! | shared, on a disk | `/disk` | `/disk` |
//! | shared, in memory | `/memory` | `/memory` |
//! | seen read-only | `/whole` | `/read-only` |
//! | with parts | `/parts` | `/folder` (its `folder`), `/file` (its `folder/file`) |

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

/// How long a peer may take to listen.
const LISTEN_WAIT: Duration = Duration::from_secs(60);

/// Number of rounds of changes.
const ROUNDS: usize = 10;

/// Connection to the writer or the reader.
struct Side {
    answers: BufReader<TcpStream>,
}

impl Side {
    fn reach(port: u16) -> Result<Self> {
        let deadline = Instant::now() + LISTEN_WAIT;
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Self {
                        answers: BufReader::new(stream),
                    });
                }
                Err(error) if Instant::now() > deadline => {
                    bail!("nobody listens at port {port}: {error}")
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Sends a request and returns the answer.
    fn asks(&mut self, request: &str) -> Result<String> {
        writeln!(self.answers.get_mut(), "{request}")?;
        let mut answer = String::new();
        let read = self.answers.read_line(&mut answer)?;
        if read == 0 {
            bail!("the peer ended at {request:?}");
        }
        Ok(answer.trim_end_matches('\n').to_owned())
    }

    /// Sends a request that must succeed.
    fn must(&mut self, request: &str) -> Result<()> {
        let answer = self.asks(request)?;
        if answer != "ok" {
            bail!("{request}: {answer}");
        }
        Ok(())
    }
}

/// Runs all checks. The findings are named by mount.
pub(crate) fn compare(writer: u16, reader: u16) -> Result<Value> {
    let mut writer = Side::reach(writer)?;
    let mut reader = Side::reach(reader)?;
    let mut found = Map::new();
    for folder in ["/disk", "/memory"] {
        let about = shared(&mut writer, &mut reader, folder);
        let about = about.with_context(|| format!("in {folder}"))?;
        found.insert(folder.to_owned(), about);
    }
    let read_only = read_only(&mut writer, &mut reader).context("in /read-only")?;
    found.insert("/read-only".to_owned(), read_only);
    let parts = parts(&mut writer, &mut reader).context("in /folder and /file")?;
    found.insert("parts".to_owned(), parts);
    Ok(Value::Object(found))
}

/// Checks a folder that both can write to.
fn shared(writer: &mut Side, reader: &mut Side, folder: &str) -> Result<Value> {
    Ok(json!({
        "sockets": sockets(writer, reader, folder)?,
        "locks": locks(writer, reader, folder)?,
        "mapping": mapping(writer, reader, folder)?,
        "events": events(writer, reader, folder, folder)?,
        "stale": stale(writer, reader, folder, folder)?,
    }))
}

/// Connects each to a socket of the other.
fn sockets(writer: &mut Side, reader: &mut Side, folder: &str) -> Result<Value> {
    writer.must(&format!("bind {folder}/of-writer"))?;
    reader.must(&format!("bind {folder}/of-reader"))?;
    Ok(json!([
        reader.asks(&format!("connect {folder}/of-writer"))?,
        writer.asks(&format!("connect {folder}/of-reader"))?,
    ]))
}

/// Takes locks as the reader while the writer holds them, and after.
fn locks(writer: &mut Side, reader: &mut Side, folder: &str) -> Result<Value> {
    let mut found = Map::new();
    for kind in ["flock", "record-lock"] {
        let file = format!("{folder}/{kind}");
        writer.must(&format!("write {file} locked"))?;
        writer.must(&format!("{kind} {file}"))?;
        let held = reader.asks(&format!("{kind} {file}"))?;
        writer.must("unlock")?;
        let free = reader.asks(&format!("{kind} {file}"))?;
        reader.must("unlock")?;
        found.insert(kind.to_owned(), json!([held, free]));
    }
    Ok(Value::Object(found))
}

/// Stores a word in a shared mapping, by each in turn, and loads it as the other.
fn mapping(writer: &mut Side, reader: &mut Side, folder: &str) -> Result<Value> {
    let file = format!("{folder}/mapped");
    writer.must(&format!("zeros {file}"))?;
    for side in [&mut *writer, &mut *reader] {
        let answer = side.asks(&format!("map {file}"))?;
        if answer != "ok" {
            return Ok(json!(answer));
        }
    }
    writer.asks("store 7")?;
    let by_reader = reader.asks("load")?;
    reader.asks("store 9")?;
    Ok(json!([by_reader, writer.asks("load")?]))
}

/// Collects inotify events of the reader's view while the writer changes its own.
fn events(writer: &mut Side, reader: &mut Side, of_writer: &str, of_reader: &str) -> Result<Value> {
    let watched = reader.asks(&format!("watch {of_reader}"))?;
    if watched != "ok" {
        return Ok(json!(watched));
    }
    // Equal events in a row are merged when nobody reads in between (inotify(7)).
    writer.must(&format!("write {of_writer}/event one"))?;
    writer.must(&format!("append {of_writer}/event two"))?;
    writer.must(&format!("rename {of_writer}/event {of_writer}/renamed"))?;
    writer.must(&format!("remove {of_writer}/renamed"))?;
    Ok(json!(reader.asks("events 5")?))
}

/// Number of stale answers of the reader, by kind of change.
fn stale(writer: &mut Side, reader: &mut Side, of_writer: &str, of_reader: &str) -> Result<Value> {
    let [mut made, mut replaced, mut grown, mut listed, mut removed] = [0; 5];
    let count = |kind: &mut usize, saw: &str, is: &str| *kind += usize::from(saw != is);
    for round in 0..ROUNDS {
        let name = format!("file-{}", round % 2);
        let (mine, yours) = (format!("{of_writer}/{name}"), format!("{of_reader}/{name}"));
        // The absence of a file can be cached too.
        count(
            &mut removed,
            &reader.asks(&format!("size {yours}"))?,
            "ENOENT",
        );
        writer.must(&format!("write {mine} first-{round}"))?;
        let text = format!("first-{round}");
        count(&mut made, &reader.asks(&format!("read {yours}"))?, &text);
        writer.must(&format!("replace {mine} second-one-{round}"))?;
        let mut text = format!("second-one-{round}");
        count(
            &mut replaced,
            &reader.asks(&format!("read {yours}"))?,
            &text,
        );
        writer.must(&format!("append {mine} -and-more"))?;
        text.push_str("-and-more");
        let size = text.len().to_string();
        count(&mut grown, &reader.asks(&format!("size {yours}"))?, &size);
        count(&mut grown, &reader.asks(&format!("read {yours}"))?, &text);
        let names = reader.asks(&format!("list {of_reader}"))?;
        count(
            &mut listed,
            if names.contains(&name) { "yes" } else { "no" },
            "yes",
        );
        writer.must(&format!("remove {mine}"))?;
        count(
            &mut removed,
            &reader.asks(&format!("read {yours}"))?,
            "ENOENT",
        );
        let names = reader.asks(&format!("list {of_reader}"))?;
        count(
            &mut listed,
            if names.contains(&name) { "yes" } else { "no" },
            "no",
        );
    }
    Ok(json!({
        "made": made, "replaced": replaced, "grown": grown, "listed": listed, "removed": removed,
    }))
}

/// Checks a folder that the reader has read-only and that was mounted before the writer's.
fn read_only(writer: &mut Side, reader: &mut Side) -> Result<Value> {
    writer.must("write /whole/kept text")?;
    writer.must("bind /whole/socket")?;
    Ok(json!({
        "write": reader.asks("write /read-only/kept other")?,
        "make": reader.asks("write /read-only/new text")?,
        "remove": reader.asks("remove /read-only/kept")?,
        "make_folder": reader.asks("make-folder /read-only/folder")?,
        "lock_to_write": reader.asks("record-lock /read-only/kept")?,
        "read": reader.asks("read /read-only/kept")?,
        "socket": reader.asks("connect /read-only/socket")?,
        "events": events(writer, reader, "/whole", "/read-only")?,
        "stale": stale(writer, reader, "/whole", "/read-only")?,
    }))
}

/// Checks parts of a volume (subPath) that were mounted before the whole volume.
fn parts(writer: &mut Side, reader: &mut Side) -> Result<Value> {
    let before = reader.asks("read /file")?;
    writer.must("append /parts/folder/file -and-more")?;
    let after = reader.asks("read /file")?;
    let in_folder = reader.asks("read /folder/file")?;
    reader.must("append /file -of-reader")?;
    let of_reader = writer.asks("read /parts/folder/file")?;
    writer.must("bind /parts/folder/socket")?;
    writer.must("flock /parts/folder/file")?;
    let locked = [
        reader.asks("flock /file")?,
        reader.asks("flock /folder/file")?,
    ];
    writer.must("unlock")?;
    Ok(json!({
        "file": [before, after, in_folder, of_reader],
        "socket": reader.asks("connect /folder/socket")?,
        "locked": locked,
        "events": events(writer, reader, "/parts/folder", "/folder")?,
        "stale": stale(writer, reader, "/parts/folder", "/folder")?,
        "reader_sees": reader.asks("list /folder")?,
    }))
}
