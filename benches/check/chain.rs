//! What chains cost above their stages: four that pass every packet against parsing four times, and an appliance's firewall,
//! rate limiter and balancer against each of them alone.

use std::os::fd::BorrowedFd;

use xdpkit::{
    Action, DsrBalancer, DsrConfig, DsrService, Firewall, FirewallConfig, MonitorConfig, PacketMonitor, Pipeline, Rate,
    RateLimiter, RateLimiterConfig, Reason, Rule, Scope, Stage, Tier,
};
use xdpkit_lab::{
    Namespace,
    bench::{Checks, Cost, Harness, random_v4},
    frame::{Frame, tcp},
    veth,
};

/// Each round is one window of half a millisecond of each program. Fixed: to go on until the bound holds
/// would be to wait for luck.
const ROUNDS: u32 = 500;

const PACKETS: u32 = 1000;

/// Windows of the appliance's chain. Medians of at least 11 were asked for.
const APPLIANCE_ROUNDS: u32 = 101;

pub(crate) fn check(checks: &mut Checks) {
    checks.group("chain/four-stages", |checks| {
        let (harness, one, four) = four_stages();
        let programs = [harness.parse_only(), one.program_fd(), four.program_fd()];
        let costs = harness.costs_above_empty(&programs, ROUNDS).unwrap();
        let [parse, one, four] = [0, 1, 2].map(|row| costs[row].minimum);
        println!("ns above an empty program: parse {parse:.1}, one stage {one:.1}, four stages {four:.1}");
        checks.at_most("chain/four-stages/more-than-one", "ns", four - one, 4.0 * (parse + 3.0));
    });
    checks.group("chain/appliance", |checks| {
        let costs = appliance(|harness, programs| harness.costs_above_empty(programs, APPLIANCE_ROUNDS).unwrap());
        let [parts @ .., whole] = costs.as_slice() else { unreachable!() };
        let sum = |of: fn(&Cost) -> f64| parts.iter().map(of).sum::<f64>();
        let (minima, medians) = (sum(|cost| cost.minimum), sum(|cost| cost.median));
        println!("ns above an empty program: minima, sum {minima:.1}, chain {:.1}", whole.minimum);
        checks.at_most("chain/appliance", "ns", whole.median, (medians * 1.05).max(medians + 3.0 * 3.0));
    });
}

/// A chain of one monitor and one of four, which have seen packets: each stage has counted every one of them.
pub(crate) fn four_stages() -> (Harness, Pipeline, Pipeline) {
    let template =
        Frame::udp("192.0.2.1:1024".parse().unwrap(), "198.51.100.1:53".parse().unwrap()).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &random_v4(1 << 16)).unwrap();
    let monitor = |n| PacketMonitor::load(&MonitorConfig::default().name(format!("monitor{n}"))).unwrap();
    let monitors = [1, 2, 3, 4].map(monitor);
    let one = Pipeline::new(&[&monitors[0]]).unwrap();
    let four = Pipeline::new(&monitors.each_ref().map(|monitor| monitor as &dyn Stage)).unwrap();
    let (action, frame) = harness.verdict(four.program_fd(), PACKETS).unwrap();
    assert_eq!(action, Action::Pass as u32);
    for monitor in &monitors {
        let stats = monitor.stats().unwrap();
        assert_eq!(stats.reason(Reason::None), stats.total());
        assert_eq!(stats.passed().packets, PACKETS.into(), "{}", monitor.name());
        assert_eq!(stats.passed().bytes, u64::from(PACKETS) * frame.len() as u64, "{}", monitor.name());
    }
    (harness, one, four)
}

/// Goes on with a firewall, a rate limiter, a balancer and the chain of them, through which packets of all flows have gone.
pub(crate) fn appliance<T: Send>(then: impl FnOnce(&Harness, &[BorrowedFd<'_>]) -> T + Send) -> T {
    let (ns, peer) = (Namespace::new("balancer").unwrap(), Namespace::new("peer").unwrap());
    veth((&ns, "eth0"), (&peer, "eth0")).unwrap();
    ns.add_address("eth0", "192.168.178.10/24".parse().unwrap()).unwrap();
    ns.enable_forwarding().unwrap();
    for number in 20..25 {
        ns.add_neighbour("eth0", [192, 168, 178, number].into(), [2, 0, 0, 0, 0, 9]).unwrap();
    }
    // The routes and neighbours of this thread's namespace are the balancer's.
    ns.run(|| {
        let firewall = Firewall::load(&FirewallConfig::default().capacity(2000_u32)).unwrap();
        let denied = (0..1000).map(|n: u16| format!("203.{}.{}.0/24", n >> 8, n & 0xff).parse().unwrap());
        firewall.replace_all(denied.map(|selector| (selector, Rule::deny()))).unwrap();
        let limit = "1000000000/s".parse::<Rate>().unwrap();
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
        limiter.tiers().insert("203.0.113.0/24".parse().unwrap(), Tier::Exempt).unwrap();
        let balancer = DsrBalancer::load(&DsrConfig::default()).unwrap();
        let backends = (20..25).map(|number| ([192, 168, 178, number].into(), 1));
        balancer.insert_service("tcp/192.168.178.100:80".parse().unwrap(), DsrService::l2(), backends).unwrap();
        let chain = Pipeline::new(&[&firewall, &limiter, &balancer]).unwrap();

        let (from, to) = ("10.0.0.1:1024".parse().unwrap(), "192.168.178.100:80".parse().unwrap());
        let template = Frame::tcp(from, to).flags(tcp::ACK).payload(&[0; 18]).build();
        let flows: Vec<_> =
            random_v4(1 << 11).into_iter().filter(|flow| !flow.to_string().starts_with("203.")).collect();
        let harness = Harness::new(&template, &flows[..1 << 10]).unwrap();
        let (action, _) = harness.verdict(chain.program_fd(), PACKETS).unwrap();
        assert_eq!(action, Action::Redirect as u32, "test runs come in by another interface");
        for (stage, reason) in [
            (&firewall as &dyn Stage, Reason::DefaultAction),
            (&limiter, Reason::WithinLimit),
            (&balancer, Reason::Forwarded),
        ] {
            let stats = stage.stats().unwrap();
            assert_eq!(stats.reason(reason).packets, PACKETS.into(), "{}: {stats:?}", stage.name());
        }
        then(&harness, &[firewall.program_fd(), limiter.program_fd(), balancer.program_fd(), chain.program_fd()])
    })
}
