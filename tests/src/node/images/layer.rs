//! Layers: reproducible tar archives made from programs.

use std::process::Command;

use anyhow::{Context, Result, bail};

use super::table::Content;

/// The programs that layers are made from.
pub(super) struct Programs {
    /// A static busybox.
    pub busybox: Vec<u8>,
    /// A static agnhost, where it is built.
    pub agnhost: Option<Vec<u8>>,
}

/// Users of every image; `www-data` is asked for by name.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    daemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
    www-data:x:33:33:www-data:/var/www:/bin/false\n\
    nobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnobody:x:65534:\n";

/// What critest's predefined group image adds: user 1000 is in group 50000.
const PREDEFINED_USER: &str = "default-user:x:1000:1000::/home:/bin/sh\n";
const PREDEFINED_GROUP: &str =
    "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n";

/// Programs that busybox of Debian lacks and critest runs in its containers: `pgrep NAME`, and
/// `ipcs -m` (proc(5), `/proc/sysvipc/shm`).
const SCRIPTS: [(&str, &str); 2] = [
    (
        "pgrep",
        "#!/bin/sh\nfound=1\nfor process in /proc/[0-9]*; do\n\
         [ \"$(cat $process/comm 2>/dev/null)\" != \"$1\" ] && continue\n\
         echo ${process#/proc/}; found=0\n\
         done\nexit $found\n",
    ),
    ("ipcs", "#!/bin/sh\nexec cat /proc/sysvipc/shm\n"),
];

const FOLDERS: [&str; 14] = [
    "bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "usr", "usr/bin", "usr/sbin", "var",
    "var/www", "www",
];

/// A tar archive whose entries carry no time and no owner but root.
struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Layer {
    fn new() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }

    fn entry(&mut self, path: &str, kind: tar::EntryType, mode: u32, data: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        let appended = self.tar.append_data(&mut header, path, data);
        appended.with_context(|| format!("cannot add {path} to a layer"))
    }

    fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(path, tar::EntryType::Regular, mode, data)
    }

    /// A hard link, as the applets of busybox's own image are: each path can be masked alone.
    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Link);
        header.set_mode(0o755);
        header.set_size(0);
        let appended = self.tar.append_link(&mut header, path, target);
        appended.with_context(|| format!("cannot add {path} to a layer"))
    }

    fn finish(self) -> Result<Vec<u8>> {
        self.tar.into_inner().context("cannot finish a layer")
    }
}

/// The layers of a content, lowest first; `None` when a program for it is not built.
pub(super) fn layers(content: Content, programs: &Programs) -> Result<Option<Vec<Vec<u8>>>> {
    let mut layers = vec![busybox(&programs.busybox)?];
    let mut above = Layer::new();
    match content {
        Content::Busybox => return Ok(Some(layers)),
        Content::Web => above.file("www/index.html", 0o644, b"the web server of the node\n")?,
        Content::PredefinedGroup => {
            let (users, groups) = (PASSWD.to_owned(), GROUP.to_owned());
            above.file("etc/passwd", 0o644, (users + PREDEFINED_USER).as_bytes())?;
            above.file("etc/group", 0o644, (groups + PREDEFINED_GROUP).as_bytes())?;
        }
        Content::Agnhost => match &programs.agnhost {
            Some(agnhost) => above.file("agnhost", 0o755, agnhost)?,
            None => return Ok(None),
        },
        Content::Setuid => above.file("effective-uid", 0o4755, &effective_uid()?)?,
    }
    layers.push(above.finish()?);
    Ok(Some(layers))
}

fn busybox(program: &[u8]) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for folder in FOLDERS {
        let mode = if folder == "tmp" { 0o1777 } else { 0o755 };
        layer.entry(folder, tar::EntryType::Directory, mode, &[])?;
    }
    layer.file("bin/busybox", 0o755, program)?;
    for applet in applets()? {
        layer.link(&format!("bin/{applet}"), "bin/busybox")?;
    }
    for (name, text) in SCRIPTS {
        layer.file(&format!("bin/{name}"), 0o755, text.as_bytes())?;
    }
    layer.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    layer.file("etc/group", 0o644, GROUP.as_bytes())?;
    layer.finish()
}

/// Compiles the program that says as whom it runs; a script cannot be set-user-ID.
fn effective_uid() -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let (source, program) = (folder.path().join("e.c"), folder.path().join("e"));
    let text = "#include <stdio.h>\n#include <unistd.h>\n\
                int main(void) { return printf(\"Effective uid: %d\\n\", geteuid()) < 0; }\n";
    std::fs::write(&source, text).context("cannot write a program")?;
    let mut compiler = Command::new("gcc");
    compiler.args(["-static", "-s", "-Wl,--build-id=none", "-o"]);
    let status = compiler.arg(&program).arg(&source).status();
    let status = status.context("gcc is missing: install the package gcc")?;
    if !status.success() {
        bail!("gcc could not compile a static program: {status}");
    }
    std::fs::read(&program).context("cannot read a compiled program")
}

fn applets() -> Result<Vec<String>> {
    let output = Command::new("busybox")
        .arg("--list")
        .output()
        .context("cannot run busybox")?;
    if !output.status.success() {
        bail!("busybox --list failed: {}", output.status);
    }
    let text = String::from_utf8(output.stdout).context("busybox --list gave no text")?;
    let applets = text
        .lines()
        .map(str::trim)
        .filter(|applet| !applet.is_empty());
    Ok(applets
        .filter(|applet| *applet != "busybox")
        .map(str::to_owned)
        .collect())
}
