//! What a health check does, and how its probes add up.

use std::{fmt, net::SocketAddr, time::Duration};

use crate::{Error, Result};

/// The time when a probe ends can be told.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Whether a backend answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Health {
    /// Too few probes so far.
    #[default]
    Unknown,
    /// It answers.
    Up,
    /// It does not.
    Down,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// What a probe asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Probe {
    /// A TCP connection is accepted.
    Tcp,
    /// `GET` of a path is answered with a status of 200 to 399 (RFC 9110).
    Http {
        /// The path, with a leading slash.
        path: String,
        /// The `Host` header; the target by default.
        host: Option<String>,
    },
}

/// How a backend is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthCheck {
    /// Whom to connect to. An address mapped into IPv6 is the IPv4 address, here and in `source`.
    pub target: SocketAddr,
    /// What to ask for.
    pub probe: Probe,
    /// From the end of a probe to the next one; 2 s by default.
    pub interval: Duration,
    /// For a whole probe; 1 s by default, at most a day.
    pub timeout: Duration,
    /// Probes in a row that have to succeed before a backend that was down is up; 2 by default. At the beginning, one
    /// is enough.
    pub rise: u32,
    /// Probes in a row that have to fail before a backend is down; 3 by default.
    pub fall: u32,
    /// Address and port to connect from; any by default. Port 0: any port.
    pub source: Option<SocketAddr>,
    /// The firewall mark of the probe's packets (`SO_MARK`, needs `CAP_NET_ADMIN`), for routing by policy; none by
    /// default.
    pub mark: Option<u32>,
}

impl HealthCheck {
    /// Connects by TCP.
    #[must_use]
    pub fn tcp(target: SocketAddr) -> Self {
        Self {
            target,
            probe: Probe::Tcp,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
            source: None,
            mark: None,
        }
    }

    /// Asks for a page by HTTP/1.1.
    #[must_use]
    pub fn http(target: SocketAddr, path: impl Into<String>) -> Self {
        Self { probe: Probe::Http { path: path.into(), host: None }, ..Self::tcp(target) }
    }

    /// Sets the `Host` header of HTTP probes; for others, nothing.
    #[must_use]
    pub fn host(mut self, name: impl Into<String>) -> Self {
        if let Probe::Http { host, .. } = &mut self.probe {
            *host = Some(name.into());
        }
        self
    }

    /// Sets [`HealthCheck::interval`].
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Sets [`HealthCheck::timeout`].
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets [`HealthCheck::rise`] and [`HealthCheck::fall`].
    #[must_use]
    pub fn thresholds(mut self, rise: u32, fall: u32) -> Self {
        self.rise = rise;
        self.fall = fall;
        self
    }

    /// Sets [`HealthCheck::source`].
    #[must_use]
    pub fn source(mut self, source: SocketAddr) -> Self {
        self.source = Some(source);
        self
    }

    /// Sets [`HealthCheck::mark`].
    #[must_use]
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Says what is wrong with its numbers, if anything.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn validate(&self) -> Result<()> {
        let invalid = |what, value: String, expected| Err(Error::Invalid { what, value, expected });
        if self.timeout.is_zero() || self.timeout > TIMEOUT_MAX {
            return invalid("timeout of a health check", format!("{:?}", self.timeout), "more than 0, at most a day");
        }
        for (what, count) in [("rise of a health check", self.rise), ("fall of a health check", self.fall)] {
            if count == 0 {
                return invalid(what, count.to_string(), "at least 1");
            }
        }
        if self.target.port() == 0 {
            return invalid("target of a health check", self.target.to_string(), "a port");
        }
        if self.source.is_some_and(|source| source.is_ipv4() != self.target.is_ipv4()) {
            return invalid(
                "source of a health check",
                format!("{:?}", self.source),
                "an address of the target's family",
            );
        }
        if let Probe::Http { path, host } = &self.probe {
            // They stand in the request as they are.
            let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
            if !path.starts_with('/') || !plain(path) {
                return invalid(
                    "path of a health check",
                    path.clone(),
                    "a `/` first, no blanks, escaped where need be",
                );
            }
            if let Some(host) = host.as_ref().filter(|host| host.is_empty() || !plain(host)) {
                return invalid("host of a health check", host.clone(), "a name, with a port if need be");
            }
        }
        Ok(())
    }
}

/// Probes in a row make the state.
pub(super) struct Thresholds {
    rise: u32,
    fall: u32,
    health: Health,
    /// Probes in a row that contradict the state.
    against: u32,
}

impl Thresholds {
    pub(super) fn new(check: &HealthCheck) -> Self {
        Self { rise: check.rise, fall: check.fall, health: Health::Unknown, against: 0 }
    }

    pub(super) fn health(&self) -> Health {
        self.health
    }

    /// Counts a probe; true when that changes the state.
    pub(super) fn count(&mut self, success: bool) -> bool {
        let (target, needed) = match (success, self.health) {
            (true, Health::Unknown) => (Health::Up, 1),
            (true, _) => (Health::Up, self.rise),
            (false, _) => (Health::Down, self.fall),
        };
        if self.health == target {
            self.against = 0;
            return false;
        }
        self.against += 1;
        if self.against < needed {
            return false;
        }
        self.against = 0;
        self.health = target;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_in_a_row_change_the_state() {
        let check = HealthCheck::tcp("192.0.2.1:80".parse().unwrap()).thresholds(2, 3);
        let mut thresholds = Thresholds::new(&check);
        // Each probe, and the state behind it: u(nknown), U(p), D(own).
        for (at, (probe, state)) in "+--+---+-+-++--+".chars().zip("UUUUUUDDDDDDUUUU".chars()).enumerate() {
            let before = thresholds.health();
            let changed = thresholds.count(probe == '+');
            let letter = match thresholds.health() {
                Health::Unknown => 'u',
                Health::Up => 'U',
                Health::Down => 'D',
            };
            assert_eq!(letter, state, "probe {at}");
            assert_eq!(changed, before != thresholds.health(), "probe {at}");
        }
        let mut dead = Thresholds::new(&check);
        let states: Vec<_> = (0..4).map(|_| (dead.count(false), dead.health())).collect();
        assert_eq!(states[1], (false, Health::Unknown));
        assert_eq!(states[2..], [(true, Health::Down), (false, Health::Down)]);
    }

    #[test]
    fn nonsense_is_refused() {
        let target = "192.0.2.1:80".parse().unwrap();
        for (check, message) in [
            (HealthCheck::tcp(target).timeout(Duration::ZERO), "timeout of a health check `0ns`: expected more than 0"),
            (HealthCheck::tcp(target).timeout(Duration::MAX), "expected more than 0, at most a day"),
            (HealthCheck::tcp(target).thresholds(0, 3), "rise of a health check `0`: expected at least 1"),
            (HealthCheck::tcp(target).thresholds(2, 0), "fall of a health check `0`: expected at least 1"),
            (
                HealthCheck::tcp("192.0.2.1:0".parse().unwrap()),
                "target of a health check `192.0.2.1:0`: expected a port",
            ),
            (HealthCheck::http(target, "health"), "path of a health check `health`: expected a `/` first"),
            (HealthCheck::http(target, "/a\r\nX: y"), "path of a health check `/a\r\nX: y`: expected a `/` first"),
            (HealthCheck::http(target, "/").host("a b"), "host of a health check `a b`: expected a name"),
            (HealthCheck::tcp(target).source("[::1]:0".parse().unwrap()), "expected an address of the target's family"),
        ] {
            let error = check.validate().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
