//! A read-only registry (distribution-spec, pull part) over an image layout.
//!
//! It listens on the node's loopback; containerd's `certs.d/_default` sends every registry's name
//! to it, so only the last part of a repository's name is looked at. One thread per connection,
//! one request per connection.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::layout::MANIFEST;
use super::{Name, names};

/// Where the registry listens in the node.
pub const ADDRESS: &str = "127.0.0.1:5000";

/// Longest request head; a longer one is cut off and refused.
const HEAD_BYTES_MAX: u64 = 16 * 1024;

/// A client that sends nothing, or takes nothing, for so long is gone.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);

/// What a request's path means.
#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    /// `/v2/`: is this a registry?
    Version,
    /// `/v2/<name>/manifests/<tag or digest>`.
    Manifest {
        repository: &'a str,
        reference: &'a str,
    },
    /// `/v2/<name>/blobs/<digest>`.
    Blob { digest: &'a str },
    /// Anything else.
    Unknown,
}

/// Starts the registry; it lives as long as the process.
pub fn start(layout: &Path) -> Result<()> {
    let names = names(layout)?;
    let listener = TcpListener::bind(ADDRESS)
        .with_context(|| format!("cannot listen on {ADDRESS} for the registry"))?;
    let layout = layout.to_path_buf();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (layout, names) = (layout.clone(), names.clone());
            std::thread::spawn(move || {
                if let Err(error) = answer(stream, &layout, &names) {
                    eprintln!("registry: {error:#}");
                }
            });
        }
    });
    Ok(())
}

fn parse(path: &str) -> Target<'_> {
    let path = path.split('?').next().unwrap_or(path);
    let Some(rest) = path.strip_prefix("/v2") else {
        return Target::Unknown;
    };
    let rest = rest.trim_start_matches('/');
    if rest.is_empty() {
        return Target::Version;
    }
    let mut parts = rest.rsplit('/');
    let (last, kind, repository) = (parts.next(), parts.next(), parts.next());
    match (last, kind, repository) {
        (Some(reference), Some("manifests"), Some(repository)) => Target::Manifest {
            repository,
            reference,
        },
        (Some(digest), Some("blobs"), Some(_)) => Target::Blob { digest },
        _ => Target::Unknown,
    }
}

/// The manifest that a reference means.
fn find<'a>(names: &'a [Name], repository: &str, reference: &'a str) -> Option<&'a str> {
    if reference.starts_with("sha256:") {
        let known = names.iter().any(|name| name.digest == reference);
        return known.then_some(reference);
    }
    let mut matching = names
        .iter()
        .filter(|name| name.repository == repository && (name.tag == "*" || name.tag == reference));
    matching.next().map(|name| name.digest.as_str())
}

/// Path of a blob; `None` unless the digest is well formed, so that it cannot leave the layout.
fn blob_path(layout: &Path, digest: &str) -> Option<PathBuf> {
    let digits = digest.strip_prefix("sha256:")?;
    let well_formed = digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    well_formed.then(|| layout.join("blobs/sha256").join(digits))
}

fn answer(stream: TcpStream, layout: &Path, names: &[Name]) -> Result<()> {
    stream
        .set_read_timeout(Some(CLIENT_TIMEOUT))
        .context("cannot set a time-out")?;
    stream
        .set_write_timeout(Some(CLIENT_TIMEOUT))
        .context("cannot set a time-out")?;
    let mut reader = BufReader::new((&stream).take(HEAD_BYTES_MAX));
    let mut request = String::new();
    reader
        .read_line(&mut request)
        .context("cannot read a request")?;
    let mut header = String::new();
    while reader
        .read_line(&mut header)
        .context("cannot read a header")?
        > 2
    {
        header.clear();
    }
    let mut words = request.split_whitespace();
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    if !["GET", "HEAD"].contains(&method) {
        return respond(
            &stream,
            "405 Method Not Allowed",
            "text/plain",
            "",
            Body::none(),
        );
    }
    let (digest, media_type) = match parse(path) {
        Target::Version => {
            return respond(&stream, "200 OK", "application/json", "", Body::none());
        }
        Target::Manifest {
            repository,
            reference,
        } => (find(names, repository, reference), MANIFEST),
        Target::Blob { digest } => (Some(digest), "application/octet-stream"),
        Target::Unknown => (None, ""),
    };
    let file = digest
        .and_then(|digest| blob_path(layout, digest))
        .map(File::open);
    let (Some(digest), Some(Ok(file))) = (digest, file) else {
        return respond(&stream, "404 Not Found", "text/plain", "", Body::none());
    };
    let length = file.metadata().context("cannot measure a blob")?.len();
    let body = Body {
        length,
        file: (method == "GET").then_some(file),
    };
    respond(&stream, "200 OK", media_type, digest, body)
}

struct Body {
    length: u64,
    file: Option<File>,
}

impl Body {
    fn none() -> Self {
        Self {
            length: 0,
            file: None,
        }
    }
}

fn respond(to: &TcpStream, status: &str, kind: &str, digest: &str, body: Body) -> Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n");
    head.push_str("Docker-Distribution-API-Version: registry/2.0\r\n");
    if !digest.is_empty() {
        head.push_str(&format!("Docker-Content-Digest: {digest}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.length));
    let mut to = to;
    to.write_all(head.as_bytes()).context("cannot answer")?;
    if let Some(mut file) = body.file {
        std::io::copy(&mut file, &mut to).context("cannot send a blob")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_registry_and_path_reaches_the_same_image() {
        let name = |repository: &str, tag: &str| Name {
            repository: repository.to_owned(),
            tag: tag.to_owned(),
            digest: format!("sha256:{}", "a".repeat(64)),
        };
        let names = [name("busybox", "*"), name("test-image-tag", "all")];
        let parsed = parse("/v2/e2e-test-images/busybox/manifests/1.29-2?ns=registry.k8s.io");
        assert_eq!(
            parsed,
            Target::Manifest {
                repository: "busybox",
                reference: "1.29-2"
            }
        );
        assert!(find(&names, "busybox", "1.29-2").is_some());
        assert!(find(&names, "test-image-tag", "all").is_some());
        assert!(find(&names, "test-image-tag", "none").is_none());
        assert_eq!(parse("/v2/"), Target::Version);
        assert_eq!(parse("/v2"), Target::Version);
        assert_eq!(parse("/"), Target::Unknown);
    }

    #[test]
    fn a_digest_cannot_leave_the_layout() {
        assert!(blob_path(Path::new("/l"), "sha256:../../etc/passwd").is_none());
        assert!(blob_path(Path::new("/l"), &format!("sha256:{}", "0".repeat(64))).is_some());
    }
}
