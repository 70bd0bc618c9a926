//! Which addresses are the open internet. One question, no look-ups; who may talk to the others is decided
//! by the caller.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether this address is reachable as a public unicast address: not loopback, private, link-local,
/// carrier-grade NAT, multicast, documentation, benchmark or reserved, in IPv4, IPv6 or one inside the other.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    !(a == 0
        || a >= 224
        || ip.is_loopback()
        || ip.is_private()
        || ip.is_link_local()
        || ip.is_documentation()
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b == 18 || b == 19)))
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let [s0, s1, s2, ..] = ip.segments();
    let embedded = |hi: u16, lo: u16| {
        let ([a, b], [c, d]) = (hi.to_be_bytes(), lo.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    // NAT64's well-known prefix carries an IPv4 address in its last 32 bits.
    if let [0x64, 0xff9b, 0, 0, 0, 0, hi, lo] = ip.segments() {
        return embedded(hi, lo);
    }
    match (s0, s1) {
        // 6to4 carries one behind the first 16 bits.
        (0x2002, hi) => embedded(hi, s2),
        // Teredo, benchmarking, ORCHID and documentation live in 2001::/23 and 2001:db8::/32.
        (0x2001, second) if second < 0x200 || second == 0x0db8 => false,
        (0x3fff, second) if second < 0x1000 => false,
        _ => (0x2000..0x4000).contains(&s0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_open_internet_is_public() {
        for ip in
            ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
        {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn everything_that_may_be_the_inside_is_not() {
        for ip in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.9.9.9",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.0.8",
            "192.0.2.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "2002:7f00:1::",
            "2002:a00:1::",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "::127.0.0.1",
            "100::1",
            "3fff::1",
        ] {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
    }
}
