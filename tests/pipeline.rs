//! Chains: order, edits while packets flow, programs of the caller's own.

mod common;

use std::os::fd::{AsFd as _, AsRawFd as _};

use common::{
    times,
    traffic::{DENIED, Lockstep},
};
use xdpkit::{
    Action, AttachOptions, Error, Firewall, FirewallConfig, MonitorConfig, PacketMonitor, Pipeline, Position, Protocol,
    Reason, Rule, Stage,
};
use xdpkit_lab::{
    frame::Frame,
    topology::Pair,
    traffic::{TcpEcho, tcp_echo},
};

fn monitor(name: &str) -> PacketMonitor {
    PacketMonitor::load(&MonitorConfig::default().name(name)).unwrap()
}

fn firewall() -> Firewall {
    let firewall = Firewall::load(&FirewallConfig::default()).unwrap();
    for source in DENIED {
        firewall.insert(source.parse::<std::net::IpAddr>().unwrap().into(), Rule::deny()).unwrap();
    }
    firewall
}

fn frame() -> Vec<u8> {
    Frame::udp("10.0.0.2:1".parse().unwrap(), "10.0.0.1:2".parse().unwrap()).build()
}

fn seen(monitor: &PacketMonitor) -> u64 {
    monitor.stats().unwrap().total().packets
}

#[test]
fn a_packet_meets_the_stages_in_order_until_one_ends_its_way() {
    let (a, b, c) = (monitor("a"), monitor("b"), monitor("c"));
    let mut chain = Pipeline::new(&[&a, &b, &c]).unwrap();
    assert_eq!(chain.stages(), ["a", "b", "c"]);
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Pass);
    assert_eq!((seen(&a), seen(&b), seen(&c)), (1, 1, 1));

    b.set_action(Protocol::Udp, Some(Action::Drop)).unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Drop);
    assert_eq!((seen(&a), seen(&b), seen(&c)), (2, 2, 1));

    chain.reorder(&["c", "b", "a"]).unwrap();
    chain.test_run(&frame()).unwrap();
    assert_eq!((seen(&a), seen(&b), seen(&c)), (2, 3, 2));

    chain.remove("b").unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Pass);
    assert_eq!((seen(&a), seen(&b), seen(&c)), (3, 3, 3));

    let d = monitor("d");
    chain.insert(Position::Before("c"), &b).unwrap();
    chain.insert(Position::After("c"), &d).unwrap();
    assert_eq!(chain.stages(), ["b", "c", "d", "a"]);
    b.set_action(Protocol::Udp, None).unwrap();
    d.set_action(Protocol::Udp, Some(Action::Tx)).unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Tx);
    assert_eq!((seen(&a), seen(&b), seen(&c), seen(&d)), (3, 4, 4, 1));
}

#[test]
fn a_chain_is_put_in_the_place_of_another() {
    let (a, b, c) = (monitor("a"), monitor("b"), monitor("c"));
    let mut chain = Pipeline::new(&[&a, &b]).unwrap();
    chain.set_last(Some(c.program_fd())).unwrap();
    chain.set_stages(&[&b]).unwrap();
    assert_eq!(chain.stages(), ["b"]);
    chain.test_run(&frame()).unwrap();
    assert_eq!((seen(&a), seen(&b), seen(&c)), (0, 1, 1), "the last program stays");
    let head = chain.program_fd().as_raw_fd();
    chain.set_stages(&[&b]).unwrap();
    assert_eq!(chain.program_fd().as_raw_fd(), head, "nothing to do");
    let twin = monitor("b");
    chain.set_stages(&[&twin]).unwrap();
    chain.test_run(&frame()).unwrap();
    assert_eq!((seen(&b), seen(&twin)), (1, 1), "another value of the same name");
    let error = chain.set_stages(&[&a, &a]).unwrap_err().to_string();
    assert!(error.contains("two stages are named `a`"), "{error}");
    assert!(matches!(chain.set_stages(&[]), Err(Error::Pipeline { .. })));
    assert_eq!(chain.stages(), ["b"]);
}

#[test]
fn one_value_stands_in_two_chains() {
    let (shared, a, b) = (monitor("shared"), monitor("a"), monitor("b"));
    let first = Pipeline::new(&[&shared, &a]).unwrap();
    let second = Pipeline::new(&[&b, &shared]).unwrap();
    first.test_run(&frame()).unwrap();
    second.test_run(&frame()).unwrap();
    assert_eq!((seen(&shared), seen(&a), seen(&b)), (2, 1, 1), "each membership has a successor of its own");
}

#[test]
fn wrong_edits_are_refused_and_change_nothing() {
    let (a, b) = (monitor("a"), monitor("b"));
    let mut chain = Pipeline::new(&[&a, &b]).unwrap();
    let errors = [
        (
            chain.insert(Position::First, &monitor("b")),
            "pipeline: two stages are named `b`: give each value a name of its own",
        ),
        (chain.insert(Position::After("x"), &monitor("c")), "the pipeline has no stage `x`: it holds a, b"),
        (chain.remove("x"), "the pipeline has no stage `x`: it holds a, b"),
        (chain.reorder(&["a"]), "pipeline: the order `a` must name each of its stages once: a, b"),
        (chain.reorder(&["a", "a"]), "pipeline: the order `a, a` must name each of its stages once: a, b"),
        (chain.replace("a", &monitor("b")), "pipeline: two stages are named `b`: give each value a name of its own"),
    ];
    for (answer, text) in errors {
        assert_eq!(answer.unwrap_err().to_string(), text);
    }
    assert_eq!(Pipeline::new(&[]).unwrap_err().to_string(), "pipeline: it needs at least one stage");
    assert_eq!(chain.stages(), ["a", "b"]);
    chain.test_run(&frame()).unwrap();
    assert_eq!((seen(&a), seen(&b)), (1, 1));
    chain.remove("a").unwrap();
    assert_eq!(chain.remove("b").unwrap_err().to_string(), "pipeline: `b` is its only stage: detach it instead");
}

#[test]
fn the_chain_ends_in_a_program_of_the_callers_own() {
    let (a, b) = (monitor("a"), monitor("b"));
    // Any XDP program with `xdp.frags` will do; this one drops.
    let own = monitor("own");
    own.set_action(Protocol::Ipv4, Some(Action::Drop)).unwrap();
    let mut chain = Pipeline::new(&[&a]).unwrap();
    chain.set_last(Some(own.program_fd())).unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Drop);
    // Stages are inserted before it, and removing the one before it keeps it.
    chain.insert(Position::Last, &b).unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Drop);
    assert_eq!((seen(&a), seen(&b), seen(&own)), (2, 1, 2));
    chain.remove("b").unwrap();
    chain.reorder(&["a"]).unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Drop);
    chain.set_last(None).unwrap();
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Pass);
    let head = chain.program_fd().try_clone_to_owned().unwrap();
    let error = chain.set_last(Some(head.as_fd())).unwrap_err();
    assert!(matches!(&error, Error::IncompatibleProgram { why, .. } if why.contains("in circles")), "{error}");
}

#[test]
fn a_last_program_that_does_not_fit_is_refused_by_name() {
    let a = monitor("a");
    let mut chain = Pipeline::new(&[&a]).unwrap();
    // Not a program at all.
    let error = chain.set_last(Some(std::fs::File::open("/proc/self/status").unwrap().as_fd())).unwrap_err();
    assert!(matches!(error, Error::Program { .. }), "{error}");
    // The right type, but without `xdp.frags`.
    let plain = xdpkit_lab::xdp_program(2, false).unwrap();
    let error = chain.set_last(Some(plain.as_fd())).unwrap_err();
    assert!(matches!(&error, Error::IncompatibleProgram { why, .. } if why.contains("xdp.frags")), "{error}");
    assert_eq!(chain.test_run(&frame()).unwrap().action, Action::Pass, "the chain is as before");
}

#[test]
fn chains_are_edited_under_traffic_without_loss_or_bypass() {
    let pair = Pair::new().unwrap();
    let firewall = firewall();
    let (front, back) = (monitor("front"), monitor("back"));
    let mut chain = Pipeline::new(&[&front, &firewall, &back]).unwrap();
    pair.server.run(|| chain.attach(&AttachOptions::new("eth0"))).unwrap();
    let extras: Vec<PacketMonitor> = (0..4).map(|n| monitor(&format!("extra-{n}"))).collect();

    let traffic = Lockstep::start(&pair);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let edits = times(60, 1000, 12);
    for edit in 0..edits {
        let inside = |extra: &&PacketMonitor| chain.stages().contains(&extra.name());
        let (inside, outside): (Vec<_>, Vec<_>) = extras.iter().partition(inside);
        let names: Vec<String> = chain.stages().into_iter().map(str::to_owned).collect();
        match next(5) {
            4 => {
                let mut stages: Vec<&dyn Stage> = vec![&front, &firewall, &back];
                stages.extend(extras[..next(5)].iter().map(|extra| extra as &dyn Stage));
                chain.set_stages(&stages).unwrap();
            }
            0 if !outside.is_empty() => {
                let name = &names[next(names.len())];
                let positions = [Position::First, Position::Last, Position::Before(name), Position::After(name)];
                chain.insert(positions[next(4)], outside[next(outside.len())]).unwrap();
            }
            1 if !inside.is_empty() => chain.remove(inside[next(inside.len())].name()).unwrap(),
            2 if !inside.is_empty() && !outside.is_empty() => {
                chain.replace(inside[next(inside.len())].name(), outside[next(outside.len())]).unwrap();
            }
            _ => {
                let mut order: Vec<&str> = names.iter().map(String::as_str).collect();
                for at in (1..order.len()).rev() {
                    order.swap(at, next(at + 1));
                }
                chain.reorder(&order).unwrap();
            }
        }
        assert!(traffic.is_running(), "edit {edit}: {names:?} became {:?}", chain.stages());
    }
    let sent = traffic.stop();
    assert!(sent.allowed > edits as u64, "there was traffic during the edits: {sent:?}");
    let stats = firewall.stats().unwrap();
    assert_eq!(stats.reason(Reason::Denied).packets, sent.denied, "each denied packet met the firewall once");
    // The kernel's own multicast listener reports come on top.
    let others = stats.reason(Reason::DefaultAction).packets - sent.allowed;
    assert!(others < 50, "and so did each allowed one: {others} more");
    chain.detach().unwrap();
}

#[test]
fn a_single_attachment_grows_into_a_chain_under_real_tcp() {
    let pair = Pair::new().unwrap();
    let (firewall, monitor) = (firewall(), monitor("monitor"));
    let attachment = pair.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    let mut chain = attachment.into_pipeline();
    chain.insert(Position::First, &monitor).unwrap();
    // The hosts' own packets, such as router solicitations, may have come before the monitor.
    let before = (firewall.stats().unwrap(), monitor.stats().unwrap());
    for address in pair.server_addr.both() {
        let server = TcpEcho::start(&pair.server, (address, 7).into()).unwrap();
        let echo = tcp_echo(&pair.client, server.addr(), &[42; 20_000], std::time::Duration::from_secs(60)).unwrap();
        assert_eq!(echo, [42; 20_000]);
    }
    let protocols = monitor.protocols().unwrap();
    assert!(protocols.tcp.packets > 10 && protocols.ipv4.packets > 5 && protocols.ipv6.packets > 5, "{protocols:?}");
    let [judged, seen] = [firewall.stats().unwrap().since(&before.0), monitor.stats().unwrap().since(&before.1)];
    assert_eq!(judged.total(), seen.total());
}
