//! The rate limiter in front of real sockets, and across processes: who is over its limit loses exactly the surplus, and
//! what an earlier process has left goes on.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::common::{judge, nat::PATIENCE};
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

/// What clients send to a socket of the server's, at the pace at which it is refused or read: no queue on the way is ever full,
/// however slow the machine is. (A socket holds no more than 49 datagrams where each comes in a page of its own.)
struct Paced<'l> {
    limiter: &'l RateLimiter,
    before: Stats,
    sink: UdpSocket,
    sent: AtomicU64,
    /// By client.
    read: [AtomicU64; 2],
    over: AtomicBool,
}

impl<'l> Paced<'l> {
    /// As many may be on their way.
    const WINDOW: u64 = 16;

    fn new(limiter: &'l RateLimiter, sink: UdpSocket) -> Self {
        sink.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let before = limiter.stats().unwrap();
        Self {
            limiter,
            before,
            sink,
            sent: AtomicU64::default(),
            read: Default::default(),
            over: AtomicBool::new(false),
        }
    }

    fn refused(&self) -> u64 {
        self.limiter.stats().unwrap().since(&self.before).reason(Reason::OverPackets).packets
    }

    fn read(&self) -> [u64; 2] {
        [0, 1].map(|client: usize| self.read[client].load(Ordering::SeqCst))
    }

    /// Reads until all is over.
    fn receive(&self) {
        let mut buffer = [0; 64];
        while !self.over.load(Ordering::SeqCst) {
            if let Ok(length) = self.sink.recv(&mut buffer) {
                assert!(length > 2);
                self.read[usize::from(buffer[0] - b'0')].fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Waits until it is known of all that was sent, but for so many, what became of it.
    fn wait(&self, left: u64) {
        let end = Instant::now() + PATIENCE;
        loop {
            let (read, refused, sent) = (self.read(), self.refused(), self.sent.load(Ordering::SeqCst));
            if read[0] + read[1] + refused + left >= sent {
                return;
            }
            assert!(Instant::now() < end, "of {sent}, {read:?} have arrived and {refused} were refused");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn send(&self, pair: &Pair, client: usize, family: usize, packets: u32) {
        let own = SocketAddr::new(pair.client_addrs[client].both()[family], 0);
        let socket = pair.clients[client].run(|| UdpSocket::bind(own)).unwrap();
        let to = self.sink.local_addr().unwrap();
        for n in 0..packets {
            self.wait(Self::WINDOW);
            // Before: what is known of is never more than was sent.
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
        let paced = Paced::new(&limiter, pair.server.run(|| UdpSocket::bind(address)).unwrap());
        thread::scope(|scope| {
            scope.spawn(|| paced.receive());
            let senders = [(0, 200), (1, 40)].map(|(client, packets)| {
                let (paced, pair) = (&paced, &pair);
                scope.spawn(move || paced.send(pair, client, family, packets))
            });
            let sent = senders.map(|sender| sender.join().is_ok());
            let known = scope.spawn(|| paced.wait(0)).join().is_ok();
            // Before anything panics here: the reader would be waited for.
            paced.over.store(true, Ordering::SeqCst);
            assert_eq!((sent, known), ([true; 2], true), "all was sent, and what became of it is known");
        });
        assert_eq!((paced.read(), paced.refused()), ([40, 40], 160), "{address}");
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
    let limiter = RateLimiter::adopt(pins, "rate_limiter").unwrap();
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
