//! Boots the node that a [`Builder`] describes.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::builder::{Builder, Kind, NODE_VARIABLE};
use super::channel::{Request, SetUp};
use super::control::Control;
use super::deps::COMPONENTS;
use super::machine::{self, Started};
use super::{Node, boot, images, paths, pericarp};

/// Search path of the node after the components'.
const SYSTEM_PATH: &str = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Builder {
    /// Boots the node and makes it ready for commands.
    pub fn boot(self) -> Result<Node> {
        let files = boot::prepare()?;
        let results = paths::fresh_results(&self.name)?;
        let kind = match self.kind {
            Some(kind) => kind,
            None => kind_of(std::env::var(NODE_VARIABLE).ok().as_deref())?,
        };
        let started = match kind {
            Kind::Qemu => machine::qemu::start(&self, &files, &results)?,
            Kind::Host => machine::host::start(&files, &results)?,
        };
        let Started {
            machine,
            reader,
            writer,
            ended,
        } = started;
        let control = Control::new(reader, writer, ended);
        control.hello(self.boot_timeout).with_context(|| {
            format!(
                "the node did not come up: its logs are in {}; on a very busy computer try again",
                results.display()
            )
        })?;
        let installed = if self.install_pericarp {
            pericarp::find()?
        } else {
            Vec::new()
        };
        let set_up = SetUp {
            results: results.clone(),
            is_machine: kind == Kind::Qemu,
            path: search_path()?,
            image_layout: Some(images::best()?.layout()),
            install: installed,
            vfio: Vec::new(),
            state_disk: self.state_disk.is_some(),
        };
        let request = Request::SetUp(set_up.clone());
        let output = control.request(&request, None, None, self.boot_timeout)?;
        output.checked("set-up of the node")?;
        let node = Node::new(control, machine, set_up);
        if kind == Kind::Qemu {
            node.write(pericarp::EMULATED_CONFIG_FILE, pericarp::EMULATED_CONFIG)?;
        }
        Ok(node)
    }
}

fn kind_of(variable: Option<&str>) -> Result<Kind> {
    match variable {
        None | Some("" | "qemu") => Ok(Kind::Qemu),
        Some("host") => Ok(Kind::Host),
        Some(other) => bail!("{NODE_VARIABLE}={other} is neither `qemu` nor `host`"),
    }
}

/// Every component that is built, then the system. containerd 1.7 and the CNI plugins are found by
/// those that need them.
fn search_path() -> Result<String> {
    let mut folders: Vec<PathBuf> = Vec::new();
    let others = ["containerd-1.7", "cni"];
    for component in COMPONENTS
        .iter()
        .filter(|component| !others.contains(&component.name))
    {
        let folder = component.folder()?;
        if folder.is_dir() {
            folders.push(folder);
        }
    }
    let folders: Vec<String> = folders
        .iter()
        .map(|folder| folder.to_string_lossy().into_owned())
        .collect();
    Ok(format!("{}:{SYSTEM_PATH}", folders.join(":")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_kind_of_node_is_refused() {
        assert_eq!(kind_of(None).unwrap(), Kind::Qemu);
        assert_eq!(kind_of(Some("host")).unwrap(), Kind::Host);
        let error = format!("{:#}", kind_of(Some("xen")).unwrap_err());
        assert!(error.contains("PERICARP_NODE=xen"), "{error}");
    }
}
