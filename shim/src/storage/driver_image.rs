//! The driver image (`paths.modules`): a read-only disk of the guest with modules for its
//! kernel, firmware, and what containers with passed-through functions get besides.
//!
//! The shim never looks into it; the agent does (`agent/src/drivers/`).

use std::{fs::File, os::unix::fs::FileTypeExt, path::PathBuf, time::Duration};

use pericarp_protocol::{
    guest::{BlockDevice, Storage, storage::Source},
    limits::DRIVER_SECONDS_MAX,
    machine::CacheMode,
};
use pericarp_runtime_config::Settings;

use crate::{
    errors::CallError,
    guest::agent_client::Agent,
    storage::disk::{DiskFile, Disks},
};

/// The key of the configuration, which errors begin with.
const KEY: &str = "paths.modules";

/// Where the guest mounts it.
pub(crate) const GUEST_PATH: &str = "/run/pericarp/drivers";

/// An image that is open.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: File,
}

impl Image {
    /// Opens the pod's image, if its settings name one.
    pub(crate) fn open(settings: &Settings) -> Result<Option<Self>, CallError> {
        let Some(path) = settings.paths.modules.clone() else {
            return Ok(None);
        };
        let failed = |error| CallError::host(format!("{KEY}: {}", path.display()), error);
        let file = File::open(&path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(CallError::Host(format!(
                "{KEY}: {} is no file: name an EROFS image (docs/gpu.md)",
                path.display()
            )));
        }
        Ok(Some(Self { path, file }))
    }

    /// Gives the guest the image as a disk.
    pub(crate) async fn plug(&self, disks: &Disks) -> Result<Storage, CallError> {
        let failed = |error| CallError::host(format!("{KEY}: {}", self.path.display()), error);
        let file = DiskFile {
            file: self.file.try_clone().map_err(failed)?,
            read_only: true,
        };
        // It stays until the VM ends.
        let disk = disks.plug(file, CacheMode::WriteBack).await?;
        Ok(storage(disk.address))
    }

    /// The agent, with the time that drivers may take to load.
    pub(crate) fn patient(agent: &Agent) -> Agent {
        agent.with_more_time(Duration::from_secs(DRIVER_SECONDS_MAX))
    }

    /// Names the host's file in what the agent says of the image.
    pub(crate) fn explain(&self, error: CallError) -> CallError {
        match error {
            CallError::Agent(code, reason) => {
                CallError::Agent(code, format!("{KEY} {}: {reason}", self.path.display()))
            }
            error => error,
        }
    }
}

fn storage(pci_address: String) -> Storage {
    Storage {
        mount_point: GUEST_PATH.to_owned(),
        source: Some(Source::BlockDevice(BlockDevice {
            pci_address,
            fs_type: "erofs".to_owned(),
            ..Default::default()
        })),
        options: ["ro", "nosuid", "nodev"].map(str::to_owned).into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Config;
    use ttrpc::Code;

    use super::*;

    #[test]
    fn an_image_is_opened_where_it_is_configured() {
        let mut settings = Config::default().settings;
        assert!(Image::open(&settings).unwrap().is_none());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drivers.erofs");
        settings.paths.modules = Some(path.clone());
        let error = Image::open(&settings).unwrap_err().to_string();
        assert!(error.starts_with("paths.modules: /"), "{error}");
        settings.paths.modules = Some(dir.path().to_owned());
        let error = Image::open(&settings).unwrap_err().to_string();
        assert!(error.contains("is no file"), "{error}");
        std::fs::write(&path, "x").unwrap();
        settings.paths.modules = Some(path.clone());
        let image = Image::open(&settings).unwrap().unwrap();
        let said = CallError::Agent(Code::FAILED_PRECONDITION, "driver image: x".to_owned());
        let words = format!("paths.modules {}: driver image: x", path.display());
        assert_eq!(image.explain(said).to_string(), words);
    }
}
