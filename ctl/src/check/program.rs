//! Runs another program's `--version` and the like, with bounds on time and output.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long a program may take to print its version or its configuration.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most output that is read: containerd's configuration is 15 KiB.
const OUTPUT_BYTES_MAX: u64 = 4 << 20;

/// What a program wrote to standard output; an error says why there is none.
pub(crate) fn output(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let failed = |what: &dyn std::fmt::Display| format!("{}: {what}", program.display());
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(&error))?;
    let stdout = child
        .stdout
        .take()
        .expect("standard output was asked to be a pipe");
    let (sender, receiver) = mpsc::sync_channel(1);
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        let result = stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut text);
        // The receiver is gone when the program took too long: nobody wants the text then.
        let _ = sender.send(result.map(|_| text));
    });
    let text = receiver.recv_timeout(TIMEOUT);
    if text.is_err() {
        // It may have ended by itself in this moment.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| failed(&error))?;
    match text {
        Err(_) => Err(failed(&format_args!(
            "no answer within {} s",
            TIMEOUT.as_secs()
        ))),
        Ok(Err(error)) => Err(failed(&error)),
        Ok(Ok(_)) if !status.success() => Err(failed(&status)),
        Ok(Ok(text)) => {
            // The pipe is at its end, so the thread is too.
            let _ = reader.join();
            Ok(String::from_utf8_lossy(&text).into_owned())
        }
    }
}

/// The first version number in a text, such as 2.3.4 in "containerd github.com/... v2.3.4 abcdef".
pub(crate) fn version(text: &str) -> Option<(u32, u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut parts = word.trim_start_matches('v').split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        let patch = parts.next().unwrap_or("0");
        let digits = patch
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(patch.len());
        Some((major, minor, patch[..digits].parse().unwrap_or(0)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let table = [
            (
                "containerd github.com/containerd/containerd/v2 2.3.4+unknown ",
                Some((2, 3, 4)),
            ),
            (
                "containerd github.com/containerd/containerd v1.7.35 0a1b",
                Some((1, 7, 35)),
            ),
            ("containerd containerd.io 2.0.0-rc.1 abc", Some((2, 0, 0))),
            ("virtiofsd 1.14.0", Some((1, 14, 0))),
            ("virtiofsd backend 1.13", Some((1, 13, 0))),
            ("6.12.9-amd64", Some((6, 12, 9))),
            ("nothing", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(version(text), expected, "{text}");
        }
    }

    #[test]
    fn programs_are_heard_or_their_failure_is_told() {
        assert_eq!(output(Path::new("/bin/echo"), &["a b"]).unwrap(), "a b\n");
        assert!(
            output(Path::new("/bin/false"), &[])
                .unwrap_err()
                .contains("/bin/false")
        );
        assert!(
            output(Path::new("/nonexistent"), &[])
                .unwrap_err()
                .contains("/nonexistent")
        );
    }
}
