//! What a rule is about: [`Selector`].

use std::{cmp::Reverse, fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::IpNet;

use super::list::parse_prefix;
use crate::{Error, Result, address::Unmapped as _};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The packets that a rule is about: those from a source prefix, perhaps only to a destination prefix, of an IP protocol,
/// to a range of ports. Host bits are cleared, IPv4 addresses mapped into IPv6 (`::ffff:192.0.2.7`) are the IPv4 addresses,
/// and a destination that holds every address is none, so that two selectors of the same packets are equal.
///
/// ```
/// # fn main() -> xdpkit::Result<()> {
/// use xdpkit::Selector;
///
/// let all: Selector = "203.0.113.0/24".parse()?;
/// let web: Selector = "203.0.113.0/24 to 198.51.100.7 tcp/80-443".parse()?;
/// assert_eq!(web, all.to("198.51.100.7/32".parse().unwrap())?.protocol(6)?.ports(80..=443)?);
/// assert_eq!(web.to_string(), "203.0.113.0/24 to 198.51.100.7/32 tcp/80-443");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Selector {
    source: IpNet,
    destination: Option<IpNet>,
    protocol: Option<u8>,
    ports: Option<(u16, u16)>,
}

impl Selector {
    /// All packets from a prefix.
    #[must_use]
    pub fn new(source: IpNet) -> Self {
        Self { source: source.unmapped(), destination: None, protocol: None, ports: None }
    }

    /// Of these, the ones to another prefix.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is of the other family.
    pub fn to(mut self, destination: IpNet) -> Result<Self> {
        let destination = destination.unmapped();
        if destination.addr().is_ipv4() != self.source.addr().is_ipv4() {
            return Err(invalid("destination", destination, "a prefix of the source's family"));
        }
        self.destination = Some(destination).filter(|net| net.prefix_len() > 0);
        Ok(self)
    }

    /// Of these, the ones of an IP protocol, by its IANA number: the one behind IPv6 extension headers.
    ///
    /// # Errors
    /// [`Error::Invalid`] when ports are selected and the protocol is neither TCP nor UDP.
    pub fn protocol(mut self, protocol: u8) -> Result<Self> {
        if self.ports.is_some() && !has_ports(protocol) {
            return Err(invalid("protocol", protocol, "6 (TCP) or 17 (UDP), since ports are selected"));
        }
        self.protocol = Some(protocol);
        Ok(self)
    }

    /// Of these, the ones to a destination port in a range. Fragments behind the first have no ports, and are not
    /// among them.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the protocol was not set to TCP or UDP before, or the range is empty.
    pub fn ports(mut self, ports: RangeInclusive<u16>) -> Result<Self> {
        if !self.protocol.is_some_and(has_ports) {
            return Err(invalid("ports", PortRange(ports.into_inner()), "protocol 6 (TCP) or 17 (UDP) with them"));
        }
        if ports.is_empty() {
            return Err(invalid("ports", PortRange(ports.into_inner()), "a range that is not empty"));
        }
        self.ports = Some(ports.into_inner());
        Ok(self)
    }

    /// The source prefix.
    #[must_use]
    pub fn source(&self) -> IpNet {
        self.source
    }

    /// The destination prefix, if not all.
    #[must_use]
    pub fn destination(&self) -> Option<IpNet> {
        self.destination
    }

    /// The protocol, if not all.
    #[must_use]
    pub fn ip_protocol(&self) -> Option<u8> {
        self.protocol
    }

    /// The destination ports, if not all.
    #[must_use]
    pub fn port_range(&self) -> Option<RangeInclusive<u16>> {
        self.ports.map(|(first, last)| first..=last)
    }

    /// Whether this is about a packet; `port` is that of the destination, where there is one.
    #[must_use]
    pub fn matches(&self, source: IpAddr, destination: IpAddr, protocol: u8, port: Option<u16>) -> bool {
        self.source.contains(&source.unmapped())
            && self.destination.is_none_or(|net| net.contains(&destination.unmapped()))
            && self.protocol.is_none_or(|wanted| wanted == protocol)
            && self.ports.is_none_or(|(first, last)| port.is_some_and(|port| (first..=last).contains(&port)))
    }

    pub(super) fn is_qualified(&self) -> bool {
        self.destination.is_some() || self.protocol.is_some()
    }

    /// Sorts rules of one source prefix in the order in which they are asked.
    pub(super) fn rank(&self) -> impl Ord + use<> {
        let class = match (self.ports, self.protocol) {
            (Some(_), _) => 0_u8,
            (None, Some(_)) => 1,
            (None, None) => 2,
        };
        let length = self.destination.map_or(0, |net| net.prefix_len());
        let width = self.ports.map(|(first, last)| last - first);
        (Reverse(length), self.destination, class, width, self.ports, self.protocol)
    }
}

impl From<IpNet> for Selector {
    fn from(source: IpNet) -> Self {
        Self::new(source)
    }
}

impl From<IpAddr> for Selector {
    fn from(source: IpAddr) -> Self {
        Self::new(source.into())
    }
}

crate::text::serde_as_text!(Selector, "`CIDR [to CIDR] [PROTOCOL[/PORT[-PORT]]]`");

fn has_ports(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP
}

fn invalid(what: &'static str, value: impl fmt::Display, expected: &'static str) -> Error {
    Error::Invalid { what, value: value.to_string(), expected }
}

struct PortRange((u16, u16));

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = self.0;
        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
    }
}

/// Protocols that are written by name.
const PROTOCOLS: [(&str, u8); 4] = [("icmp", 1), ("tcp", TCP), ("udp", UDP), ("icmpv6", 58)];

/// `SOURCE [to DESTINATION] [PROTOCOL[/PORT[-PORT]]]`, with protocols by name (`icmp`, `tcp`, `udp`, `icmpv6`) or number.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        if let Some(destination) = self.destination {
            write!(f, " to {destination}")?;
        }
        if let Some(protocol) = self.protocol {
            match PROTOCOLS.iter().find(|(_, number)| *number == protocol) {
                Some((name, _)) => write!(f, " {name}")?,
                None => write!(f, " {protocol}")?,
            }
        }
        self.ports.map_or(Ok(()), |ports| write!(f, "/{}", PortRange(ports)))
    }
}

/// As it is displayed; an address without a length is one host.
impl FromStr for Selector {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const EXPECTED: &str = "CIDR [to CIDR] [PROTOCOL[/PORT[-PORT]]]";
        let wrong = || invalid("selector", text, EXPECTED);
        let prefix = |word: Option<&str>| word.and_then(parse_prefix).ok_or_else(wrong);
        let mut words = text.split_whitespace().peekable();
        let mut selector = Self::new(prefix(words.next())?);
        if words.next_if_eq(&"to").is_some() {
            selector = selector.to(prefix(words.next())?)?;
        }
        if let Some(word) = words.next() {
            let (name, ports) = word.split_once('/').map_or((word, None), |(name, ports)| (name, Some(ports)));
            let by_name = PROTOCOLS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
            let protocol = by_name.or_else(|| name.parse().ok()).ok_or_else(wrong)?;
            selector = selector.protocol(protocol)?;
            if let Some(ports) = ports {
                let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
                let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
                selector = selector.ports(port(first)?..=port(last)?)?;
            }
        }
        if words.next().is_some() { Err(wrong()) } else { Ok(selector) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_written_and_read_alike() {
        for (text, canonical) in [
            ("10.9.9.9/8", "10.0.0.0/8"),
            ("192.0.2.7", "192.0.2.7/32"),
            ("10.0.0.0/8 to 0.0.0.0/0", "10.0.0.0/8"),
            ("2001:db8::/32 to ::1 udp/53", "2001:db8::/32 to ::1/128 udp/53"),
            ("10.0.0.0/8 47", "10.0.0.0/8 47"),
            ("::ffff:192.0.2.7", "192.0.2.7/32"),
            ("::ffff:10.1.2.3/104 to ::ffff:192.0.2.0/120 tcp/80", "10.0.0.0/8 to 192.0.2.0/24 tcp/80"),
            ("10.0.0.0/8 to ::ffff:0:0/96", "10.0.0.0/8"),
            ("::ffff:0:0/95", "::fffe:0:0/95"),
            ("10.0.0.0/8 to 10.1.2.3/16 tcp/80-443", "10.0.0.0/8 to 10.1.0.0/16 tcp/80-443"),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.to_string(), canonical);
            assert_eq!(canonical.parse::<Selector>().unwrap(), selector);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (text, message) in [
            ("", "selector ``: expected CIDR [to CIDR] [PROTOCOL[/PORT[-PORT]]]"),
            ("10.0.0.0/33", "selector `10.0.0.0/33`: expected CIDR [to CIDR] [PROTOCOL[/PORT[-PORT]]]"),
            ("10.0.0.0/8 tcp udp", "selector `10.0.0.0/8 tcp udp`: expected CIDR [to CIDR] [PROTOCOL[/PORT[-PORT]]]"),
            ("10.0.0.0/8 to ::/0", "destination `::/0`: expected a prefix of the source's family"),
            ("10.0.0.0/8 icmp/80", "ports `80`: expected protocol 6 (TCP) or 17 (UDP) with them"),
            ("10.0.0.0/8 tcp/443-80", "ports `443-80`: expected a range that is not empty"),
        ] {
            assert_eq!(text.parse::<Selector>().unwrap_err().to_string(), message);
        }
    }
}
