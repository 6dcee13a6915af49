//! What crosses between driver and device apart from packets: features, configuration, control
//! commands. Pure functions.

use pericarp_sys::tap;

/// Device ID (virtio 1.2 §5.1.1).
pub(crate) const DEVICE_TYPE: u16 = 1;

/// Queue pairs of one device. Linux' tap has 256; a pod's guest has up to 256 vCPUs but 16 pairs
/// saturate a host's stack.
pub(crate) const PAIRS_MAX: u16 = 16;

/// `struct virtio_net_hdr_v1` (§5.1.6): flags, segmentation kind, four lengths, number of buffers.
pub(crate) const HEADER_BYTES: usize = 12;

/// Offset of `num_buffers` in it.
pub(crate) const HEADER_NUM_BUFFERS: usize = 10;

/// Ethernet header: no shorter frame can be sent.
pub(crate) const ETHERNET_HEADER_BYTES: usize = 14;

/// The longest packet with its header: 64 KiB of IP, Ethernet with two VLAN tags.
pub(crate) const PACKET_BYTES_MAX: usize = HEADER_BYTES + ETHERNET_HEADER_BYTES + 8 + 65_535;

/// Smallest and largest MTU that may be offered (§5.1.4.1: at least 68; 65,535 by the field).
pub(crate) const MTU_MIN: u16 = 68;

// Feature bits (§5.1.3).
pub(crate) const F_CSUM: u64 = 1 << 0;
pub(crate) const F_GUEST_CSUM: u64 = 1 << 1;
pub(crate) const F_MTU: u64 = 1 << 3;
pub(crate) const F_MAC: u64 = 1 << 5;
pub(crate) const F_GUEST_TSO4: u64 = 1 << 7;
pub(crate) const F_GUEST_TSO6: u64 = 1 << 8;
pub(crate) const F_GUEST_ECN: u64 = 1 << 9;
pub(crate) const F_GUEST_UFO: u64 = 1 << 10;
pub(crate) const F_HOST_TSO4: u64 = 1 << 11;
pub(crate) const F_HOST_TSO6: u64 = 1 << 12;
pub(crate) const F_HOST_ECN: u64 = 1 << 13;
pub(crate) const F_HOST_UFO: u64 = 1 << 14;
pub(crate) const F_MRG_RXBUF: u64 = 1 << 15;
pub(crate) const F_CTRL_VQ: u64 = 1 << 17;
pub(crate) const F_MQ: u64 = 1 << 22;

/// What the guest takes, with the feature that says so and the feature for the other direction.
const OFFLOADS: [(u64, u64, u32); 5] = [
    (F_GUEST_CSUM, F_CSUM, tap::OFFLOAD_CSUM),
    (F_GUEST_TSO4, F_HOST_TSO4, tap::OFFLOAD_TSO4),
    (F_GUEST_TSO6, F_HOST_TSO6, tap::OFFLOAD_TSO6),
    (F_GUEST_ECN, F_HOST_ECN, tap::OFFLOAD_TSO_ECN),
    (F_GUEST_UFO, F_HOST_UFO, tap::OFFLOAD_UFO),
];

/// Every offload bit that this device knows.
pub(crate) const OFFLOADS_ALL: u32 = tap::OFFLOAD_CSUM
    | tap::OFFLOAD_TSO4
    | tap::OFFLOAD_TSO6
    | tap::OFFLOAD_TSO_ECN
    | tap::OFFLOAD_UFO;

/// Features to offer for a tap that knows `offloads`.
pub(crate) fn offload_features(offloads: u32) -> u64 {
    OFFLOADS
        .iter()
        .filter(|(_, _, offload)| offloads & offload != 0)
        .fold(0, |features, (guest, host, _)| features | guest | host)
}

/// What to set on the tap once `features` are negotiated. Segmentation without checksums is refused
/// by the tap, as it is by the specification (§5.1.3.1): it is left out.
pub(crate) fn negotiated_offloads(features: u64) -> u32 {
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let mut offloads = OFFLOADS
        .iter()
        .filter(|(guest, _, _)| features & guest != 0)
        .fold(0, |offloads, (_, _, offload)| offloads | offload);
    if offloads & (tap::OFFLOAD_TSO4 | tap::OFFLOAD_TSO6) == 0 {
        offloads &= !tap::OFFLOAD_TSO_ECN;
    }
    offloads
}

/// Length of `struct virtio_net_config` up to the MTU (§5.1.4).
pub(crate) const CONFIG_BYTES: usize = 12;

/// Device configuration: MAC, status (not offered), queue pairs, MTU.
pub(crate) fn config(mac: [u8; 6], pairs: u16, mtu: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    config[..6].copy_from_slice(&mac);
    config[8..10].copy_from_slice(&pairs.to_le_bytes());
    config[10..].copy_from_slice(&mtu.to_le_bytes());
    config
}

/// `struct virtio_net_ctrl` without its data: class and command.
const CONTROL_HEADER_BYTES: usize = 2;
/// The longest command that this device understands.
pub(crate) const CONTROL_BYTES_MAX: usize = CONTROL_HEADER_BYTES + 2;
/// VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (§5.1.6.5.5).
const CONTROL_PAIRS_SET: [u8; CONTROL_HEADER_BYTES] = [4, 0];
/// VIRTIO_NET_OK.
pub(crate) const CONTROL_OK: u8 = 0;
/// VIRTIO_NET_ERR.
pub(crate) const CONTROL_ERR: u8 = 1;

/// A control command that may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Control {
    /// Use that many queue pairs from now on.
    SetPairs(u16),
}

/// Parses a command for a device with `pairs` queue pairs; `None` is answered with [`CONTROL_ERR`].
pub(crate) fn parse_control(bytes: &[u8], pairs: u16) -> Option<Control> {
    let (header, data) = bytes.split_first_chunk::<CONTROL_HEADER_BYTES>()?;
    if *header != CONTROL_PAIRS_SET {
        return None;
    }
    let wanted = u16::from_le_bytes(data.try_into().ok()?);
    (1..=pairs)
        .contains(&wanted)
        .then_some(Control::SetPairs(wanted))
}

/// Index of the control queue: behind the pairs that the driver may use (§5.1.2).
pub(crate) fn control_queue(features: u64, pairs: u16) -> u16 {
    if features & F_MQ == 0 { 2 } else { pairs * 2 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn offloads_follow_the_negotiation() {
        let all = offload_features(OFFLOADS_ALL);
        assert_eq!(negotiated_offloads(all), OFFLOADS_ALL);
        assert_eq!(negotiated_offloads(all & !F_GUEST_CSUM), 0);
        assert_eq!(
            negotiated_offloads(F_GUEST_CSUM | F_GUEST_ECN),
            tap::OFFLOAD_CSUM
        );
        assert_eq!(offload_features(tap::OFFLOAD_CSUM), F_CSUM | F_GUEST_CSUM);
    }

    #[test]
    fn config_is_laid_out_as_the_specification_says() {
        assert_eq!(
            config([1, 2, 3, 4, 5, 6], 0x0304, 1500),
            [1, 2, 3, 4, 5, 6, 0, 0, 4, 3, 0xdc, 5]
        );
    }

    #[test]
    fn control_knows_one_command() {
        assert_eq!(parse_control(&[4, 0, 2, 0], 4), Some(Control::SetPairs(2)));
        for bad in [
            &[][..],
            &[4],
            &[4, 0],
            &[4, 0, 1],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 0, 1, 0, 0],
            &[4, 1, 1, 0],
            &[0, 0, 1, 0],
        ] {
            assert_eq!(parse_control(bad, 4), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn control_never_passes_the_pairs(bytes: Vec<u8>, pairs in 1..=PAIRS_MAX) {
            if let Some(Control::SetPairs(wanted)) = parse_control(&bytes, pairs) {
                prop_assert!(wanted >= 1 && wanted <= pairs);
            }
        }

        #[test]
        fn offloads_never_exceed_what_is_known(features: u64) {
            prop_assert_eq!(negotiated_offloads(features) & !OFFLOADS_ALL, 0);
        }
    }
}
