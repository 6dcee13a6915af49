//! What the device is made from, and its descriptors before a driver comes.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use pericarp_sys::tap;

use super::{
    request::{HEADER_BYTES, MTU_MIN, OFFLOADS_ALL, PAIRS_MAX},
    vhost::Vhost,
};
use crate::devices::virtio::rate_limiter::Rates;

/// Entries of a receive or transmit queue that are offered when the parameters name none.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Parameters of a network device.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    /// Its address.
    pub(crate) mac: [u8; 6],
    /// MTU to tell the driver; 0 tells none.
    pub(crate) mtu: u16,
    /// Entries of each receive and transmit queue; a power of two.
    pub(crate) queue_size: u16,
    /// Offer checksum and segmentation offloads, as far as the tap knows them.
    pub(crate) offloads: bool,
    /// Limits towards the guest.
    pub(crate) receive: Rates,
    /// Limits from the guest.
    pub(crate) transmit: Rates,
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No tap, or too many.
    #[error("network device {name}: {count} taps given, 1 to {PAIRS_MAX} are possible")]
    TapCount { name: String, count: usize },
    /// Some vhost-net descriptors, but not one per tap.
    #[error(
        "network device {name}: {count} vhost descriptors for {taps} taps: give one each, or none"
    )]
    VhostCount {
        name: String,
        count: usize,
        taps: usize,
    },
    /// The queue size is no power of two or out of range.
    #[error("network device {name}: queue_size {size} is not a power of two from 2 to 1024")]
    QueueSize { name: String, size: u16 },
    /// An MTU no network has.
    #[error("network device {name}: mtu {mtu} is below {MTU_MIN}")]
    Mtu { name: String, mtu: u16 },
    /// A multicast address.
    #[error("network device {name}: mac is a multicast address")]
    Mac { name: String },
    /// A descriptor is not what it should be.
    #[error(
        "network device {name}: tap {index} is not a tap with IFF_VNET_HDR{}",
        if *.several { " and IFF_MULTI_QUEUE" } else { "" }
    )]
    TapKind {
        name: String,
        index: usize,
        several: bool,
    },
    /// A tap refused a setting.
    #[error("network device {name}: tap {index}: {step}: {source}")]
    Tap {
        name: String,
        index: usize,
        step: &'static str,
        source: io::Error,
    },
    /// A vhost-net descriptor refused.
    #[error("network device {name}: vhost {index}: {reason}")]
    Vhost {
        name: String,
        index: usize,
        reason: String,
    },
    /// A limit that nobody would hold.
    #[error("network device {name}: receive_limit and transmit_limit cannot be held with vhosts")]
    Limit { name: String },
    /// No timer for a limiter.
    #[error("network device {name}: timer: {source}")]
    Timer { name: String, source: io::Error },
}

/// Checks the parameters against each other and the descriptors' number.
pub(super) fn check(
    name: &str,
    parameters: &Parameters,
    taps: usize,
    vhosts: usize,
) -> Result<(), Error> {
    let name = name.to_owned();
    if taps == 0 || taps > usize::from(PAIRS_MAX) {
        return Err(Error::TapCount { name, count: taps });
    }
    if vhosts != 0 && vhosts != taps {
        return Err(Error::VhostCount {
            name,
            count: vhosts,
            taps,
        });
    }
    let limited = parameters.receive != Rates::NONE || parameters.transmit != Rates::NONE;
    if vhosts != 0 && limited {
        return Err(Error::Limit { name });
    }
    let size = parameters.queue_size;
    if !size.is_power_of_two() || !(2..=1024).contains(&size) {
        return Err(Error::QueueSize { name, size });
    }
    let mtu = parameters.mtu;
    if mtu != 0 && mtu < MTU_MIN {
        return Err(Error::Mtu { name, mtu });
    }
    if parameters.mac[0] & 1 != 0 {
        return Err(Error::Mac { name });
    }
    Ok(())
}

/// Checks what the descriptors are, sets their header's size, and finds the offloads that the
/// kernel knows.
pub(super) fn set_up_taps(name: &str, taps: &[OwnedFd]) -> Result<u32, Error> {
    let several = taps.len() > 1;
    for (index, descriptor) in taps.iter().enumerate() {
        let fine = tap::kind(descriptor.as_fd())
            .is_ok_and(|kind| kind.tap && kind.vnet_header && (kind.multi_queue || !several));
        if !fine {
            return Err(Error::TapKind {
                name: name.to_owned(),
                index,
                several,
            });
        }
        let failed = |step, source| Error::Tap {
            name: name.to_owned(),
            index,
            step,
            source,
        };
        let header_bytes = i32::try_from(HEADER_BYTES).expect("12");
        tap::set_vnet_header_size(descriptor.as_fd(), header_bytes)
            .map_err(|source| failed("setting its header's size", source))?;
        set_nonblocking(descriptor).map_err(|source| failed("making it non-blocking", source))?;
    }
    // From everything down to nothing: older kernels do not know all of them.
    let offloads = [
        OFFLOADS_ALL,
        OFFLOADS_ALL & !tap::OFFLOAD_UFO,
        tap::OFFLOAD_CSUM | tap::OFFLOAD_TSO4 | tap::OFFLOAD_TSO6,
        tap::OFFLOAD_CSUM,
        0,
    ]
    .into_iter()
    .find(|offloads| tap::set_offload(taps[0].as_fd(), *offloads).is_ok())
    .unwrap_or(0);
    // Offloads stay off until the driver negotiates them. A failure here resurfaces in `start`.
    let _ = tap::set_offload(taps[0].as_fd(), 0);
    Ok(offloads)
}

fn set_nonblocking(descriptor: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Takes vhost-net descriptors over.
pub(super) fn set_up_vhosts(name: &str, vhosts: Vec<OwnedFd>) -> Result<Vec<Vhost>, Error> {
    vhosts
        .into_iter()
        .enumerate()
        .map(|(index, descriptor)| {
            Vhost::new(descriptor).map_err(|error| Error::Vhost {
                name: name.to_owned(),
                index,
                reason: error.to_string(),
            })
        })
        .collect()
}
