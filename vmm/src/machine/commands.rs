//! What the shim asks of a machine that runs: pause, sizes, limits, counters.

use std::{
    io,
    os::unix::fs::MetadataExt,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use pericarp_protocol::machine::{
    Counter, DeviceStatistics, Direction, FieldError, List, NewLimit, Statistics, Text,
};

use super::{Machine, devices, errors::MachineError, hotplug::Single, vcpu::Vcpus};
use crate::devices::virtio::{device::Command, transport::VirtioFunction};

impl Machine {
    pub(super) fn vcpus(&self) -> Result<&Vcpus, MachineError> {
        self.vcpus
            .as_ref()
            .ok_or(MachineError::State("the machine does not run yet"))
    }

    /// Lets the vCPUs run.
    pub(crate) fn resume(&self) -> Result<(), MachineError> {
        self.vcpus()?.open();
        Ok(())
    }

    /// Stops them.
    pub(crate) fn pause(&self) -> Result<(), MachineError> {
        self.vcpus()?.close();
        Ok(())
    }

    /// How many vCPUs run.
    pub(crate) fn resize_vcpus(&self, count: u16) -> Result<(), MachineError> {
        let vcpus = self.vcpus()?;
        let (_, most) = vcpus.counts();
        if usize::from(count) > most {
            let reason = format!("{count} is more than vcpus_max = {most}");
            return Err(FieldError::new("Vcpus.count", reason).into());
        }
        vcpus.allow(count);
        Ok(())
    }

    pub(super) fn function(&self, name: &str) -> Result<&Arc<VirtioFunction>, MachineError> {
        let attached = self.names.get(name);
        attached
            .and_then(|attached| self.functions.get(&attached.slot))
            .ok_or_else(|| MachineError::NotFound(name.to_owned()))
    }

    /// Has one device do something.
    pub(crate) fn command(&self, name: &str, command: Command) -> Result<(), MachineError> {
        let function = self.function(name)?;
        let result = function.device().command(command);
        function.note_config_change();
        Ok(result?)
    }

    /// A limit of a device.
    pub(crate) fn set_limit(&self, new: &NewLimit) -> Result<(), MachineError> {
        let rates = devices::rates(&new.limit);
        let command = match new.direction {
            Direction::Both => Command::Limit(rates),
            Direction::Receive => Command::ReceiveLimit(rates),
            Direction::Transmit => Command::TransmitLimit(rates),
        };
        self.command(new.device.as_str(), command)
    }

    /// Has a device that there is once in a machine take `bytes` as its goal.
    fn resize(&mut self, device: Single, bytes: u64) -> Result<(), MachineError> {
        let Some(name) = self.single.get(&device) else {
            return Err(MachineError::NotFound(device.kind().to_owned()));
        };
        self.command(name, Command::Resize(bytes))?;
        self.resizing = true;
        Ok(())
    }

    /// The memory that the guest has, once, when what was asked for last is reached.
    pub(crate) fn take_reached(&mut self) -> Option<u64> {
        if !self.resizing {
            return None;
        }
        let reached = |device: Single| {
            let Some(name) = self.single.get(&device) else {
                return Some(0);
            };
            let progress = self.function(name).ok()?.device().progress()?;
            (progress.goal_bytes == progress.actual_bytes).then_some(progress.actual_bytes)
        };
        let (plugged, ballooned) = (reached(Single::Mem)?, reached(Single::Balloon)?);
        self.resizing = false;
        Some((self.description.memory_bytes + plugged).saturating_sub(ballooned))
    }

    /// Memory in all.
    pub(crate) fn resize_memory(&mut self, bytes: u64) -> Result<(), MachineError> {
        let (least, most) = (
            self.description.memory_bytes,
            self.description.memory_max_bytes,
        );
        if !(least..=most).contains(&bytes) {
            let reason = format!("{bytes} is not between {least} and {most}");
            return Err(FieldError::new("Bytes.bytes", reason).into());
        }
        self.resize(Single::Mem, bytes - least)
    }

    /// What the balloon takes.
    pub(crate) fn set_balloon(&mut self, bytes: u64) -> Result<(), MachineError> {
        self.resize(Single::Balloon, bytes)
    }

    /// Counters of the machine.
    pub(crate) fn statistics(&self) -> Result<Statistics, MachineError> {
        let host = MachineError::host("statistics");
        let blocks = self
            .memory
            .files
            .iter()
            .map(|file| Ok(file.metadata()?.blocks()));
        let blocks: u64 = blocks.sum::<io::Result<u64>>().map_err(host)?;
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
        let peak_kib = usage.map_or(0, |usage| u64::try_from(usage.max_rss()).unwrap_or(0));
        let vcpus = self.vcpus.as_ref().map_or(0, |vcpus| vcpus.counts().0);
        Ok(Statistics {
            exits_io: self.exits.io.load(Relaxed),
            exits_mmio: self.exits.mmio.load(Relaxed),
            exits_other: self.exits.other.load(Relaxed),
            exits_interrupted: self.exits.interrupted.load(Relaxed),
            interrupts: self.platform.interrupts.load(Relaxed),
            resident_peak_bytes: peak_kib << 10,
            guest_resident_bytes: blocks * 512,
            vcpus: u64::from(vcpus),
            memory_bytes: self.description.memory_bytes,
        })
    }

    /// Counters of a device.
    pub(crate) fn device_statistics(&self, name: &str) -> Result<DeviceStatistics, MachineError> {
        let counters = self.function(name)?.device().counters();
        let counters = counters.into_iter().map(|(name, value)| Counter {
            name: Text::lossy(name),
            value,
        });
        let counters = List::new("DeviceStatistics.counters", counters.collect())?;
        Ok(DeviceStatistics { counters })
    }
}
