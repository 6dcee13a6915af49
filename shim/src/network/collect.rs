//! Reads what CNI made: links, addresses, routes and neighbours of the current network namespace.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use futures::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
        RouteType,
    },
};
use pericarp_protocol::guest::{Interface, Neighbour, Route};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{GuestNetwork, NetworkError};

/// An interface that the guest shall have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
}

/// Everything in the namespace that the guest shall have.
pub(super) async fn collect(handle: &Handle) -> Result<(Vec<Link>, GuestNetwork), NetworkError> {
    let failed = |action: &str| {
        let action = format!("reading {action}");
        move |source| NetworkError::Netlink { action, source }
    };
    let messages: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("interfaces"))?;
    let links: Vec<Link> = messages.iter().filter_map(link).collect();
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("addresses"))?;
    let mut routes = Vec::new();
    for empty in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let found: Vec<RouteMessage> = handle
            .route()
            .get(empty)
            .execute()
            .try_collect()
            .await
            .map_err(failed("routes"))?;
        routes.extend(found);
    }
    let neighbours: Vec<NeighbourMessage> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("neighbours"))?;
    let names: HashMap<u32, &str> = links
        .iter()
        .map(|link| (link.index, link.name.as_str()))
        .collect();
    let network = GuestNetwork {
        interfaces: links
            .iter()
            .map(|link| interface(link, &addresses))
            .collect(),
        routes: routes
            .iter()
            .filter_map(|message| route(message, &names))
            .collect(),
        neighbours: neighbours
            .iter()
            .filter_map(|message| neighbour(message, &names))
            .collect(),
        sysctls: BTreeMap::new(),
    };
    Ok((links, network))
}

/// Ethernet interfaces that are not loopback.
fn link(message: &LinkMessage) -> Option<Link> {
    if message.header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut name = None;
    let mut mac = None;
    let mut mtu = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(bytes) => mtu = Some(*bytes),
            _ => {}
        }
    }
    Some(Link {
        index: message.header.index,
        name: name?,
        mac: mac.filter(|mac| *mac != [0; 6])?,
        mtu: mtu?,
    })
}

fn interface(link: &Link, addresses: &[AddressMessage]) -> Interface {
    let own = addresses
        .iter()
        .filter(|message| message.header.index == link.index);
    Interface {
        name: link.name.clone(),
        mac_address: text_of_mac(&link.mac),
        mtu: link.mtu,
        addresses: own.filter_map(address).collect(),
        ..Default::default()
    }
}

/// Link-local addresses of IPv6 are the guest's to make, from the same MAC.
fn address(message: &AddressMessage) -> Option<String> {
    if message.header.family == AddressFamily::Inet6 && message.header.scope == AddressScope::Link {
        return None;
    }
    // On point-to-point interfaces `Address` is the peer's and `Local` is ours; elsewhere both are
    // the same (ifaddrs(3)).
    let mut address = None;
    let mut local = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            _ => {}
        }
    }
    Some(format!(
        "{}/{}",
        local.or(address)?,
        message.header.prefix_len
    ))
}

/// Routes of the main table, less those that the kernel makes with addresses and links.
fn route(message: &RouteMessage, names: &HashMap<u32, &str>) -> Option<Route> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.protocol == RouteProtocol::Kernel
        || matches!(
            header.kind,
            RouteType::Local | RouteType::Multicast | RouteType::Broadcast | RouteType::Anycast
        )
    {
        return None;
    }
    let any = if header.address_family == AddressFamily::Inet6 {
        "::"
    } else {
        "0.0.0.0"
    };
    let mut route = Route {
        destination: format!("{any}/0"),
        scope: u8::from(header.scope).into(),
        protocol: u8::from(header.protocol).into(),
        route_type: u8::from(header.kind).into(),
        flags: header.flags.bits(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => {
                route.destination =
                    format!("{}/{}", text_of(ip)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(ip) => route.gateway = text_of(ip)?,
            RouteAttribute::PrefSource(ip) => route.source = text_of(ip)?,
            RouteAttribute::Oif(index) => route.device = (*names.get(index)?).to_owned(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(mtu).unwrap_or_default();
            }
            _ => {}
        }
    }
    Some(route)
}

fn mtu(metric: &RouteMetric) -> Option<u32> {
    match metric {
        RouteMetric::Mtu(bytes) => Some(*bytes),
        _ => None,
    }
}

fn text_of(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
}

/// Only what an administrator or CNI wrote down for good.
fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, &str>) -> Option<Neighbour> {
    if !matches!(message.header.state, NeighbourState::Permanent) {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                address = Some(IpAddr::V4(*ip))
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                address = Some(IpAddr::V6(*ip))
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok()
            }
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?.to_string(),
        mac_address: text_of_mac(&mac?),
        device: (*names.get(&message.header.ifindex)?).to_owned(),
        // NUD_PERMANENT (linux/neighbour.h).
        state: 0x80,
        ..Default::default()
    })
}

fn text_of_mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(flags: LinkFlags, mac: [u8; 6]) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.flags = flags;
        message.attributes = vec![
            LinkAttribute::IfName("eth0".to_owned()),
            LinkAttribute::Address(mac.to_vec()),
            LinkAttribute::Mtu(1450),
        ];
        message
    }

    #[test]
    fn links_with_a_mac_are_taken() {
        let mac = [2, 0, 0, 0, 0, 1];
        let expected = Link {
            index: 7,
            name: "eth0".to_owned(),
            mac,
            mtu: 1450,
        };
        assert_eq!(link(&message(LinkFlags::Up, mac)), Some(expected));
        assert_eq!(link(&message(LinkFlags::Loopback, mac)), None);
        assert_eq!(link(&message(LinkFlags::Up, [0; 6])), None);
    }

    #[test]
    fn routes_of_the_kernel_are_left_to_the_guests() {
        let names = HashMap::from([(7, "eth0")]);
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, 1].into())),
            RouteAttribute::Oif(7),
        ];
        let found = route(&message, &names).unwrap();
        assert_eq!(
            (found.destination.as_str(), found.gateway.as_str()),
            ("0.0.0.0/0", "10.0.0.1")
        );
        assert_eq!(found.device, "eth0");
        message.header.protocol = RouteProtocol::Kernel;
        assert_eq!(route(&message, &names), None);
    }
}
