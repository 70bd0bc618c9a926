//! Which IP addresses are the open internet, and what of a URL may be shown: one answer each for every room that
//! dials where a stranger says. It resolves and dials nothing; whether the others may be used is decided by the caller.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A URL as it may be shown: what stands before an `@` may be a password.
pub fn without_user(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => {
            let (head, tail) = (text.get(..scheme + 3), text.get(at..));
            format!("{}…{}", head.unwrap_or_default(), tail.unwrap_or_default())
        }
        // `user:password@host:path`, as ssh writes it.
        (None, Some(at)) if text.get(..at).is_some_and(|user| user.contains(':')) => {
            format!("…{}", text.get(at..).unwrap_or_default())
        }
        _ => text.to_owned(),
    }
}

/// Whether this is a public unicast address, by the special-purpose registries of RFC 6890. An IPv6 address
/// that a mapping or a NAT64 gateway turns into an IPv4 one is judged as that one. 6to4 and Teredo are never
/// public: nobody serves there any more, and both wrap an address of somebody else's choosing.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    match ip.octets() {
        // This network, private, loopback.
        [0 | 10 | 127, ..] => false,
        // Carrier-grade NAT; one cloud's metadata service stands there, too.
        [100, 64..=127, ..] => false,
        // Link-local, with most clouds' metadata service.
        [169, 254, ..] => false,
        // The inside of one cloud under an address that is public by the registry: metadata and DNS.
        [168, 63, 129, 16] => false,
        [172, 16..=31, ..] => false,
        // Protocol assignments and documentation.
        [192, 0, 0 | 2, _] => false,
        // 6to4 relays, long gone.
        [192, 88, 99, _] => false,
        [192, 168, ..] => false,
        // Benchmarking.
        [198, 18..=19, ..] => false,
        // Documentation.
        [198, 51, 100, _] | [203, 0, 113, _] => false,
        // Multicast, reserved, broadcast.
        [224..=255, ..] => false,
        _ => true,
    }
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    match ip.segments() {
        // NAT64's well-known prefix: what a name resolves to on an IPv6-only host.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
            is_public_v4(Ipv4Addr::new(a, b, c, d))
        }
        // Protocol assignments: Teredo, benchmarking, ORCHID and the like.
        [0x2001, 0..=0x01ff, ..] => false,
        // Documentation.
        [0x2001, 0x0db8, ..] | [0x3fff, 0..=0x0fff, ..] => false,
        // 6to4.
        [0x2002, ..] => false,
        // Only 2000::/3 is given out for the internet. Left out with the rest: loopback, IPv4-compatible, NAT64
        // for local use, unique local, link-local, site-local, multicast.
        [0x2000..=0x3fff, ..] => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLIC: &[&str] = &[
        "1.1.1.1",
        "8.8.8.8",
        "93.184.216.34",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.1",
        "126.255.255.255",
        "128.0.0.1",
        "168.63.129.15",
        "169.253.255.255",
        "172.15.255.255",
        "172.32.0.1",
        "192.0.1.1",
        "192.167.255.255",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2001:200::1",
        "2001:4860:4860::8888",
        "2606:4700::1111",
        "2a00:1450::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ];

    const SPECIAL: &[(&str, &[&str])] = &[
        ("unspecified and this network", &["0.0.0.0", "0.1.2.3", "::"]),
        ("loopback", &["127.0.0.1", "127.9.9.9", "::1"]),
        ("private", &["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"]),
        ("carrier-grade NAT", &["100.64.0.1", "100.127.255.255"]),
        ("link-local", &["169.254.0.1", "fe80::1", "febf::1"]),
        (
            "metadata",
            &["169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"],
        ),
        ("protocol assignments", &["192.0.0.8", "2001:1::1", "2001:1ff::1"]),
        ("documentation", &["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff:fff::1"]),
        ("benchmarking", &["198.18.0.1", "198.19.255.255", "2001:2::1"]),
        ("multicast", &["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"]),
        ("reserved and broadcast", &["240.0.0.1", "255.255.255.255", "4000::1", "100::1"]),
        ("unique local and site-local", &["fc00::1", "fd12:3456::1", "fec0::1"]),
        ("IPv4-mapped", &["::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"]),
        ("IPv4-compatible", &["::127.0.0.1", "::10.0.0.1", "::8.8.8.8"]),
        ("NAT64", &["64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::8.8.8.8", "64:ff9b::1:808:808"]),
        ("6to4", &["192.88.99.1", "2002:7f00:1::", "2002:808:808::1"]),
        ("Teredo", &["2001::1", "2001:0:7f00:1::"]),
    ];

    #[test]
    fn the_open_internet_is_public_up_to_its_borders() {
        for ip in PUBLIC {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn no_special_range_is_public_in_any_wrapping() {
        for (range, ips) in SPECIAL {
            for ip in *ips {
                assert!(!is_public(ip.parse().unwrap()), "{range}: {ip}");
            }
        }
    }
}
