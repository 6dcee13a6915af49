//! Interfaces, addresses, routes and neighbours of the pod, by rtnetlink (rtnetlink(7)).
//!
//! The pod's network namespace is the guest's own. An interface is found by its MAC address, which
//! the host knows from CNI. Everything is idempotent: a request may be repeated after it failed
//! half-way.
//!
//! One blocking socket a request and one message at a time: a pod has few interfaces, and the
//! kernel answers at once. Limits: [`ANSWER_BYTES_MAX`] an answer, [`LINKS_MAX`] interfaces.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
        RouteProtocol, RouteScope, RouteType, RouteVia,
    },
};
use nix::sys::socket::{
    AddressFamily as SocketFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind,
    recv, send, socket,
};
use pericarp_protocol::guest::{Interface, Neighbour, Route};

/// Largest datagram of an answer in bytes: the kernel makes them no larger than 32 KiB
/// (netlink(7)).
const ANSWER_BYTES_MAX: usize = 32 << 10;

/// Interfaces of one pod.
const LINKS_MAX: usize = 1024;

/// Longest name of an interface in bytes (`IFNAMSIZ` less its NUL).
const NAME_BYTES_MAX: usize = 15;

/// Why the network cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// The request is invalid.
    #[error("{field}: {reason}")]
    Invalid {
        /// Of the request.
        field: String,
        /// The reason.
        reason: String,
    },
    /// No such interface in the guest.
    #[error("no interface with {0} in the guest")]
    NoInterface(String),
    /// The kernel refused.
    #[error("cannot {action} {object}")]
    Kernel {
        /// The action that failed.
        action: &'static str,
        /// On what.
        object: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

/// Applies interfaces, then routes, then neighbours.
pub(crate) fn apply(
    interfaces: &[Interface],
    routes: &[Route],
    neighbours: &[Neighbour],
) -> Result<(), NetworkError> {
    let mut kernel = Kernel::new()?;
    kernel.bring_loopback_up()?;
    for (index, interface) in interfaces.iter().enumerate() {
        kernel.configure(index, interface)?;
    }
    let links = kernel.links()?;
    // Routes through a gateway need the one that reaches it, so those on link come first.
    let (on_link, by_gateway): (Vec<_>, Vec<_>) = routes
        .iter()
        .enumerate()
        .partition(|(_, route)| route.gateway.is_empty());
    for (index, route) in on_link.into_iter().chain(by_gateway) {
        kernel.add_route(index, route, &links)?;
    }
    for (index, neighbour) in neighbours.iter().enumerate() {
        kernel.add_neighbour(index, neighbour, &links)?;
    }
    Ok(())
}

/// Takes neighbours, then routes, then addresses and interfaces away. What is not there is no
/// error.
pub(crate) fn take_away(
    interfaces: &[Interface],
    routes: &[Route],
    neighbours: &[Neighbour],
) -> Result<(), NetworkError> {
    if interfaces.is_empty() && routes.is_empty() && neighbours.is_empty() {
        return Ok(());
    }
    let mut kernel = Kernel::new()?;
    let links = kernel.links()?;
    let is_there = |device: &str| links.iter().any(|link| link.name == device);
    for (index, neighbour) in neighbours.iter().enumerate() {
        if is_there(&neighbour.device) {
            let message = neighbour_message(index, neighbour, &links)?;
            let request = RouteNetlinkMessage::DelNeighbour(message);
            kernel.delete(request, "neighbour", &neighbour.address)?;
        }
    }
    for (index, route) in routes.iter().enumerate() {
        if route.device.is_empty() || is_there(&route.device) {
            let request = RouteNetlinkMessage::DelRoute(route_message(index, route, &links)?);
            kernel.delete(request, "route", &route.destination)?;
        }
    }
    for (index, interface) in interfaces.iter().enumerate() {
        kernel.strip(index, interface, &links)?;
    }
    Ok(())
}

/// An interface of the guest.
#[derive(Debug, Clone)]
struct Link {
    index: u32,
    name: String,
    mac_address: Vec<u8>,
    up: bool,
    loopback: bool,
}

/// A conversation with the kernel.
#[derive(Debug)]
struct Kernel {
    socket: OwnedFd,
    sequence: u32,
}

impl Kernel {
    fn new() -> Result<Self, NetworkError> {
        let make = || -> nix::Result<OwnedFd> {
            let fd = socket(
                SocketFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkRoute,
            )?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
            Ok(fd)
        };
        let socket = make().map_err(|error| NetworkError::Kernel {
            action: "open",
            object: "a netlink socket".to_owned(),
            source: error.into(),
        })?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    fn bring_loopback_up(&mut self) -> Result<(), NetworkError> {
        for link in self.links()? {
            if link.loopback && !link.up {
                self.set_link(&link, |message| {
                    message.header.flags = LinkFlags::Up;
                    message.header.change_mask = LinkFlags::Up;
                })?;
            }
        }
        Ok(())
    }

    fn configure(&mut self, index: usize, wanted: &Interface) -> Result<(), NetworkError> {
        let field = |name: &str| format!("interfaces[{index}].{name}");
        let links = self.links()?;
        let link = find_link(&links, wanted, &field)?.clone();
        if wanted.name.is_empty() || wanted.name.len() > NAME_BYTES_MAX {
            return Err(NetworkError::Invalid {
                field: field("name"),
                reason: format!(
                    "{:?} does not have 1 to {NAME_BYTES_MAX} bytes",
                    wanted.name
                ),
            });
        }
        if link.name != wanted.name {
            self.make_room_for_name(&links, &wanted.name)?;
            // An interface is renamed while it is down.
            self.set_link(&link, |message| {
                message.header.change_mask = LinkFlags::Up;
                message
                    .attributes
                    .push(LinkAttribute::IfName(wanted.name.clone()));
            })?;
        }
        if wanted.mtu != 0 {
            self.set_link(&link, |message| {
                message.attributes.push(LinkAttribute::Mtu(wanted.mtu));
            })?;
        }
        // Down again, an interface loses its IPv6 addresses, so up comes first.
        self.set_link(&link, |message| {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        })?;
        for (position, address) in wanted.addresses.iter().enumerate() {
            let field = field(&format!("addresses[{position}]"));
            let (address, prefix) = parse_prefix(&field, address)?;
            self.add_address(&link, &wanted.name, address, prefix)?;
        }
        Ok(())
    }

    /// Two interfaces may swap names: the one in the way gets a name that nobody asks for.
    fn make_room_for_name(&mut self, links: &[Link], name: &str) -> Result<(), NetworkError> {
        let Some(other) = links.iter().find(|link| link.name == name) else {
            return Ok(());
        };
        let spare = format!("spare{}", other.index);
        self.set_link(other, |message| {
            message.header.change_mask = LinkFlags::Up;
            message.attributes.push(LinkAttribute::IfName(spare));
        })
    }

    fn links(&mut self) -> Result<Vec<Link>, NetworkError> {
        let mut links = Vec::new();
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.exchange(request, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewLink(message) = answer
                && links.len() < LINKS_MAX
            {
                links.push(link_of(message));
            }
        })
        .map_err(kernel("list", "the interfaces"))?;
        Ok(links)
    }

    fn set_link(
        &mut self,
        link: &Link,
        change: impl FnOnce(&mut LinkMessage),
    ) -> Result<(), NetworkError> {
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        change(&mut message);
        self.exchange(RouteNetlinkMessage::SetLink(message), NLM_F_ACK, |_| ())
            .map_err(kernel("change", &link.name))
    }

    /// Takes the addresses that `unwanted` names away, or all of them and the link itself.
    fn strip(
        &mut self,
        index: usize,
        unwanted: &Interface,
        links: &[Link],
    ) -> Result<(), NetworkError> {
        let field = |name: &str| format!("removed_interfaces[{index}].{name}");
        let link = match find_link(links, unwanted, &field) {
            Ok(link) => link,
            Err(NetworkError::NoInterface(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut messages = Vec::new();
        for (position, address) in unwanted.addresses.iter().enumerate() {
            let field = field(&format!("addresses[{position}]"));
            let (address, prefix) = parse_prefix(&field, address)?;
            messages.push(address_message(link, address, prefix));
        }
        if unwanted.addresses.is_empty() {
            self.exchange(
                RouteNetlinkMessage::GetAddress(AddressMessage::default()),
                NLM_F_DUMP,
                |answer| match answer {
                    RouteNetlinkMessage::NewAddress(message)
                        if message.header.index == link.index =>
                    {
                        messages.push(message);
                    }
                    _ => {}
                },
            )
            .map_err(kernel("list", "the addresses"))?;
        }
        for message in messages {
            let request = RouteNetlinkMessage::DelAddress(message);
            self.delete(request, "an address of", &link.name)?;
        }
        if unwanted.addresses.is_empty() {
            self.set_link(link, |message| {
                message.header.change_mask = LinkFlags::Up;
            })?;
        }
        Ok(())
    }

    /// Deletes something that may be gone already.
    fn delete(
        &mut self,
        request: RouteNetlinkMessage,
        what: &str,
        object: &str,
    ) -> Result<(), NetworkError> {
        // Of addresses, of routes, of neighbours: the kernel has a word for each.
        const GONE: [i32; 3] = [libc::EADDRNOTAVAIL, libc::ESRCH, libc::ENOENT];
        match self.exchange(request, NLM_F_ACK, |_| ()) {
            Err(error)
                if error
                    .raw_os_error()
                    .is_some_and(|code| GONE.contains(&code)) =>
            {
                Ok(())
            }
            other => other.map_err(kernel("take away", &format!("{what} {object}"))),
        }
    }

    fn add_address(
        &mut self,
        link: &Link,
        name: &str,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), NetworkError> {
        let mut message = address_message(link, address, prefix);
        match address {
            IpAddr::V4(address) => {
                if prefix < 31 {
                    let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
                    let broadcast = Ipv4Addr::from_bits(address.to_bits() | host_bits);
                    message
                        .attributes
                        .push(AddressAttribute::Broadcast(broadcast));
                }
            }
            IpAddr::V6(_) => {
                // CNI chose the address, and a tentative one cannot be bound to.
                message.header.flags = AddressHeaderFlags::Nodad;
                message
                    .attributes
                    .push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.exchange(RouteNetlinkMessage::NewAddress(message), flags, |_| ())
            .map_err(kernel(
                "add an address to",
                &format!("{name}: {address}/{prefix}"),
            ))
    }

    fn add_route(
        &mut self,
        index: usize,
        route: &Route,
        links: &[Link],
    ) -> Result<(), NetworkError> {
        let message = route_message(index, route, links)?;
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let object = format!(
            "{} via {:?} dev {}",
            route.destination, route.gateway, route.device
        );
        self.exchange(RouteNetlinkMessage::NewRoute(message), flags, |_| ())
            .map_err(kernel("add route", &object))
    }

    fn add_neighbour(
        &mut self,
        index: usize,
        neighbour: &Neighbour,
        links: &[Link],
    ) -> Result<(), NetworkError> {
        let message = neighbour_message(index, neighbour, links)?;
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.exchange(RouteNetlinkMessage::NewNeighbour(message), flags, |_| ())
            .map_err(kernel("add neighbour", &neighbour.address))
    }

    /// Sends a request and hears every answer to it.
    fn exchange(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
        mut hear: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;

        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        // The kernel ends every exchange by an acknowledgement or the end of the dump.
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                let size = usize::try_from(answer.header.length).map_err(io::Error::other)?;
                // Messages are aligned to four bytes (netlink(7)).
                rest = rest
                    .get(size.next_multiple_of(4).max(4)..)
                    .unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(()),
                            Some(_) => Err(error.to_io()),
                        };
                    }
                    NetlinkPayload::InnerMessage(answer) => hear(answer),
                    _ => {}
                }
            }
        }
    }
}

fn kernel<'a>(
    action: &'static str,
    object: &'a str,
) -> impl FnOnce(io::Error) -> NetworkError + 'a {
    move |source| NetworkError::Kernel {
        action,
        object: object.to_owned(),
        source,
    }
}

fn link_of(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac_address: Vec::new(),
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(address) => link.mac_address = address,
            _ => {}
        }
    }
    link
}

fn find_link<'a>(
    links: &'a [Link],
    wanted: &Interface,
    field: &impl Fn(&str) -> String,
) -> Result<&'a Link, NetworkError> {
    if wanted.loopback {
        return links
            .iter()
            .find(|link| link.loopback)
            .ok_or_else(|| NetworkError::NoInterface("the loopback flag".to_owned()));
    }
    let mac_address = parse_mac(&field("mac_address"), &wanted.mac_address)?;
    links
        .iter()
        .find(|link| link.mac_address == mac_address && !link.loopback)
        .ok_or_else(|| NetworkError::NoInterface(format!("MAC address {}", wanted.mac_address)))
}

fn device_index(field: &str, name: &str, links: &[Link]) -> Result<u32, NetworkError> {
    links
        .iter()
        .find(|link| link.name == name)
        .map(|link| link.index)
        .ok_or_else(|| NetworkError::Invalid {
            field: field.to_owned(),
            reason: format!("there is no interface {name:?} in the guest"),
        })
}

fn address_message(link: &Link, address: IpAddr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = link.index;
    message.header.prefix_len = prefix;
    message.header.family = family(address);
    message.attributes.push(AddressAttribute::Address(address));
    message.attributes.push(AddressAttribute::Local(address));
    message
}

fn neighbour_message(
    index: usize,
    neighbour: &Neighbour,
    links: &[Link],
) -> Result<NeighbourMessage, NetworkError> {
    let field = |name: &str| format!("neighbours[{index}].{name}");
    let address = parse_address(&field("address"), &neighbour.address)?;
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = device_index(&field("device"), &neighbour.device, links)?;
    message.header.state = match u16::try_from(neighbour.state) {
        Ok(0) => NeighbourState::Permanent,
        Ok(state) => NeighbourState::from(state),
        Err(_) => {
            return Err(NetworkError::Invalid {
                field: field("state"),
                reason: format!("{} is not a NUD_* number", neighbour.state),
            });
        }
    };
    let destination = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message
        .attributes
        .push(NeighbourAttribute::Destination(destination));
    let mac_address = parse_mac(&field("mac_address"), &neighbour.mac_address)?;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac_address));
    Ok(message)
}

/// The rtnetlink message of a route. Pure, so that every attribute is tested without a kernel.
fn route_message(
    index: usize,
    route: &Route,
    links: &[Link],
) -> Result<RouteMessage, NetworkError> {
    let field = |name: &str| format!("routes[{index}].{name}");
    let small = |name: &str, value: u32| {
        u8::try_from(value).map_err(|_| NetworkError::Invalid {
            field: field(name),
            reason: format!("{value} is more than 255"),
        })
    };
    let (destination, prefix) = parse_prefix(&field("destination"), &route.destination)?;
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination);
    message.header.destination_prefix_length = prefix;
    message.header.scope = RouteScope::from(small("scope", route.scope)?);
    message.header.kind = match small("route_type", route.route_type)? {
        0 => RouteType::Unicast,
        kind => RouteType::from(kind),
    };
    message.header.protocol = match small("protocol", route.protocol)? {
        0 => RouteProtocol::Static,
        protocol => RouteProtocol::from(protocol),
    };
    message.header.flags = RouteFlags::from_bits_retain(route.flags);
    match route.table {
        0 => message.header.table = RouteHeader::RT_TABLE_MAIN,
        table => match u8::try_from(table) {
            Ok(table) => message.header.table = table,
            Err(_) => message.attributes.push(RouteAttribute::Table(table)),
        },
    }
    if prefix != 0 {
        message
            .attributes
            .push(RouteAttribute::Destination(RouteAddress::from(destination)));
    }
    if !route.device.is_empty() {
        let index = device_index(&field("device"), &route.device, links)?;
        message.attributes.push(RouteAttribute::Oif(index));
    }
    if !route.gateway.is_empty() {
        let gateway = parse_address(&field("gateway"), &route.gateway)?;
        message.attributes.push(match (destination, gateway) {
            // An IPv4 route by an IPv6 gateway, as some CNIs make them (RFC 5549).
            (IpAddr::V4(_), IpAddr::V6(gateway)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
            _ => RouteAttribute::Gateway(RouteAddress::from(gateway)),
        });
    }
    if !route.source.is_empty() {
        let source = parse_address(&field("source"), &route.source)?;
        message
            .attributes
            .push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    if route.metric != 0 {
        message
            .attributes
            .push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu != 0 {
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(message)
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn parse_address(field: &str, text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Invalid {
        field: field.to_owned(),
        reason: format!("{text:?} is not an IP address"),
    })
}

fn parse_prefix(field: &str, text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let invalid = |reason: &str| NetworkError::Invalid {
        field: field.to_owned(),
        reason: format!("{text:?} {reason}"),
    };
    if text == "default" {
        return Err(invalid("names no address family; use 0.0.0.0/0 or ::/0"));
    }
    let (address, prefix) = text
        .split_once('/')
        .ok_or_else(|| invalid("has no prefix length"))?;
    let address = parse_address(field, address)?;
    let bits = if address.is_ipv4() {
        Ipv4Addr::BITS
    } else {
        Ipv6Addr::BITS
    };
    let prefix: u8 = prefix
        .parse()
        .ok()
        .filter(|prefix| u32::from(*prefix) <= bits)
        .ok_or_else(|| invalid("has a bad prefix length"))?;
    Ok((address, prefix))
}

fn parse_mac(field: &str, text: &str) -> Result<Vec<u8>, NetworkError> {
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|octet| {
            u8::from_str_radix(octet, 16)
                .ok()
                .filter(|_| octet.len() == 2)
        })
        .collect();
    octets
        .filter(|octets| octets.len() == 6)
        .ok_or_else(|| NetworkError::Invalid {
            field: field.to_owned(),
            reason: format!("{text:?} is not a MAC address"),
        })
}

#[cfg(test)]
mod tests;
