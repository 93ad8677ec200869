//! What a service is known by: [`ServiceAddr`].

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use crate::{Error, Result, address::Unmapped};

/// The transport protocols that are balanced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ServiceProtocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl ServiceProtocol {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp].into_iter().find(|protocol| *protocol as u8 == number)
    }
}

impl fmt::Display for ServiceProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Where clients find a service: protocol, virtual address, and one port or any. A service for one port goes before
/// one for any.
///
/// Written `tcp/192.0.2.1:80`, `udp/[2001:db8::1]:53`, `tcp/192.0.2.1:*`. An address mapped into IPv6 (`::ffff:192.0.2.1`) is
/// the IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceAddr {
    /// The protocol.
    pub protocol: ServiceProtocol,
    /// The virtual address.
    pub address: IpAddr,
    /// The port, from 1 on; `None` for any.
    pub port: Option<u16>,
}

impl ServiceAddr {
    /// A TCP service.
    #[must_use]
    pub fn tcp(address: impl Into<IpAddr>, port: u16) -> Self {
        Self { protocol: ServiceProtocol::Tcp, address: address.into().unmapped(), port: Some(port) }
    }

    /// A UDP service.
    #[must_use]
    pub fn udp(address: impl Into<IpAddr>, port: u16) -> Self {
        Self { protocol: ServiceProtocol::Udp, address: address.into().unmapped(), port: Some(port) }
    }

    /// The same for any port.
    #[must_use]
    pub fn any_port(self) -> Self {
        Self { port: None, ..self }
    }

    /// Refuses what no packet could or should be sent to.
    pub(crate) fn check(&self) -> Result<()> {
        if self.port == Some(0) {
            return Err(self.refuse("a port from 1 to 65535, or `*` for any"));
        }
        check_host("service", self.address)
    }

    fn refuse(&self, expected: &'static str) -> Error {
        Error::Invalid { what: "service", value: self.to_string(), expected }
    }
}

/// Refuses addresses that are not one host's.
pub(crate) fn check_host(what: &'static str, address: IpAddr) -> Result<()> {
    let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
    let local = matches!(address, IpAddr::V6(ip) if is_link_local(ip));
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast || local {
        let expected = "a unicast address: not unspecified, loopback, link-local IPv6 or multicast";
        return Err(Error::Invalid { what, value: address.to_string(), expected });
    }
    Ok(())
}

fn is_link_local(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xffc0 == 0xfe80
}

/// Its fields are public, so anything may stand there.
impl Unmapped for ServiceAddr {
    fn unmapped(self) -> Self {
        Self { address: self.address.unmapped(), ..self }
    }
}

impl fmt::Display for ServiceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(ip) => write!(f, "{}/{ip}:", self.protocol)?,
            IpAddr::V6(ip) => write!(f, "{}/[{ip}]:", self.protocol)?,
        }
        match self.port {
            Some(port) => write!(f, "{port}"),
            None => f.write_str("*"),
        }
    }
}

crate::text::serde_as_text!(ServiceAddr, "`tcp/ADDRESS:PORT` or `udp/ADDRESS:PORT`");

impl FromStr for ServiceAddr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (protocol, rest) = text.split_once('/')?;
            let protocol = match protocol {
                "tcp" => ServiceProtocol::Tcp,
                "udp" => ServiceProtocol::Udp,
                _ => return None,
            };
            let (address, port) = rest.rsplit_once(':')?;
            let address = match address.strip_prefix('[') {
                Some(rest) => IpAddr::V6(rest.strip_suffix(']')?.parse().ok()?),
                None => IpAddr::V4(address.parse().ok()?),
            };
            let port = match port {
                "*" => None,
                digits => Some(digits.parse().ok().filter(|port| *port != 0)?),
            };
            Some(Self { protocol, address: address.unmapped(), port })
        };
        parse().ok_or_else(|| Error::Invalid {
            what: "service",
            value: text.to_owned(),
            expected: "tcp/ADDRESS:PORT or udp/ADDRESS:PORT, with `*` for any port and IPv6 addresses in brackets",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_written_as_they_are_read() {
        for text in ["tcp/192.0.2.1:80", "udp/[2001:db8::1]:53", "tcp/192.0.2.1:*", "udp/[2001:db8::1]:*"] {
            let service: ServiceAddr = text.parse().unwrap();
            assert_eq!(service.to_string(), text);
            service.check().unwrap();
        }
        let mapped: ServiceAddr = "tcp/[::ffff:192.0.2.1]:80".parse().unwrap();
        assert_eq!(mapped.to_string(), "tcp/192.0.2.1:80");
        assert_eq!(mapped, ServiceAddr::tcp("::ffff:192.0.2.1".parse::<IpAddr>().unwrap(), 80));
        for text in
            ["192.0.2.1:80", "sctp/192.0.2.1:80", "tcp/192.0.2.1:0", "tcp/192.0.2.1", "tcp/2001:db8::1:80", "tcp/:80"]
        {
            let error = text.parse::<ServiceAddr>().unwrap_err().to_string();
            assert!(error.contains(&format!("service `{text}`")), "{error}");
        }
        for text in [
            "tcp/0.0.0.0:80",
            "tcp/127.0.0.1:80",
            "tcp/224.0.0.1:80",
            "tcp/255.255.255.255:80",
            "tcp/[::ffff:127.0.0.1]:80",
            "tcp/[fe80::1]:1",
        ] {
            assert!(text.parse::<ServiceAddr>().unwrap().check().is_err(), "{text}");
        }
    }
}
