//! A whole machine as plain data: saved while it is paused, and restored by another process.
//!
//! ```text
//! file:  magic (16 bytes), postcard of [`SavedMachine`], which begins with its version
//!
//! running --Pause--> paused --Save--> saved: ends              (memory stays in its file)
//! Start, AddDevice ... (the same), Run --> vCPUs set, jail, devices restored --> running
//! ```
//!
//! The file is not trusted: its size is bounded, and KVM and the devices check its values as they
//! check those of a guest. It must name this crate's version and the protocol's; two builds of one
//! version are not told apart here, and whoever keeps saved machines must do that. The machine must
//! match the description in everything that a guest can observe; an error names the first
//! difference.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    sync::Arc,
};

use kvm_ioctls::VcpuFd;
use pericarp_protocol::machine::{Machine as Description, VERSION};
use serde::{Deserialize, Serialize};

use super::{Machine, errors::MachineError, hotplug::Single};
use crate::{
    arch::{self, machine::KvmError, saved::VcpuState},
    devices::virtio::{device::Progress, transport::saved::SavedFunction},
    pci::Slot,
};

const MAGIC: [u8; 16] = *b"pericarp machine";

/// Largest file that is read: one vCPU takes 10 KiB, a device less.
const BYTES_MAX: u64 = 16 << 20;

/// Why a saved machine cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SavedError {
    /// It cannot be read.
    #[error("Machine.saved: {0}")]
    Read(#[from] io::Error),
    /// The file does not hold a saved machine.
    #[error("Machine.saved: it is not a saved machine: {0}")]
    Format(String),
    /// Another version wrote it.
    #[error("Machine.saved: it is of build {saved}, not {ours}")]
    Build {
        /// The version that wrote it.
        saved: String,
        /// This version.
        ours: String,
    },
    /// It does not match the description.
    #[error("Machine.saved: its {what} is {saved}, not {described}")]
    Differs {
        /// The property that differs.
        what: &'static str,
        /// Its value in the saved machine.
        saved: String,
        /// Its value in the description.
        described: String,
    },
    /// A device cannot be saved or restored.
    #[error("Machine.saved: {0}")]
    Device(String),
}

/// The parts of a description that a guest can observe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Shape {
    vcpus: u16,
    vcpus_max: u16,
    memory_bytes: u64,
    memory_max_bytes: u64,
    cpu: String,
    cpu_features: String,
    command_line: String,
}

impl Shape {
    fn of(description: &Description) -> Self {
        Self {
            vcpus: description.vcpus,
            vcpus_max: description.vcpus_max,
            memory_bytes: description.memory_bytes,
            memory_max_bytes: description.memory_max_bytes,
            cpu: format!("{:?}", description.cpu),
            cpu_features: description.cpu_features.as_str().to_owned(),
            command_line: description.command_line.as_str().to_owned(),
        }
    }

    /// Returns an error that names the first difference, if there is one.
    fn check(&self, described: &Self) -> Result<(), SavedError> {
        let parts: [(&'static str, &dyn ToString, &dyn ToString); 7] = [
            ("vcpus", &self.vcpus, &described.vcpus),
            ("vcpus_max", &self.vcpus_max, &described.vcpus_max),
            ("memory_bytes", &self.memory_bytes, &described.memory_bytes),
            (
                "memory_max_bytes",
                &self.memory_max_bytes,
                &described.memory_max_bytes,
            ),
            ("cpu", &self.cpu, &described.cpu),
            ("cpu_features", &self.cpu_features, &described.cpu_features),
            ("command_line", &self.command_line, &described.command_line),
        ];
        for (what, saved, described) in parts {
            differs(what, saved, described)?;
        }
        Ok(())
    }
}

fn differs(
    what: &'static str,
    saved: &(impl ToString + ?Sized),
    described: &(impl ToString + ?Sized),
) -> Result<(), SavedError> {
    let (saved, described) = (saved.to_string(), described.to_string());
    if saved == described {
        return Ok(());
    }
    Err(SavedError::Differs {
        what,
        saved,
        described,
    })
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedDevice {
    name: String,
    slot: Slot,
    function: SavedFunction,
}

/// A machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedMachine {
    build: String,
    shape: Shape,
    clock_ns: u64,
    vcpus: Vec<VcpuState>,
    devices: Vec<SavedDevice>,
}

/// Version of this crate and of the protocol: a saved machine is read by the same ones only.
fn build() -> String {
    format!("{} {VERSION}", env!("CARGO_PKG_VERSION"))
}

impl SavedMachine {
    /// Reads a saved machine from the file's position to its end.
    pub(super) fn read(file: OwnedFd, description: &Description) -> Result<Self, SavedError> {
        let mut bytes = Vec::new();
        File::from(file)
            .take(BYTES_MAX + 1)
            .read_to_end(&mut bytes)?;
        let saved = Self::parse(&bytes)?;
        saved.shape.check(&Shape::of(description))?;
        differs(
            "number of vCPU states",
            &saved.vcpus.len(),
            &description.vcpus_max,
        )?;
        Ok(saved)
    }

    /// Parses what a file holds.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, SavedError> {
        let format = |reason: &str| SavedError::Format(reason.to_owned());
        if bytes.len() as u64 > BYTES_MAX {
            return Err(format("it is too large"));
        }
        let rest = bytes
            .strip_prefix(&MAGIC)
            .ok_or_else(|| format("its beginning is not one's"))?;
        let (saved, rest) = postcard::take_from_bytes::<Self>(rest)
            .map_err(|error| SavedError::Format(error.to_string()))?;
        if !rest.is_empty() {
            return Err(format("something follows its end"));
        }
        let ours = build();
        if saved.build != ours {
            return Err(SavedError::Build {
                saved: saved.build,
                ours,
            });
        }
        Ok(saved)
    }

    /// What [`Self::parse`] reads.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, postcard::Error> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(postcard::to_stdvec(self)?);
        Ok(bytes)
    }

    /// `rest` behind a valid magic and version.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn with_header(rest: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(postcard::to_stdvec(&build()).expect("a short text"));
        bytes.extend_from_slice(rest);
        bytes
    }
}

impl Machine {
    /// Writes the paused machine to `file`. Its devices no longer serve afterwards.
    pub(crate) fn save(&mut self, file: OwnedFd) -> Result<(), MachineError> {
        let vcpus = self.vcpus.as_ref().filter(|vcpus| vcpus.is_closed());
        if vcpus.is_none() {
            return Err(MachineError::State("only a paused machine is saved"));
        }
        if !self.passthrough.is_empty() {
            return Err(MachineError::State(
                "a machine with a function of the host is not saved",
            ));
        }
        if self.plugged_bytes() != 0 {
            return Err(MachineError::State(
                "a machine with plugged memory is not saved",
            ));
        }
        // What drivers asked for last is done before their devices stop.
        if let Some((name, broken)) = self.work().into_iter().next() {
            return Err(SavedError::Device(format!("{name}: {broken}")).into());
        }
        self.was_saved = true;
        // Devices first: they may interrupt while they stop.
        let devices = self.names.iter().filter_map(|(name, attached)| {
            let function = self.functions.get(&attached.slot)?;
            Some(SavedDevice {
                name: name.clone(),
                slot: attached.slot,
                function: function.save(),
            })
        });
        let devices: Vec<_> = devices.collect();
        if let Some(device) = devices.iter().find(|device| !device.function.is_whole()) {
            let reason = format!("{}: its daemon has not answered every request", device.name);
            return Err(SavedError::Device(reason).into());
        }
        let msrs = arch::saved::msr_indices(&self.kvm)?;
        let clock_ns = arch::saved::clock_ns(&self.platform.vm)?;
        let vcpus = self.vcpus()?;
        let saved = SavedMachine {
            build: build(),
            shape: Shape::of(&self.description),
            clock_ns,
            vcpus: vcpus.each(|vcpu| VcpuState::save(vcpu, &msrs))?,
            devices,
        };
        let bytes = saved.to_bytes().map_err(io::Error::other);
        bytes
            .and_then(|bytes| File::from(file).write_all(&bytes))
            .map_err(MachineError::host("saved machine"))
    }

    /// Whether a save was begun: such a machine can only end.
    pub(crate) fn was_saved(&self) -> bool {
        self.was_saved
    }

    fn plugged_bytes(&self) -> u64 {
        let name = self.single.get(&Single::Mem);
        let function = name.and_then(|name| self.function(name).ok());
        let progress = function.and_then(|function| function.device().progress());
        progress.map_or(0, |progress: Progress| progress.actual_bytes)
    }

    /// Creates the vCPUs and sets them to their saved state.
    pub(super) fn restore_vcpus(&self, saved: &SavedMachine) -> Result<Vec<VcpuFd>, MachineError> {
        let vm = &self.platform.vm;
        arch::saved::set_clock_ns(vm, saved.clock_ns)?;
        let mut vcpus = Vec::new();
        for (id, state) in (0_u64..).zip(&saved.vcpus) {
            let vcpu = vm.create_vcpu(id).map_err(KvmError::at("create vCPU"))?;
            state.restore(vm, &vcpu)?;
            vcpus.push(vcpu);
        }
        Ok(vcpus)
    }

    /// Restores the devices, if the machine is restored. Called inside the jail.
    pub(crate) fn restore_devices(&mut self) -> Result<(), MachineError> {
        let Some(saved) = self.saved.take() else {
            return Ok(());
        };
        let described = self
            .names
            .iter()
            .map(|(name, at)| format!("{name} {}", at.slot));
        let devices = saved.devices.iter();
        let there = devices.map(|device| format!("{} {}", device.name, device.slot));
        let list = |names: Vec<String>| names.join(", ");
        differs(
            "list of devices and their slots",
            &list(there.collect()),
            &list(described.collect()),
        )?;
        for device in &saved.devices {
            let function = self.function(&device.name).map(Arc::clone)?;
            let restored = function.restore(&device.function);
            restored.map_err(|broken| SavedError::Device(broken.to_string()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> SavedMachine {
        SavedMachine {
            build: build(),
            shape: Shape {
                vcpus: 1,
                vcpus_max: 2,
                memory_bytes: 64 << 20,
                memory_max_bytes: 64 << 20,
                cpu: "Host".to_owned(),
                cpu_features: String::new(),
                command_line: "quiet".to_owned(),
            },
            clock_ns: 7,
            vcpus: Vec::new(),
            devices: Vec::new(),
        }
    }

    #[test]
    fn what_is_written_comes_back_and_nothing_else_is_read() {
        let whole = saved().to_bytes().unwrap();
        let back = SavedMachine::parse(&whole).unwrap();
        assert_eq!((back.shape, back.clock_ns), (saved().shape, 7));
        for length in 0..whole.len() {
            assert!(SavedMachine::parse(&whole[..length]).is_err(), "{length}");
        }
        let longer = [whole.as_slice(), &[0]].concat();
        assert!(SavedMachine::parse(&longer).is_err());
        let other = SavedMachine {
            build: "0.0.0 1".to_owned(),
            ..saved()
        };
        let error = SavedMachine::parse(&other.to_bytes().unwrap()).unwrap_err();
        assert!(error.to_string().contains("build 0.0.0 1"), "{error}");
    }

    #[test]
    fn the_first_difference_is_named() {
        let described = Shape {
            vcpus_max: 4,
            command_line: "quiet loud".to_owned(),
            ..saved().shape
        };
        let error = saved().shape.check(&described).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Machine.saved: its vcpus_max is 2, not 4"
        );
    }
}
