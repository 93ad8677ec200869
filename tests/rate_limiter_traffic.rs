//! The rate limiter in front of real sockets, and across processes: who is over its limit loses exactly the surplus, and
//! what an earlier process has left goes on.

mod common;

use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use common::{judge, nat::PATIENCE};
use xdpkit::{
    Action, AttachOptions, Error, Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope, Stage as _, Stats, Tier,
    remove_pins,
};
use xdpkit_lab::{
    bpffs::BpfFs,
    frame::Frame,
    topology::Pair,
    traffic::{TcpEcho, ping, tcp_echo},
};

/// What clients send to the server's port of UDP, at the pace at which the limiter judges it: no queue on the way is ever
/// full, however slow the machine is.
struct Paced<'l> {
    limiter: &'l RateLimiter,
    before: Stats,
    sent: AtomicU64,
}

impl<'l> Paced<'l> {
    /// As many may be on their way.
    const WINDOW: u64 = 16;

    fn new(limiter: &'l RateLimiter) -> Self {
        Self { limiter, before: limiter.stats().unwrap(), sent: AtomicU64::new(0) }
    }

    /// What was within the limit, and over it.
    fn judged(&self) -> [u64; 2] {
        let stats = self.limiter.stats().unwrap().since(&self.before);
        [Reason::WithinLimit, Reason::OverPackets].map(|reason| stats.reason(reason).packets)
    }

    /// Waits until the limiter has judged all of what was sent but for so many.
    fn wait(&self, left: u64) {
        let end = Instant::now() + PATIENCE;
        loop {
            let (judged, sent) = (self.judged(), self.sent.load(Ordering::SeqCst));
            if judged[0] + judged[1] + left >= sent {
                return;
            }
            assert!(Instant::now() < end, "{sent} were sent, within and over the limit were {judged:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn send(&self, pair: &Pair, client: usize, family: usize, to: SocketAddr, packets: u32) {
        let own = SocketAddr::new(pair.client_addrs[client].both()[family], 0);
        let socket = pair.clients[client].run(|| UdpSocket::bind(own)).unwrap();
        for n in 0..packets {
            self.wait(Self::WINDOW);
            // Before: what is judged is never more than was sent.
            self.sent.fetch_add(1, Ordering::SeqCst);
            socket.send_to(format!("{client} {n}").as_bytes(), to).unwrap();
        }
    }
}

#[test]
fn a_client_over_its_limit_loses_the_surplus_and_others_nothing() {
    let pair = Pair::with_clients(2).unwrap();
    // Nothing comes back while the test runs, so the surplus is a number. The clients are in one /64.
    let limit = Rate::per_hour(1).burst(40);
    let config = RateLimiterConfig::default()
        .prefix_v6(128)
        .limit(Scope::UdpPort(9000), limit)
        .limit(Scope::IcmpEcho, Rate::per_hour(1).burst(5))
        .limit(Scope::TcpSyn, Rate::per_hour(1).burst(3));
    let limiter = RateLimiter::load(&config).unwrap();
    let attachment = pair.server.run(|| limiter.attach(&AttachOptions::new("eth0"))).unwrap();
    for family in 0..2 {
        let address = SocketAddr::new(pair.server_addr.both()[family], 9000);
        let server = SocketAddr::new(address.ip(), 7);
        let echo = TcpEcho::start(&pair.server, server).unwrap();
        // The first client wants more than it may. From here on, all know where the server is.
        let pinged = |client: usize, count, patience| {
            ping(&pair.clients[client], address.ip(), count, Duration::ZERO, patience).unwrap().received
        };
        assert_eq!([pinged(0, 5, PATIENCE), pinged(1, 5, PATIENCE)], [5, 5]);
        let before = limiter.stats().unwrap();
        assert_eq!(pinged(0, 3, Duration::from_secs(1)), 0);
        assert_eq!(limiter.stats().unwrap().since(&before).reason(Reason::OverPackets).packets, 3);
        let sink = pair.server.run(|| UdpSocket::bind(address)).unwrap();
        let paced = Paced::new(&limiter);
        thread::scope(|scope| {
            scope.spawn(|| paced.send(&pair, 0, family, address, 200));
            scope.spawn(|| paced.send(&pair, 1, family, address, 40));
        });
        paced.wait(0);
        assert_eq!(paced.judged(), [80, 160], "within and over the limit");
        // What has passed is in the socket, or is about to be.
        let mut arrived = [0; 2];
        let mut buffer = [0; 64];
        sink.set_read_timeout(Some(PATIENCE)).unwrap();
        while arrived.iter().sum::<u32>() < 80 {
            let length = sink.recv(&mut buffer).unwrap_or_else(|error| panic!("{arrived:?} have arrived: {error}"));
            assert!(length > 2);
            arrived[usize::from(buffer[0] - b'0')] += 1;
        }
        assert_eq!(arrived, [40, 40], "{address}");
        // What is not under those limits goes on, for who is over them too; and attempts to connect are under another one.
        let connect = |client: usize, patience| tcp_echo(&pair.clients[client], echo.addr(), b"hello", patience);
        assert_eq!(connect(0, PATIENCE).unwrap(), b"hello");
        let more = (0..9).take_while(|_| connect(0, Duration::from_secs(1)).is_ok()).count();
        assert!(more <= 2, "{more} more connections by three attempts");
        assert_eq!(connect(1, PATIENCE).unwrap(), b"hello");
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
