//! Generated packets through the balancer and through a model of it in plain Rust: same verdict, backend and bytes, while
//! the lists of backends change.

mod common;
#[path = "dsr_model/model.rs"]
mod model;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use common::{
    dsr::{Balancer, GATEWAY, Host, arriving, fix_ipv4, mac, neighbour4, neighbour6, network_at, one_hop_further},
    times,
};
use fastrand::Rng;
use model::{Backend, Model, Verdict, What};
use xdpkit::{Action, DsrConfig, DsrService, Reason, ServiceAddr, Stage as _};
use xdpkit_lab::frame::{Frame, extension};

const SIZE: u32 = 1021;
const SEED: u64 = 0x1234_5678_9abc_def0;
const BACKENDS: [Backend; 5] = [11, 12, 13, 14, 15];
const VIPS: [[&str; 2]; 3] = [
    ["192.168.178.100", "2001:db8:b::100"],
    ["192.168.178.101", "2001:db8:b::101"],
    ["203.0.113.9", "2001:db8:ffff::9"],
];
const PORTS: [u16; 4] = [80, 53, 443, 9999];

fn config() -> DsrConfig {
    let day = Duration::from_secs(60 * 60 * 24);
    DsrConfig::default()
        .services(16)
        .table_size(SIZE)
        .backends(60_000)
        .seed(SEED)
        .flows(1 << 20)
        .idle(day)
        .longest_transition(2 * day)
        .udp_grace(day)
        .answers_per_tick(1 << 30)
        .outer_v4("10.200.0.0/16".parse().unwrap())
        .outer_v6("2001:db8:200::/64".parse().unwrap())
}

/// Text, through a tunnel, to backends of the other family, by source only.
const SERVICES: [(&str, bool, bool, bool); 10] = [
    ("tcp/192.168.178.100:80", false, false, false),
    ("tcp/192.168.178.100:*", true, false, false),
    ("udp/192.168.178.100:53", true, true, false),
    ("tcp/192.168.178.101:443", true, true, true),
    ("udp/192.168.178.101:*", false, false, true),
    ("tcp/[2001:db8:b::100]:80", true, false, false),
    ("udp/[2001:db8:b::100]:*", false, false, false),
    ("tcp/[2001:db8:b::101]:*", true, true, false),
    ("udp/[2001:db8:b::101]:53", true, false, true),
    ("udp/203.0.113.9:53", false, false, false),
];

struct Generated {
    source: IpAddr,
    destination: IpAddr,
    identification: u32,
    what: What,
    frame: Vec<u8>,
}

/// `window`: fragments are remembered for half a minute, so identifications do not stay in use for longer.
fn generate(random: &mut Rng, host: &Host, window: u32) -> Generated {
    let family6 = random.bool();
    let source = common::dsr::client(family6, random.u32(..40));
    let destination: IpAddr = match random.u8(..12) {
        0 => "198.51.100.1",
        n => VIPS[usize::from(n) % 3][usize::from(family6)],
    }
    .parse::<IpAddr>()
    .unwrap();
    let destination =
        if destination.is_ipv4() == source.is_ipv4() { destination } else { "2001:db8:dead::1".parse().unwrap() };
    let client_port = 1000 + random.u16(..3);
    let port = if random.u8(..40) == 0 { 0 } else { *random.choice(&PORTS[..]).unwrap() };
    let (from, to) = (SocketAddr::new(source, client_port), SocketAddr::new(destination, port));
    let length = match random.u8(..30) {
        0 => random.usize(1380..1472),
        1..10 => 0,
        _ => random.usize(..200),
    };
    let payload: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
    let identification = window % 1000 * 64 + random.u32(1..60);
    let tcp = random.bool();
    let flags = *random.choice(&[2, 2, 16, 16, 16, 24, 17, 18, 4, 20, 0, 1][..]).unwrap();
    let transport = |frame: Frame| frame.payload(&payload);
    let segment = || if tcp { Frame::tcp(from, to).flags(flags) } else { Frame::udp(from, to) };
    let flow = |first| What::Flow { client_port, port, flags: tcp.then_some(flags), first };
    let (mut frame, what) = match random.u8(..20) {
        0 => {
            let kind = if family6 { (129, 128) } else { (0, 8) };
            let echo = random.bool();
            let number = if echo { kind.1 } else { kind.0 };
            let frame = Frame::icmp(source, destination, number, 0, [1, 2, 3, 4]).payload(&payload);
            (frame, if echo { What::Echo } else { What::Other })
        }
        1 | 2 => {
            // A packet that went to a client, quoted by somebody on the way.
            let client = SocketAddr::new(common::dsr::client(family6, random.u32(..40)), client_port);
            let ours = random.u8(..5) > 0;
            let quoted = match (ours, tcp) {
                (true, true) => Frame::tcp(to, client),
                (true, false) => Frame::udp(to, client),
                (false, _) => Frame::udp(client, to),
            };
            let quoted = quoted.payload(&payload).packet();
            let kinds: &[u8] = if family6 { &[1, 2, 3, 4] } else { &[3, 11, 12] };
            let header = if family6 { 48 } else { 28 };
            let frame = Frame::icmp(source, destination, *random.choice(kinds).unwrap(), 0, [0; 4])
                .payload(&quoted[..random.usize(header..=quoted.len())]);
            (frame, What::Error(ours.then_some((client, port, if tcp { 6 } else { 17 }))))
        }
        3 => (Frame::ip(source, destination, 47).payload(&payload), What::Other),
        4 if tcp => {
            (transport(Frame::tcp(from, to).data_offset(random.u8(..5))), What::Malformed(Reason::TcpDataOffset))
        }
        4 => (transport(Frame::udp(from, to).udp_length(7)), What::Malformed(Reason::UdpLength)),
        5 | 6 => (transport(segment()).fragment(0, true), flow(true)),
        7 | 8 => {
            let protocol = if tcp { 6 } else { 17 };
            let frame = Frame::ip(source, destination, protocol).payload(&payload).fragment(800, random.bool());
            (frame, What::Later { protocol })
        }
        _ => (transport(segment()), flow(false)),
    };
    if !matches!(what, What::Later { .. } | What::Flow { first: true, .. }) && random.u8(..4) == 0 {
        frame = frame.options(&[1; 4]).extension(extension::DESTINATION, &[]);
    }
    for _ in 0..random.u8(..6).saturating_sub(3) {
        frame = frame.vlan(random.u16(..4096));
    }
    if random.bool() {
        frame = frame.dont_fragment();
    }
    let ttl = *random.choice(&[0, 1, 2, 64, 64, 64, 64, 255][..]).unwrap();
    frame = frame.identification(identification).tos(random.u8(..)).ttl(ttl).trailer(&vec![0xee; random.usize(..9)]);
    Generated { source, destination, identification, what, frame: arriving(host, frame).build() }
}

/// What must come of a frame, in bytes; `None` for the outer source of what is not known to have one. Completes the
/// verdict by what the packet's size and hop limit change.
fn expected(host: &Host, model: &Model, g: &Generated, verdict: &mut Verdict) -> Vec<u8> {
    let at = network_at(&g.frame);
    let family6 = g.frame[at] >> 4 == 6;
    if verdict.reason == Reason::EchoAnswered {
        return echo_reply(&g.frame, at, family6, host);
    }
    let Some((service, backend)) = verdict.to else { return g.frame.clone() };
    let (ttl, length) = match family6 {
        false => (g.frame[at + 8], usize::from(u16::from_be_bytes([g.frame[at + 2], g.frame[at + 3]]))),
        true => (g.frame[at + 7], 40 + usize::from(u16::from_be_bytes([g.frame[at + 4], g.frame[at + 5]]))),
    };
    if ttl <= 1 {
        (verdict.action, verdict.reason) = (Action::Pass, Reason::HopLimit);
        return g.frame.clone();
    }
    let service = &model.services[service];
    let outer6 = family6 != service.crossed;
    let overhead = match (service.ipip, outer6) {
        (false, _) => 0,
        (true, false) => 20,
        (true, true) => 40,
    };
    if length + overhead > 1500 {
        let later = matches!(g.what, What::Later { .. });
        if !family6 && (g.frame[at + 6] & 0x40 == 0 || later) {
            (verdict.action, verdict.reason) = (Action::Drop, Reason::TooBig);
            return g.frame.clone();
        }
        (verdict.action, verdict.reason) = (Action::Tx, Reason::TooBigAnswered);
        return too_big(host, g, at, family6, 1500 - overhead as u16);
    }
    let moved = one_hop_further(&g.frame, mac(backend), host.mac);
    if !service.ipip {
        return moved;
    }
    let mut out = moved[..at - 2].to_vec();
    let (tos, protocol) = match family6 {
        false => (moved[at + 1], 4),
        true => (moved[at] << 4 | moved[at + 1] >> 4, 41),
    };
    let hash = verdict.hash.unwrap_or(0);
    if outer6 {
        out.extend([0x86, 0xdd]);
        out.extend((0x6000_0000 | u32::from(tos) << 20 | hash & 0xf_ffff).to_be_bytes());
        out.extend((length as u16).to_be_bytes());
        out.extend([protocol, 64, 0x20, 1, 0xd, 0xb8, 2, 0, 0, 0]);
        out.extend((u64::from(hash) << 32 | u64::from(hash)).to_ne_bytes());
        let IpAddr::V6(to) = neighbour6(backend) else { unreachable!() };
        out.extend(to.octets());
    } else {
        let start = out.len() + 2;
        out.extend([8, 0, 0x45, tos]);
        out.extend((length as u16 + 20).to_be_bytes());
        match family6 {
            true => out.extend([0, 0, 0x40, 0]),
            false => out.extend([moved[at + 4], moved[at + 5], moved[at + 6] & 0x40, 0]),
        }
        out.extend([64, protocol, 0, 0, 10, 200]);
        out.extend(&hash.to_ne_bytes()[2..]);
        let IpAddr::V4(to) = neighbour4(backend) else { unreachable!() };
        out.extend(to.octets());
        fix_ipv4(&mut out, start);
    }
    out.extend(&moved[at..]);
    out
}

fn echo_reply(frame: &[u8], at: usize, family6: bool, host: &Host) -> Vec<u8> {
    let mut out = frame.to_vec();
    out[..6].copy_from_slice(&mac(GATEWAY));
    out[6..12].copy_from_slice(&host.mac);
    let (addresses, size) = if family6 { (at + 8, 16) } else { (at + 12, 4) };
    let (first, second) = out[addresses..addresses + 2 * size].split_at_mut(size);
    first.swap_with_slice(second);
    out[at + if family6 { 7 } else { 8 }] = 64;
    if !family6 {
        fix_ipv4(&mut out, at);
    }
    // The type's byte is the upper one of its word: the sum changes by as much.
    let icmp = (at..)
        .find(|icmp| {
            out[*icmp..].starts_with(&[if family6 { 128 } else { 8 }, 0]) && out[icmp + 4..].starts_with(&[1, 2, 3, 4])
        })
        .unwrap();
    let change: u16 = if family6 { !(128 << 8) } else { !(8 << 8) };
    out[icmp] = if family6 { 129 } else { 0 };
    let sum = u32::from(!u16::from_be_bytes([out[icmp + 2], out[icmp + 3]]))
        + u32::from(change)
        + (u32::from(out[icmp]) << 8);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    out[icmp + 2..icmp + 4].copy_from_slice(&sum.to_be_bytes());
    out
}

fn too_big(host: &Host, g: &Generated, at: usize, family6: bool, mtu: u16) -> Vec<u8> {
    let [high, low] = mtu.to_be_bytes();
    let (answer, quote) = match family6 {
        false => {
            (Frame::icmp(g.destination, g.source, 3, 4, [0, 0, high, low]).dont_fragment().tos(g.frame[at + 1]), 504)
        }
        true => (Frame::icmp(g.destination, g.source, 2, 0, [0, 0, high, low]), 1184),
    };
    let built = answer.payload(&g.frame[at..at + quote]).macs(host.mac, mac(GATEWAY)).build();
    [&built[..12], &g.frame[12..at - 2], &built[12..]].concat()
}

/// Clears the outer source, and what depends on it.
fn without_outer_source(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let at = network_at(&frame);
    if frame[at] >> 4 == 4 {
        frame[at + 10..at + 16].fill(0);
    } else {
        frame[at + 1] &= 0xf0;
        frame[at + 2..at + 4].fill(0);
        frame[at + 8..at + 24].fill(0);
    }
    frame
}

fn name(crossed: bool, family6: bool) -> impl Fn(Backend) -> Vec<u8> {
    move |number| match address(crossed, family6, number) {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(crossed: bool, family6: bool, number: Backend) -> IpAddr {
    if family6 != crossed { neighbour6(number) } else { neighbour4(number) }
}

/// Changes one service's list in the balancer and in the model.
fn change(random: &mut Rng, b: &Balancer<'_>, model: &mut Model) {
    let at = random.usize(..model.services.len());
    let (service, crossed): (ServiceAddr, _) = (model.services[at].address, model.services[at].crossed);
    let family6 = service.address.is_ipv6();
    if random.u8(..5) == 0 {
        let number = *random.choice(&BACKENDS[..]).unwrap();
        let listed = b.balancer.backends(service).unwrap();
        let is_there = listed.iter().any(|entry| {
            entry.address == address(crossed, family6, number) && entry.state != xdpkit::BackendState::Killed
        });
        if is_there {
            while b.balancer.kill(service, address(crossed, family6, number)).is_ok() {}
            model.kill(at, number, name(crossed, family6));
        }
        return;
    }
    let mut list: Vec<(Backend, u32)> = Vec::new();
    for number in BACKENDS {
        if random.u8(..3) > 0 {
            list.push((number, random.u32(1..4)));
        }
    }
    let addresses: Vec<_> = list.iter().map(|(number, weight)| (address(crossed, family6, *number), *weight)).collect();
    b.host.ns.run(|| b.balancer.set_backends(service, addresses)).unwrap();
    model.set(at, &list, name(crossed, family6));
}

#[test]
fn generated_packets_get_what_the_model_says() {
    let seed = 2024;
    let mut random = Rng::with_seed(seed);
    let host = Host::new();
    let b = host.balancer(&config());
    let mut model = Model::new(SIZE, SEED);
    for (text, ipip, crossed, by_source) in SERVICES {
        let kind = if ipip { DsrService::ipip() } else { DsrService::l2() };
        b.service(text, kind.by_source(by_source), &[]);
        model.add(text.parse().unwrap(), ipip, crossed, by_source);
    }
    let count = times(60_000, 1_000_000, 1_000);
    let batch = 500;
    let mut reasons: BTreeMap<(Reason, u32), u64> = BTreeMap::new();
    for round in 0..count / batch {
        for _ in 0..if round == 0 { 40 } else { random.usize(..3) } {
            change(&mut random, &b, &mut model);
        }
        let generated: Vec<_> = (0..batch).map(|_| generate(&mut random, &host, (round / 50) as u32)).collect();
        let frames: Vec<_> = generated.iter().map(|g| g.frame.clone()).collect();
        for (g, (action, out)) in generated.iter().zip(b.run_all(&frames)) {
            let mut verdict = model.judge(g.source, g.destination, g.identification, g.what);
            let wanted = expected(&host, &model, g, &mut verdict);
            *reasons.entry((verdict.reason, verdict.action as u32)).or_default() += 1;
            let about = || format!("seed {seed}, round {round}: {:?}\n{verdict:?}\n{:02x?}", g.what, g.frame);
            assert_eq!(action, verdict.action, "{}", about());
            if action == Action::Drop {
                continue;
            }
            let unknown = verdict.to.is_some_and(|(service, _)| model.services[service].ipip) && verdict.hash.is_none();
            if unknown && verdict.reason == Reason::Forwarded {
                assert_eq!(without_outer_source(&out), without_outer_source(&wanted), "{}", about());
            } else {
                assert_eq!(out, wanted, "{}", about());
            }
        }
    }
    let counted: BTreeMap<_, _> = b
        .balancer
        .stats()
        .unwrap()
        .reasons
        .iter()
        .map(|line| ((line.reason, line.action as u32), line.count.packets))
        .collect();
    assert_eq!(counted, reasons, "every packet under the reason that the model gives");
    assert!(reasons.len() >= 14, "all of them occur: {reasons:?}");
    assert!(b.balancer.recorded_flows() > 10 || common::is_emulated());
}
