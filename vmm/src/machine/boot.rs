//! Between the last device and the first instruction: kernel, vCPUs and their threads.

use std::{io, sync::Arc};

use kvm_ioctls::VcpuFd;
use pericarp_sys::kvm;

use super::{
    Machine,
    errors::MachineError,
    vcpu::{Context, Gate, Vcpus},
};
use crate::{arch, devices::virtio::device::Confine};

impl Machine {
    /// Loads the kernel and prepares every vCPU, or sets them as they were saved.
    pub(crate) fn boot(&mut self) -> Result<Vec<VcpuFd>, MachineError> {
        if let Some(saved) = &self.saved {
            return self.restore_vcpus(saved);
        }
        let description = &self.description;
        let count = description.vcpus_max;
        let entry = arch::boot::load(
            &self.memory.guest,
            &self.memory.layout,
            count,
            &mut self.kernel,
            self.initramfs.as_mut(),
            description.command_line.as_str(),
        )?;
        let features = description.cpu_features.as_str();
        let template = arch::cpu::template(&self.kvm, description.cpu, features, count)?;
        let mut vcpus = Vec::new();
        for id in 0..count {
            let vcpu = self.platform.vm.create_vcpu(u64::from(id));
            let vcpu = vcpu.map_err(arch::machine::KvmError::at("create vCPU"))?;
            let entry = (id == 0).then_some(&entry);
            arch::cpu::prepare(&vcpu, id, &template, entry)?;
            vcpus.push(vcpu);
        }
        if let Some(first) = vcpus.first() {
            let ecam = arch::layout::ECAM;
            // A page fault less for each function that a scan of the bus looks at. Before Linux
            // 6.11 there is no such call.
            let _ = kvm::pre_fault(first, ecam.start, ecam.end - ecam.start);
        }
        Ok(vcpus)
    }

    /// Starts the threads of devices.
    pub(crate) fn start_threads(&self, confine: Confine) -> Result<(), MachineError> {
        for function in self.functions.values() {
            let started = function.device().start_threads(confine);
            started.map_err(MachineError::host("thread of a device"))?;
        }
        Ok(())
    }

    /// Starts the vCPU threads, which wait at the gate.
    pub(crate) fn spawn(
        &mut self,
        vcpus: Vec<VcpuFd>,
        confine: fn() -> io::Result<()>,
    ) -> Result<(), MachineError> {
        let gate = Arc::new(Gate::new(self.description.vcpus));
        let context = || Context {
            bus: Arc::clone(&self.bus),
            gate: Arc::clone(&gate),
            exits: Arc::clone(&self.exits),
            doorbell: Arc::clone(&self.platform.doorbell),
        };
        let vcpus = Vcpus::spawn(vcpus, context, confine);
        self.vcpus = Some(vcpus.map_err(MachineError::host("vCPU threads"))?);
        Ok(())
    }
}
