//! What traffic a limit is about: [`Scope`].

use std::{fmt, str::FromStr};

use crate::{
    Error, Result,
    abi::rate_limiter::{HAS_PORT, IS_ECHO, IS_IP, IS_SYN, IS_TCP, IS_UDP, Scope as Encoded},
};

/// What traffic a limit is about. A packet is checked against every scope that it is in.
///
/// A fragment behind the first carries no ports, flags or ICMP type: it is in [`Scope::All`], [`Scope::Tcp`] and
/// [`Scope::Udp`], never in the others; without its first fragment, which is in them, it is of no use to anybody. ARP, and
/// neighbour discovery from the link, are in no scope (see `RateLimiterConfig::pass_neighbours`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// Every IP packet.
    All,
    /// TCP.
    Tcp,
    /// TCP segments with SYN and without ACK: attempts to connect.
    TcpSyn,
    /// UDP.
    Udp,
    /// TCP to this port; not 0.
    TcpPort(u16),
    /// UDP to this port; not 0.
    UdpPort(u16),
    /// Echo requests (ping): ICMP (RFC 792) and ICMPv6 (RFC 4443).
    IcmpEcho,
}

impl Scope {
    pub(super) fn encode(self) -> Result<Encoded> {
        let (needs, port) = match self {
            Self::All => (0, 0),
            Self::Tcp => (IS_TCP, 0),
            Self::TcpSyn => (IS_TCP | IS_SYN, 0),
            Self::Udp => (IS_UDP, 0),
            Self::TcpPort(port) => (IS_TCP | HAS_PORT, port),
            Self::UdpPort(port) => (IS_UDP | HAS_PORT, port),
            Self::IcmpEcho => (IS_ECHO, 0),
        };
        if needs & HAS_PORT != 0 && port == 0 {
            return Err(Error::Invalid { what: "scope", value: self.to_string(), expected: "a port of 1 to 65535" });
        }
        Ok(Encoded { needs: IS_IP | needs, reserved: 0, port })
    }

    /// `None` for one that is not used.
    pub(super) fn decode(encoded: Encoded) -> Option<Self> {
        let port = encoded.port;
        Some(match encoded.needs & !IS_IP {
            0 if encoded.needs == 0 => return None,
            0 => Self::All,
            needs if needs == IS_TCP | IS_SYN => Self::TcpSyn,
            needs if needs == IS_TCP | HAS_PORT => Self::TcpPort(port),
            needs if needs == IS_UDP | HAS_PORT => Self::UdpPort(port),
            IS_TCP => Self::Tcp,
            IS_UDP => Self::Udp,
            IS_ECHO => Self::IcmpEcho,
            _ => return None,
        })
    }
}

/// `all`, `tcp`, `tcp-syn`, `udp`, `icmp-echo`, `tcp-port=N`, `udp-port=N`.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Tcp => f.write_str("tcp"),
            Self::TcpSyn => f.write_str("tcp-syn"),
            Self::Udp => f.write_str("udp"),
            Self::TcpPort(port) => write!(f, "tcp-port={port}"),
            Self::UdpPort(port) => write!(f, "udp-port={port}"),
            Self::IcmpEcho => f.write_str("icmp-echo"),
        }
    }
}

impl FromStr for Scope {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let port = |digits: &str| digits.parse().ok().filter(|port| *port != 0);
        let scope = match text {
            "all" => Some(Self::All),
            "tcp" => Some(Self::Tcp),
            "tcp-syn" => Some(Self::TcpSyn),
            "udp" => Some(Self::Udp),
            "icmp-echo" => Some(Self::IcmpEcho),
            _ => match text.split_once('=') {
                Some(("tcp-port", digits)) => port(digits).map(Self::TcpPort),
                Some(("udp-port", digits)) => port(digits).map(Self::UdpPort),
                _ => None,
            },
        };
        scope.ok_or_else(|| Error::Invalid {
            what: "scope",
            value: text.to_owned(),
            expected: "all, tcp, tcp-syn, udp, icmp-echo, tcp-port=N or udp-port=N",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_round_trip() {
        for text in ["all", "tcp", "tcp-syn", "udp", "icmp-echo", "tcp-port=1", "udp-port=65535"] {
            let scope: Scope = text.parse().unwrap();
            assert_eq!(scope.to_string(), text);
            assert_eq!(Scope::decode(scope.encode().unwrap()), Some(scope));
        }
        for text in ["", "sctp", "tcp-port", "tcp-port=0", "udp-port=65536", "udp-port=x", "All"] {
            assert!(text.parse::<Scope>().unwrap_err().to_string().contains("tcp-port=N"), "{text}");
        }
        assert_eq!(Scope::decode(Encoded::default()), None);
        assert!(Scope::UdpPort(0).encode().is_err());
    }
}
