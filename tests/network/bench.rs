//! Balancers at work in a laboratory with two paths, the kernel's own forwarding in another, streams through both, and what
//! they lose by a change.

use std::{
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use xdpkit_lab::{Namespace, Route, Rule, traffic::UdpEcho};

use crate::{
    balancers::{Balancers, METHODS, PORTS},
    common::times,
    lab::{
        BACK, BALANCER, CLIENT, CLIENTS, FAMILIES, FAR, FIRST_BACKEND, FRONT, Host, Lab, NEAR, SECOND, dsr_vip, ip,
        nat_vip, net, reply_by,
    },
    stream::Stream,
};

/// What a change may cost beyond what it costs the kernel's own forwarding: a second, and what it takes to repeat a solicitation
/// that came too early, where time is measured; more on a busy machine.
pub(crate) fn within() -> Duration {
    Duration::from_millis(times(5_000, 1_500, 10_000) as u64)
}

/// Until it is said that something never recovers.
pub(crate) fn patience() -> Duration {
    Duration::from_secs(times(30, 10, 60) as u64)
}

/// Echoes on all addresses where datagrams may come to: replies are from there.
pub(crate) fn echoes(lab: &Lab) -> Vec<UdpEcho> {
    let mut echoes = Vec::new();
    for family6 in FAMILIES {
        for (number, backend) in lab.backends.iter().enumerate() {
            let number = lab.number(number);
            for address in [ip(family6, FAR, number), ip(family6, NEAR, number), dsr_vip(family6)] {
                echoes.extend(PORTS.map(|port| UdpEcho::start(backend, (address, port).into()).unwrap()));
            }
        }
    }
    echoes
}

/// Where the balancers' clients go, and where those of the kernel.
pub(crate) fn balanced() -> Vec<(String, SocketAddr)> {
    let every = |family6| METHODS.map(|method| (format!("{method:?} {}", name(family6)), method.target(family6)));
    FAMILIES.into_iter().flat_map(every).collect()
}

pub(crate) fn routed(lab: &Lab) -> Vec<(String, SocketAddr)> {
    let every = |family6| {
        [(FAR, "by a gateway"), (NEAR, "on the link")].map(|(network, what)| {
            (format!("{what} {}", name(family6)), (ip(family6, network, lab.number(0)), PORTS[0]).into())
        })
    };
    FAMILIES.into_iter().flat_map(every).collect()
}

pub(crate) fn name(family6: bool) -> &'static str {
    if family6 { "IPv6" } else { "IPv4" }
}

/// What each stream lost by a change, and the laboratory afterwards.
pub(crate) type Losses = Vec<(String, Option<Duration>)>;

/// What streams to these targets lose by a change, when they have flown for so long.
pub(crate) fn losses(
    lab: &Lab,
    targets: Vec<(String, SocketAddr)>,
    flow: Duration,
    change: impl FnOnce(&Lab),
) -> Losses {
    let start = Instant::now();
    let streams: Vec<_> =
        targets.into_iter().map(|(name, target)| (name, Stream::start(&lab.client, target))).collect();
    let begun: Vec<_> = streams.iter().map(|(name, stream)| (name, stream.outage(start, patience()))).collect();
    let never: Vec<_> = begun.iter().filter(|(_, outage)| outage.is_none()).map(|(name, _)| name).collect();
    assert!(never.is_empty(), "before the change, nothing comes back: {never:?}");
    thread::sleep(flow);
    let changed = Instant::now();
    change(lab);
    streams.into_iter().map(|(name, stream)| (name, stream.outage(changed, patience()))).collect()
}

/// Balancers at work, which tests use one after the other: their programs take longer to load than most tests.
pub(crate) struct Bench {
    pub(crate) lab: Lab,
    echoes: Vec<UdpEcho>,
    _balancers: Balancers,
}

static BENCH: Mutex<Option<Bench>> = Mutex::new(None);

impl Bench {
    /// Does something with it, and puts everything back; a test that fails leaves it to nobody.
    pub(crate) fn with<R>(work: impl FnOnce(&Lab, &[UdpEcho]) -> R) -> R {
        let mut place = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
        let bench = place.take().unwrap_or_else(|| {
            let lab = two_paths();
            let echoes = echoes(&lab);
            let balancers = Balancers::start(&lab);
            assert_eq!(balancers.refused, [""; 0]);
            Self { lab, echoes, _balancers: balancers }
        });
        let result = work(&bench.lab, &bench.echoes);
        restore(&bench.lab);
        *place = Some(bench);
        result
    }
}

/// What tests change that others do not expect.
fn restore(lab: &Lab) {
    let host = &lab.balancer;
    lab.switch.set_up("backend0-eth0").unwrap();
    host.set_up("eth1").unwrap();
    CARDS.iter().for_each(|dev| host.set_mtu(dev, 1500).unwrap());
    probe(host, "5", "3", "1000", "30000");
    for rule in FAMILIES.into_iter().flat_map(rules) {
        // Most tests add none.
        let _ = host.remove_rule(&rule);
    }
    FAMILIES.iter().for_each(|family6| host.replace_route(&default_route(*family6, CLIENT)).unwrap());
    lead(lab, BACK, FIRST_BACKEND, None);
    replies_by(lab, BACK);
    lab.introduce_balancer().unwrap();
}

/// The cards of the laboratory with two paths.
const CARDS: [&str; 3] = ["eth0", "eth1", "eth2"];

/// By a host of the front network.
pub(crate) fn default_route(family6: bool, number: u8) -> Route {
    let everywhere = IpNet::new_assert(if family6 { [0; 16].into() } else { [0; 4].into() }, 0);
    Route::to(everywhere).via_dev(ip(family6, FRONT, number), "eth0")
}

/// By the kernel alone in a laboratory of its own, and at the same time through the balancers.
pub(crate) fn beside_the_kernel<K: Send, R>(
    kernel: impl FnOnce(&Lab) -> K + Send,
    ours: impl FnOnce(&Lab) -> R,
    judge: impl FnOnce(K, R),
) {
    Bench::with(|lab, _| {
        thread::scope(|scope| {
            let kernel = scope.spawn(|| kernel(&two_paths()));
            let ours = ours(lab);
            judge(kernel.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), ours);
        });
    });
}

/// How a change is judged.
pub(crate) struct Judgement {
    /// How long traffic flows before the change.
    pub(crate) flow: Duration,
    /// What the kernel loses, or the laboratory proves nothing.
    pub(crate) kernel: RangeInclusive<Duration>,
    /// What the balancers may lose beyond that.
    pub(crate) more: Duration,
}

/// Makes a change under traffic by the kernel and by the balancers.
pub(crate) fn compare(judgement: &Judgement, prepare: impl Fn(&Lab) + Sync, change: impl Fn(&Lab) + Sync) {
    let Judgement { flow, kernel: plausible, more } = judgement;
    let kernel = |lab: &Lab| {
        let _echoes = echoes(lab);
        prepare(lab);
        losses(lab, routed(lab), *flow, &change)
    };
    let ours = |lab: &Lab| {
        prepare(lab);
        losses(lab, balanced(), *flow, &change)
    };
    beside_the_kernel(kernel, ours, |kernel, ours| {
        let worst = kernel.iter().map(|(_, outage)| outage.unwrap_or(Duration::MAX)).max().expect("there are streams");
        assert!(plausible.contains(&worst), "the kernel's own forwarding is no control here: {kernel:?}");
        assert_followed(worst, &ours, *more);
    });
}

/// A change that the kernel's own forwarding follows at once.
pub(crate) fn followed(change: impl Fn(&Lab) + Sync) {
    let judgement = Judgement { flow: Duration::ZERO, kernel: Duration::ZERO..=within(), more: within() };
    compare(&judgement, |_| {}, change);
}

/// Fails for streams that take longer than the kernel and this.
pub(crate) fn assert_followed(kernel: Duration, ours: &Losses, more: Duration) {
    let late: Vec<_> = ours.iter().filter(|(_, outage)| outage.is_none_or(|outage| outage > kernel + more)).collect();
    assert!(late.is_empty(), "the kernel followed after {kernel:?}; late: {late:?}");
}

/// One backend, and a balancer with plain cards and a second path: the one that is left when the first is gone.
pub(crate) fn two_paths() -> Lab {
    let lab = Lab::new(Host::Plain, 1, true).unwrap();
    // Otherwise a link takes its addresses with it when it goes down.
    lab.balancer.sysctl("net.ipv6.conf.all.keep_addr_on_down", "1").unwrap();
    lead(&lab, SECOND, FIRST_BACKEND, Some(2000));
    lab
}

/// Where the balancer sends what is for the backend: by the back or the second network, where it has this number.
pub(crate) fn lead(lab: &Lab, link: u8, number: u8, metric: Option<u32>) {
    let dev = if link == SECOND { "eth2" } else { lab.back.as_str() };
    let with = |route: Route| metric.iter().fold(route, |route, metric| route.metric(*metric));
    for family6 in FAMILIES {
        let far = Route::to(ip(family6, FAR, lab.number(0)).into()).via_dev(ip(family6, link, number), dev);
        for route in [far, Route::to(net(family6, NEAR)).on_link(dev)] {
            lab.balancer.replace_route(&with(route)).unwrap();
        }
    }
}

/// Everything that the backend sends back through the balancer goes by this network.
pub(crate) fn replies_by(lab: &Lab, link: u8) {
    FAMILIES.iter().for_each(|family6| reply_by(&lab.backends[0], *family6, link, BALANCER).unwrap());
}

/// How a host looks after its neighbours: when it begins to, how often it asks and after how many milliseconds again, and for
/// how long it believes them.
pub(crate) fn probe(ns: &Namespace, delay: &str, times: &str, again: &str, reachable: &str) {
    for (family, dev) in ["ipv4", "ipv6"].into_iter().flat_map(|family| ["eth0", "eth1"].map(|dev| (family, dev))) {
        for (key, value) in [
            ("delay_first_probe_time", delay),
            ("ucast_solicit", times),
            ("retrans_time_ms", again),
            ("base_reachable_time_ms", reachable),
        ] {
            ns.sysctl(&format!("net.{family}.neigh.{dev}.{key}"), value).unwrap();
        }
    }
}

pub(crate) const TABLE: u32 = 300;

/// For the sources of all that crosses the balancer: clients as DNAT and direct server return keep them, the virtual address as
/// full NAT and its replies have it, what the kernel forwards back, and what a tunnel's outer header may have.
pub(crate) fn rules(family6: bool) -> Vec<Rule> {
    let networks = [CLIENTS, FAR, NEAR].map(|network| net(family6, network));
    let own = [FRONT, BACK, SECOND].map(|network| ip(family6, network, BALANCER).into());
    networks.into_iter().chain(own).chain([nat_vip(family6).into()]).map(|source| Rule::new(source, TABLE)).collect()
}
