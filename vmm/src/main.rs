//! `pericarp-vmm`: the virtual machine monitor of one pod.

mod devices;

fn main() {}
