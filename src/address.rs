//! One name for each address: an IPv4 address mapped into IPv6 (`::ffff:a.b.c.d`, RFC 4291) is the IPv4 address.
//!
//! Packets of IPv4 hosts are IPv4 packets, and sockets of both families write their addresses in the mapped form. A
//! rule or ban that kept it would be about nobody.

use std::net::{IpAddr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};

/// Bits before the IPv4 address.
const MAPPED_BITS: u8 = 96;

/// Done wherever an address comes in from outside.
pub(crate) trait Unmapped {
    /// The same in IPv4, if it is a mapped one.
    #[must_use]
    fn unmapped(self) -> Self;
}

impl Unmapped for IpAddr {
    fn unmapped(self) -> Self {
        self.to_canonical()
    }
}

impl Unmapped for SocketAddr {
    fn unmapped(self) -> Self {
        match self.ip().to_canonical() {
            IpAddr::V4(address) => Self::from((address, self.port())),
            IpAddr::V6(_) => self,
        }
    }
}

/// Without host bits. A prefix that holds other addresses than mapped ones stays what it is.
impl Unmapped for IpNet {
    fn unmapped(self) -> Self {
        let net = self.trunc();
        let mapped = match net {
            IpNet::V6(v6) => v6.addr().to_ipv4_mapped(),
            IpNet::V4(_) => None,
        };
        let shorter = net.prefix_len().checked_sub(MAPPED_BITS);
        match mapped.zip(shorter).map(|(address, length)| Ipv4Net::new(address, length)) {
            Some(Ok(v4)) => v4.into(),
            _ => net,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_prefixes_are_those_that_hold_mapped_addresses_only() {
        for (text, expected) in [
            ("::ffff:192.0.2.7/128", "192.0.2.7/32"),
            ("::ffff:c000:207/128", "192.0.2.7/32"),
            ("::ffff:192.0.2.7/120", "192.0.2.0/24"),
            ("::ffff:10.9.9.9/104", "10.0.0.0/8"),
            ("::ffff:0:0/97", "0.0.0.0/1"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            // Host bits go first: this is ::/95's upper neighbour, ::fffe:0:0/95, with other addresses in it.
            ("::ffff:0:0/95", "::fffe:0:0/95"),
            ("::ffff:192.0.2.7/64", "::/64"),
            ("::/0", "::/0"),
            // Neither compatible (RFC 4291, deprecated) nor translated (RFC 6052) addresses are mapped ones.
            ("::192.0.2.7/128", "::c000:207/128"),
            ("64:ff9b::192.0.2.7/128", "64:ff9b::c000:207/128"),
            ("::ffff:0:192.0.2.7/128", "::ffff:0:c000:207/128"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("10.9.9.9/8", "10.0.0.0/8"),
        ] {
            let net: IpNet = text.parse().unwrap();
            assert_eq!(net.unmapped().to_string(), expected, "{text}");
            assert_eq!(net.unmapped().unmapped(), net.unmapped(), "{text}");
        }
    }

    #[test]
    fn mapped_addresses_are_ipv4() {
        for (text, expected) in [
            ("[::ffff:192.0.2.7]:80", "192.0.2.7:80"),
            ("[::192.0.2.7]:80", "[::c000:207]:80"),
            ("[2001:db8::1]:80", "[2001:db8::1]:80"),
            ("192.0.2.7:80", "192.0.2.7:80"),
        ] {
            let (socket, wanted): (SocketAddr, SocketAddr) = (text.parse().unwrap(), expected.parse().unwrap());
            assert_eq!(socket.unmapped(), wanted);
            assert_eq!(socket.ip().unmapped(), wanted.ip());
        }
    }
}
