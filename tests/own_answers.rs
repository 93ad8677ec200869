//! The balancers' own answers: that their checksums are right from scratch, and that they keep to their ration. Trap A7.

mod common;

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use common::{
    dsr::{self, GATEWAY, Host, arriving, mac, neighbour4, neighbours, segment, service_text},
    nat::{Bench, ip},
};
use xdpkit::{Action, DsrService, NatConfig, NatMode, Reason};
use xdpkit_lab::frame::{Frame, checksum};

/// An echo request of zeroes only has no sum but that of its type: its reply has none at all, and the checksum of nothing
/// is ffff. The first is what RFC 1624's equation cannot know.
fn requests(client: IpAddr, vip: IpAddr) -> Vec<(Frame, Frame)> {
    let kind = if vip.is_ipv4() { 0 } else { 129 };
    let pair = |id: u16, seq: u16, payload: &[u8]| {
        let [a, b] = id.to_be_bytes();
        let [c, d] = seq.to_be_bytes();
        let reply = Frame::icmp(vip, client, kind, 0, [a, b, c, d]);
        (Frame::echo(client, vip, id, seq).payload(payload), reply.payload(payload))
    };
    let mut pairs: Vec<_> = [0, 1, 2, 3, 4, 8, 17, 100, 1400].map(|length| pair(0, 0, &vec![0; length])).into();
    // What sums up to all ones is something, and has the checksum 0.
    pairs.push(pair(0xffff, 0, &[]));
    pairs.push(pair(0x1234, 0xedcb, &[0; 9]));
    pairs.push(pair(0, 0, &[0, 0, 0xff, 0xff]));
    pairs.push(pair(0, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfe, 0xff, 1]));
    pairs.push(pair(0, 0, &[&[0; 1396][..], &[0xf0, 0, 0x0f, 0xff]].concat()));
    pairs.extend((0..=u16::MAX).step_by(257).map(|id| pair(id, !id, &[7; 5])));
    pairs
}

/// The checksum as RFC 1071 defines it, over all of the message and what IPv6 puts before it.
fn sum_is_right(frame: &[u8], vip: IpAddr) {
    let message = if vip.is_ipv4() { &frame[34..] } else { &frame[54..] };
    let mut bytes = Vec::new();
    if vip.is_ipv6() {
        bytes.extend(&frame[22..54]);
        bytes.extend((message.len() as u32).to_be_bytes());
        bytes.extend([0, 0, 0, 58]);
    }
    bytes.extend(&message[..2]);
    bytes.extend([0, 0]);
    bytes.extend(&message[4..]);
    assert_eq!(message[2..4], checksum(&bytes).to_be_bytes(), "{frame:02x?}");
}

#[test]
fn l22_the_reply_to_an_echo_request_of_zeroes_has_the_checksum_of_nothing() {
    let host = Host::new();
    let b = host.balancer(&dsr::config().answers_per_second(u32::MAX));
    let bench = Bench::with_services(&NatConfig::default().answers_per_second(u32::MAX), NatMode::Full);
    for family6 in [false, true] {
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &neighbours(family6, &[11]));
        let (client, vip) = (dsr::client(family6, 3), dsr::vip(family6));
        for (request, reply) in requests(client, vip) {
            let (action, reason, out) = b.run(&arriving(&host, request).build());
            assert_eq!((action, reason), (Action::Tx, Reason::EchoAnswered));
            sum_is_right(&out, vip);
            assert_eq!(out, reply.macs(host.mac, mac(GATEWAY)).build());
        }
        let [client, vip] =
            if family6 { ["2001:db8:a::20", "2001:db8:a::100"] } else { ["10.0.0.20", "10.0.0.100"] }.map(ip);
        for (request, reply) in requests(client, vip) {
            let outcome = bench.client_sends(&request);
            assert_eq!((outcome.action, outcome.reason), (Action::Tx, Reason::EchoAnswered));
            sum_is_right(&outcome.frame, vip);
            let (from, to) = bench.macs_to_clients();
            assert_eq!(outcome.frame, reply.macs(from, to).build());
        }
    }
    // The frame that was seen to be wrong.
    let text = "tcp/192.0.2.80:80";
    b.service(text, DsrService::l2(), &neighbours(false, &[11]));
    let frame =
        "0200 0000 001b 0200 0000 00c1 0800 4500 001c 0000 0000 4001 8e56 c633 6407 c000 0250 0800 f7ff 0000 0000";
    let digits: Vec<_> = frame.chars().filter(|digit| !digit.is_whitespace()).collect();
    let mut frame: Vec<u8> =
        digits.chunks(2).map(|pair| u8::from_str_radix(&String::from_iter(pair), 16).unwrap()).collect();
    frame[..6].copy_from_slice(&host.mac);
    let (_, reason, out) = b.run(&frame);
    assert_eq!((reason, &out[34..38]), (Reason::EchoAnswered, &[0, 0, 0xff, 0xff][..]));
}

/// Asks on two CPUs at once until `wanted` answers have come, and answers how long that took.
fn until_answered(wanted: u64, ask: impl Fn() -> bool + Sync) -> Duration {
    let (start, answered) = (Instant::now(), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while answered.load(Ordering::Relaxed) < wanted {
                    assert!(start.elapsed() < Duration::from_secs(120), "{answered:?} of {wanted} came");
                    answered.fetch_add(u64::from(ask()), Ordering::Relaxed);
                }
            });
        }
    });
    start.elapsed()
}

/// A tenth of a second's answers may come at once, and one; then each when its time has come. A coarse clock steps by 10 ms.
fn is_rationed(rate: u32, wanted: u64, ask: impl Fn() -> bool + Sync) {
    let took = until_answered(wanted, ask);
    let at_once = u64::from(rate.div_ceil(10)) + 2;
    let least = Duration::from_secs_f64((wanted - at_once) as f64 / f64::from(rate)) - Duration::from_millis(10);
    assert!(took >= least, "{wanted} answers at {rate}/s took {took:?}, less than {least:?}");
}

#[test]
fn a7_answers_are_rationed_by_the_second_on_all_cpus_together() {
    let host = Host::new();
    let bench = Bench::with_services(&NatConfig::default().answers_per_second(10), NatMode::Full);
    let b = host.balancer(&dsr::config().answers_per_second(10));
    b.service(&service_text("tcp", false, "80"), DsrService::ipip(), &[neighbour4(11)]);
    let echo = arriving(&host, Frame::echo(dsr::client(false, 3), dsr::vip(false), 1, 2)).build();
    let big = arriving(&host, segment(false, 7, 7000).payload(&[0; 1460]).dont_fragment()).build();
    let answers = |frame: &Vec<u8>| b.run_all(std::slice::from_ref(frame))[0].0 == Action::Tx;
    is_rationed(10, 20, || answers(&echo));
    is_rationed(10, 20, || answers(&big));
    // One ration for both.
    is_rationed(10, 20, || answers(&echo) | answers(&big));
    b.balancer.configure(&dsr::config().answers_per_second(500)).unwrap();
    is_rationed(500, 1000, || answers(&echo));

    let stats = b.balancer.stats().unwrap();
    use xdpkit::Stage as _;
    let limited = stats.reasons.iter().find(|line| line.reason == Reason::AnswerLimited).unwrap();
    assert_eq!(limited.action, Action::Drop, "an echo request without an answer is nobody else's to answer");

    let (from, to) = bench.macs_of_clients();
    let echo = Frame::echo(ip("10.0.0.20"), ip("10.0.0.100"), 1, 2).macs(from, to).build();
    let ask = || {
        let request = xdpkit::TestRun::new(&echo).ingress(&bench.front, 0);
        bench.lab.balancer.run(|| bench.balancer.run(&request)).unwrap().action == Action::Tx
    };
    is_rationed(10, 25, ask);
}

#[test]
fn a7_no_answers_at_all_can_be_wanted() {
    let host = Host::new();
    let b = host.balancer(&dsr::config().answers_per_second(0));
    b.service(&service_text("tcp", false, "80"), DsrService::ipip(), &[neighbour4(11)]);
    let echo = arriving(&host, Frame::echo(dsr::client(false, 3), dsr::vip(false), 1, 2)).build();
    assert_eq!(b.run(&echo), (Action::Drop, Reason::AnswerLimited, echo));
    let big = arriving(&host, segment(false, 7, 7000).payload(&[0; 1460]).dont_fragment()).build();
    assert_eq!(b.run(&big).1, Reason::TooBig);
}
