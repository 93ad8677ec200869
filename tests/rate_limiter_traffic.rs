//! The rate limiter in front of real sockets, and across processes: who is over its limit loses exactly the surplus, and
//! what an earlier process has left goes on.

mod common;

use std::{
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use common::judge;
use xdpkit::{
    Action, AttachOptions, Error, Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, Tier,
    remove_pins,
};
use xdpkit_lab::{
    bpffs::BpfFs,
    frame::Frame,
    topology::Pair,
    traffic::{TcpEcho, ping, tcp_echo},
};

#[test]
fn a_client_over_its_limit_loses_the_surplus_and_others_nothing() {
    let pair = Pair::with_clients(2).unwrap();
    // Nothing comes back while the test runs, so the surplus is a number. The clients are in one /64.
    let limit = Rate::per_hour(1).burst(40);
    let config = RateLimiterConfig::default().prefix_v6(128).limit(Scope::UdpPort(9000), limit);
    let limiter = RateLimiter::load(&config).unwrap();
    let attachment = pair.server.run(|| limiter.attach(&AttachOptions::new("eth0"))).unwrap();
    for family in 0..2 {
        let address = SocketAddr::new(pair.server_addr.both()[family], 9000);
        let sink = pair.server.run(|| UdpSocket::bind(address)).unwrap();
        sink.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let send = |client: usize, packets: u32| {
            let own = SocketAddr::new(pair.client_addrs[client].both()[family], 0);
            let socket = pair.clients[client].run(|| UdpSocket::bind(own)).unwrap();
            for n in 0..packets {
                socket.send_to(format!("{client} {n}").as_bytes(), address).unwrap();
                // No faster than the socket at the other end is read.
                thread::sleep(Duration::from_micros(200));
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| send(0, 200));
            scope.spawn(|| send(1, 40));
        });
        let mut arrived = [0; 2];
        let mut buffer = [0; 64];
        while let Ok(length) = sink.recv(&mut buffer) {
            assert!(length > 2);
            arrived[usize::from(buffer[0] - b'0')] += 1;
        }
        assert_eq!(arrived, [40, 40], "{address}");
        let refused = limiter.stats().unwrap().reason(Reason::OverPackets).packets;
        assert_eq!(refused, 160 * (family as u64 + 1));
        // What is not under the limit goes on, for who is over it too.
        let server = SocketAddr::new(address.ip(), 7);
        let echo = TcpEcho::start(&pair.server, server).unwrap();
        for client in &pair.clients {
            tcp_echo(client, echo.addr(), b"hello", Duration::from_secs(2)).unwrap();
            let pinged = ping(client, address.ip(), 2, Duration::ZERO, Duration::from_secs(2)).unwrap();
            assert_eq!(pinged.received, 2);
        }
    }
    attachment.detach().unwrap();
}

fn udp(source: &str) -> Vec<u8> {
    let source: SocketAddr = source.parse().unwrap();
    let server = if source.is_ipv4() { "10.0.0.1:53" } else { "[2001:db8::1]:53" };
    Frame::udp(source, server.parse().unwrap()).payload(&[0; 18]).build()
}

/// Trap H1: the secret is in the pins, so that the next process finds every bucket and ban.
#[test]
fn h1_limits_buckets_tiers_and_bans_survive_the_process() {
    let mount = BpfFs::new().unwrap();
    let pins = mount.path();
    let pair = Pair::new().unwrap();
    let (v4, v6) = ("192.0.2.1:9", "[2001:db8:9::1]:9");
    let just = |burst| Rate::per_hour(1).burst(burst);
    let config = RateLimiterConfig::default().prefix_v6(56).limit(Scope::All, just(3));
    let missing = RateLimiter::adopt(pins, "rate_limiter").unwrap_err();
    assert!(matches!(missing, Error::PinMissing { .. }), "{missing}");
    {
        let limiter = RateLimiter::load_or_adopt(pins, &config).unwrap();
        let options = AttachOptions::new("eth0").pin(pins);
        let _attachment = pair.server.run(|| limiter.attach(&options)).unwrap();
        limiter.limits().insert(Scope::UdpPort(53), Limit::packets(just(2))).unwrap();
        limiter.tiers().insert("198.51.100.0/24".parse().unwrap(), Tier::Limited(just(1).into())).unwrap();
        limiter.tiers().insert("2001:db8:a::/48".parse().unwrap(), Tier::Blocked).unwrap();
        limiter.bans().insert("192.0.2.77".parse().unwrap(), None).unwrap();
        for source in [v4, v6] {
            assert_eq!(judge(&limiter, &udp(source)).0, Action::Pass);
        }
    }
    let limiter = RateLimiter::load_or_adopt(pins, &config).unwrap();
    assert!(limiter.limits().iter().eq([(Scope::All, just(3).into()), (Scope::UdpPort(53), just(2).into())]));
    assert_eq!(limiter.tiers().len(), 2);
    assert_eq!(limiter.bans().len().unwrap(), 1);
    for source in [v4, v6] {
        assert_eq!(judge(&limiter, &udp(source)), (Action::Pass, Reason::WithinLimit), "the second of two");
        assert_eq!(judge(&limiter, &udp(source)), (Action::Drop, Reason::OverPackets), "{source}");
    }
    assert_eq!(judge(&limiter, &udp("192.0.2.77:1")).1, Reason::Banned);
    assert_eq!(judge(&limiter, &udp("[2001:db8:a::1]:1")).1, Reason::Blocked);
    assert_eq!(judge(&limiter, &udp("198.51.100.1:1")).0, Action::Pass);
    assert_eq!(judge(&limiter, &udp("198.51.100.1:1")).1, Reason::OverPackets);
    // And all of it can be changed.
    limiter.limits().insert(Scope::UdpPort(53), just(9)).unwrap();
    assert_eq!(judge(&limiter, &udp(v4)).0, Action::Pass);
    limiter.tiers().remove("2001:db8:a::/48".parse().unwrap()).unwrap();
    assert_eq!(judge(&limiter, &udp("[2001:db8:a::1]:1")).1, Reason::WithinLimit);
    limiter.bans().clear().unwrap();
    assert_eq!(judge(&limiter, &udp("192.0.2.77:1")).1, Reason::WithinLimit);
    drop(limiter);
    remove_pins(pins).unwrap();
}
