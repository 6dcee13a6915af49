//! From a device's description to the device.

use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
};

use pericarp_protocol::machine::{
    Blk, CacheMode, Descriptor, Device, DeviceKind, FieldError, Fs, Net, Pmem, RateLimit, Vsock,
};

use super::{descriptors::Descriptors, memory::Memory};
use crate::devices::virtio::{
    balloon, blk, console,
    device::VirtioDevice,
    fs, mem, net, pmem,
    rate_limiter::{Rate, Rates},
    rng, vsock,
};

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// The description.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The device refused its parameters or descriptors.
    #[error("Device.kind: {0}")]
    Refused(String),
}

fn refused(error: &dyn std::error::Error) -> DeviceError {
    let source = error
        .source()
        .map(|source| format!(": {source}"))
        .unwrap_or_default();
    DeviceError::Refused(format!("{error}{source}"))
}

/// Whether a device of this kind stays for the machine's life, so that more functions may stand
/// behind its own.
pub(crate) fn is_permanent(kind: &DeviceKind) -> bool {
    match kind {
        DeviceKind::Vsock(_)
        | DeviceKind::Rng(_)
        | DeviceKind::Console(_)
        | DeviceKind::Balloon(_)
        | DeviceKind::Mem(_) => true,
        DeviceKind::Blk(_)
        | DeviceKind::Net(_)
        | DeviceKind::Fs(_)
        | DeviceKind::Pmem(_)
        | DeviceKind::Function(_) => false,
    }
}

/// Limits in the devices' own terms.
pub(crate) fn rates(limit: &RateLimit) -> Rates {
    let rate = |per_second: u64, burst: u64| Rate {
        per_second,
        burst: if burst == 0 { per_second } else { burst },
    };
    Rates {
        bytes: rate(limit.bytes_per_s, limit.bytes_burst),
        operations: rate(limit.operations_per_s, limit.operations_burst),
    }
}

/// Makes a device; it takes its descriptors from those of the request.
pub(crate) fn make(
    device: &Device,
    descriptors: &mut Descriptors,
    memory: &Memory,
) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let name = device.name.as_str().to_owned();
    match &device.kind {
        DeviceKind::Blk(blk) => make_blk(name, blk, descriptors),
        DeviceKind::Net(net) => make_net(name, net, descriptors),
        DeviceKind::Vsock(vsock) => make_vsock(name, vsock, descriptors),
        DeviceKind::Pmem(pmem) => make_pmem(name, pmem, descriptors),
        DeviceKind::Rng(_) => Ok(Box::new(rng::Rng::new(name))),
        DeviceKind::Console(console) => {
            let output = descriptors.take("Console.output", console.output)?;
            let console = console::Console::new(name, output).map_err(|error| refused(&error))?;
            Ok(Box::new(console))
        }
        DeviceKind::Balloon(balloon) => {
            let parameters = balloon::Parameters {
                deflate_on_oom: balloon.deflate_on_oom,
                free_page_reporting: balloon.free_page_reporting,
            };
            let balloon = balloon::Balloon::new(name, parameters, memory.discard.clone());
            Ok(Box::new(balloon.map_err(|error| refused(&error))?))
        }
        DeviceKind::Fs(fs) => make_fs(name, fs, descriptors),
        DeviceKind::Mem(mem) => {
            let region = &memory.layout.pluggable;
            let parameters = mem::Parameters {
                address: region.start,
                region_bytes: region.end - region.start,
                block_bytes: mem.block_bytes,
                requested_bytes: mem.requested_bytes,
            };
            let mem = mem::Mem::new(name, parameters, memory.discard.clone());
            Ok(Box::new(mem.map_err(|error| refused(&error))?))
        }
        DeviceKind::Function(_) => Err(DeviceError::Refused(
            "a passthrough device is attached, not made".to_owned(),
        )),
    }
}

fn make_blk(
    name: String,
    blk: &Blk,
    descriptors: &mut Descriptors,
) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let parameters = blk::Parameters {
        read_only: blk.read_only,
        serial: blk.serial.as_str().to_owned(),
        queues: blk.queues,
        cache: match blk.cache {
            CacheMode::WriteBack => blk::Cache::WriteBack,
            CacheMode::WriteThrough => blk::Cache::WriteThrough,
            CacheMode::Unsafe => blk::Cache::Unsafe,
        },
        limit: rates(&blk.limit),
    };
    let file = descriptors.take("Blk.file", blk.file)?;
    let blk = blk::Blk::new(name, &parameters, file).map_err(|error| refused(&error))?;
    Ok(Box::new(blk))
}

fn make_net(
    name: String,
    net: &Net,
    descriptors: &mut Descriptors,
) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let mut take_all = |field: &'static str, list: &[Descriptor]| {
        let taken = list
            .iter()
            .map(|descriptor| descriptors.take(field, *descriptor));
        taken.collect::<Result<Vec<OwnedFd>, FieldError>>()
    };
    let taps = take_all("Net.taps", net.taps.as_slice())?;
    let vhosts = take_all("Net.vhosts", net.vhosts.as_slice())?;
    let parameters = net::Parameters {
        mac: net.mac,
        mtu: net.mtu,
        queue_size: net::QUEUE_SIZE,
        offloads: net.offloads,
        receive: rates(&net.receive_limit),
        transmit: rates(&net.transmit_limit),
    };
    let net = net::Net::new(name, &parameters, taps, vhosts).map_err(|error| refused(&error))?;
    Ok(Box::new(net))
}

fn make_vsock(
    name: String,
    vsock: &Vsock,
    descriptors: &mut Descriptors,
) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let listener = UnixListener::from(descriptors.take("Vsock.listener", vsock.listener)?);
    let mut ports = Vec::new();
    for port in vsock.ports.as_slice() {
        let socket = descriptors.take("VsockPort.socket", port.socket)?;
        ports.push((port.port, UnixStream::from(socket)));
    }
    let parameters = vsock::Parameters {
        guest_cid: vsock.cid,
    };
    let vsock = vsock::Vsock::new(name, parameters, Some(listener), ports);
    Ok(Box::new(vsock.map_err(|error| refused(&error))?))
}

fn make_fs(
    name: String,
    fs: &Fs,
    descriptors: &mut Descriptors,
) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let parameters = fs::Parameters {
        tag: fs.tag.as_str().to_owned(),
        request_queues: fs.queues,
    };
    let socket = fs.socket.as_slice().first();
    let socket = socket.map(|socket| descriptors.take("Fs.socket", *socket));
    let socket = socket.transpose()?.map(UnixStream::from);
    let fs = fs::Fs::new(name, parameters, socket).map_err(|error| refused(&error))?;
    Ok(Box::new(fs))
}

fn make_pmem(
    name: String,
    pmem: &Pmem,
    descriptors: &mut Descriptors,
) -> Result<Box<dyn VirtioDevice>, DeviceError> {
    let file = File::from(descriptors.take("Pmem.file", pmem.file)?);
    let pmem = pmem::Pmem::new(name, file).map_err(|error| refused(&error))?;
    Ok(Box::new(pmem))
}
