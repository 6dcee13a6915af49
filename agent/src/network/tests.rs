//! Parsers, and every attribute of a route.

use super::*;

fn links() -> Vec<Link> {
    vec![Link {
        index: 7,
        name: "eth0".to_owned(),
        mac_address: vec![2, 0, 0, 0, 0, 1],
        up: true,
        loopback: false,
    }]
}

#[test]
fn bad_words_are_named_by_their_field() {
    for (text, part) in [
        ("10.0.0.1", "no prefix length"),
        ("10.0.0.1/33", "bad prefix length"),
        ("::1/129", "bad prefix length"),
        ("x/1", "not an IP address"),
        ("default", "address family"),
    ] {
        let error = parse_prefix("f", text).unwrap_err().to_string();
        assert!(error.starts_with("f: ") && error.contains(part), "{error}");
    }
    for text in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:001",
        "0g:00:00:00:00:01",
    ] {
        assert!(parse_mac("f", text).is_err(), "{text:?}");
    }
}

#[test]
fn every_attribute_of_a_route_is_kept() {
    let route = Route {
        destination: "10.1.0.0/16".to_owned(),
        gateway: "169.254.1.1".to_owned(),
        device: "eth0".to_owned(),
        source: "10.88.0.5".to_owned(),
        scope: 253,
        metric: 100,
        mtu: 1400,
        flags: 4,
        table: 1000,
        route_type: 1,
        protocol: 3,
        ..Default::default()
    };
    let message = route_message(0, &route, &links()).unwrap();
    assert_eq!(message.header.scope, RouteScope::Link);
    assert_eq!(message.header.flags, RouteFlags::Onlink);
    assert_eq!(message.header.protocol, RouteProtocol::Boot);
    assert_eq!(message.header.destination_prefix_length, 16);
    for attribute in [
        RouteAttribute::Oif(7),
        RouteAttribute::Table(1000),
        RouteAttribute::Priority(100),
        RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]),
        RouteAttribute::Gateway(RouteAddress::Inet("169.254.1.1".parse().unwrap())),
        RouteAttribute::PrefSource(RouteAddress::Inet("10.88.0.5".parse().unwrap())),
        RouteAttribute::Destination(RouteAddress::Inet("10.1.0.0".parse().unwrap())),
    ] {
        assert!(message.attributes.contains(&attribute), "{attribute:?}");
    }
}

#[test]
fn defaults_of_a_route() {
    let route = Route {
        destination: "::/0".to_owned(),
        device: "eth0".to_owned(),
        ..Default::default()
    };
    let message = route_message(0, &route, &links()).unwrap();
    assert_eq!(message.header.kind, RouteType::Unicast);
    assert_eq!(message.header.protocol, RouteProtocol::Static);
    assert_eq!(message.header.table, RouteHeader::RT_TABLE_MAIN);
    assert_eq!(message.attributes, vec![RouteAttribute::Oif(7)]);
    let unknown = Route {
        device: "eth9".to_owned(),
        ..route
    };
    let error = route_message(3, &unknown, &links())
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("routes[3].device"), "{error}");
}
