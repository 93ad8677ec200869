//! Limiters and frames for the tests of `RateLimiter`.

use std::net::IpAddr;

use xdpkit::{Action, Rate, RateLimiter, RateLimiterConfig, Scope, Stage as _, ipnet::IpNet};
use xdpkit_lab::frame::Frame;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;

/// So slow that nothing comes back while a test runs: a burst is all there is.
pub(crate) fn just(burst: u64) -> Rate {
    Rate::per_hour(1).burst(burst)
}

pub(crate) fn limiter(limits: &[(Scope, u64)]) -> RateLimiter {
    let config =
        limits.iter().fold(RateLimiterConfig::default(), |config, (scope, burst)| config.limit(*scope, just(*burst)));
    RateLimiter::load(&config).unwrap()
}

pub(crate) fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn server(source: IpAddr) -> IpAddr {
    address(if source.is_ipv4() { "10.0.0.1" } else { "2001:db8::1" })
}

pub(crate) fn udp(source: &str, port: u16) -> Frame {
    let source = address(source);
    Frame::udp((source, 4000).into(), (server(source), port).into())
}

pub(crate) fn tcp(source: &str, port: u16, flags: u8) -> Frame {
    let source = address(source);
    Frame::tcp((source, 4000).into(), (server(source), port).into()).flags(flags)
}

pub(crate) fn echo(source: &str) -> Frame {
    Frame::echo(address(source), server(address(source)), 1, 1)
}

/// How many of so many frames pass, one after the other.
pub(crate) fn passed(limiter: &RateLimiter, frame: &Frame, count: usize) -> usize {
    let frame = frame.build();
    (0..count).filter(|_| limiter.test_run(&frame).unwrap().action == Action::Pass).count()
}
