//! A NAT balancer with as many connections as is to be measured: for benchmarks, and for the test of many flows.

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
};

use xdpkit::{ConnectionState, NatBalancer, NatConfig, NatMode, NatService, Reason, ServiceAddr, Stage as _};
use xdpkit_lab::{
    Namespace,
    bench::{Harness, random_v4, random_v6},
    frame::{Frame, tcp},
    veth,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// All tables are made for so many connections.
pub(crate) const CAPACITY: u32 = 1_000_000;
/// So many that a million connections have ports.
const BACKENDS: u8 = 64;
/// Sequence number of the backends' SYNs.
const ISN: u32 = 1000;

/// The balancer's host: its routes and neighbours are those of the thread's namespace that measures. The second is the
/// other end of its link.
pub(crate) fn host() -> Result<(Namespace, Namespace)> {
    let (ns, peer) = (Namespace::new("balancer")?, Namespace::new("peer")?);
    veth((&ns, "eth0"), (&peer, "eth0"))?;
    ns.add_address("eth0", "192.168.178.10/24".parse()?)?;
    ns.add_address("eth0", "2001:db8:b::10/64".parse()?)?;
    ns.enable_forwarding()?;
    for family6 in [false, true] {
        for number in 0..BACKENDS {
            ns.add_neighbour("eth0", backend(family6, number).ip(), MAC)?;
        }
        let gateway: IpAddr = if family6 { "2001:db8:b::1" } else { "192.168.178.1" }.parse()?;
        ns.add_neighbour("eth0", gateway, MAC)?;
        ns.add_default_route(gateway)?;
    }
    Ok((ns, peer))
}

/// Opens all connections, and answers harnesses for both directions of them.
pub(crate) fn establish(balancer: &NatBalancer, family6: bool, clients: &[SocketAddr]) -> Result<(Harness, Harness)> {
    let all = clients.len() as u32;
    let vip = vip(family6);
    let send = |frame: Frame| -> Result<Harness> {
        let harness = Harness::new(&frame.payload(&[0; 18]).build(), clients)?;
        harness.verdict(balancer.program_fd(), all)?;
        Ok(harness)
    };
    send(Frame::tcp(clients[0], vip))?;
    let connections = balancer.connections()?;
    // Among random clients a few come twice.
    assert!(
        connections.len() > clients.len() - clients.len() / 1000,
        "{} connections, {} evicted: {:?}",
        connections.len(),
        balancer.evicted()?,
        balancer.stats()?
    );
    let mut answers: Vec<_> = connections.iter().map(|found| (found.backend, found.source)).collect();
    answers.resize(clients.len(), answers[0]);
    let flows: Vec<_> = answers.iter().map(|(backend, to)| (*backend, to.port())).collect();
    let answer = Frame::tcp(answers[0].0, answers[0].1).payload(&[0; 18]);
    let syn_ack = answer.clone().flags(tcp::SYN | tcp::ACK).sequence(ISN, 2).build();
    Harness::with_ports(&syn_ack, &flows)?.verdict(balancer.program_fd(), all)?;
    let there = send(Frame::tcp(clients[0], vip).flags(tcp::ACK).sequence(2, ISN + 1))?;
    let established = balancer.counts()?.state(ConnectionState::TcpEstablished);
    assert_eq!(established as usize, connections.len(), "{:?}", balancer.counts()?);
    let back = Harness::with_ports(&answer.flags(tcp::ACK).sequence(ISN + 1, 2).build(), &flows)?;
    Ok((there, back))
}

/// Whether a balancer has done nothing but translate. Where there are more connections than half of its capacity, few
/// have gone for others, and theirs are packets of no connection.
pub(crate) fn has_translated(balancer: &NatBalancer) -> Result<()> {
    let stats = balancer.stats()?;
    let translated = stats.reason(Reason::Forwarded).packets + stats.reason(Reason::Answered).packets;
    let all = stats.total().packets;
    assert!(translated >= all - all / 1000, "{translated} of {all} were translated: {:?}", stats.reasons);
    Ok(())
}

/// Nanoseconds for a new connection above the empty program, in a table that is empty at first and a quarter full in the end.
pub(crate) fn new(family6: bool) -> Result<f64> {
    const FLOWS: usize = 1 << 18;
    let clients = if family6 { random_v6(FLOWS) } else { random_v4(FLOWS) };
    let mut least = f64::MAX;
    for _ in 0..5 {
        let balancer = balancer(family6, NatMode::Full)?;
        let harness = Harness::new(&Frame::tcp(clients[0], vip(family6)).payload(&[0; 18]).build(), &clients)?;
        let each = |time: std::time::Duration| time.as_nanos() as f64 / (FLOWS / 2) as f64;
        let empty = each(harness.time(harness.empty(), FLOWS as u64 / 2)?);
        least = least.min(each(harness.time(balancer.program_fd(), FLOWS as u64 / 2)?) - empty);
        assert!(balancer.counts()?.total() > FLOWS as u64 / 2 - FLOWS as u64 / 50);
    }
    Ok(least)
}

fn backend(family6: bool, number: u8) -> SocketAddr {
    let address: IpAddr = if family6 {
        [0x2001, 0xdb8, 0xb, 0, 0, 0, 1, u16::from(number) + 1].into()
    } else {
        [192, 168, 178, 20 + number].into()
    };
    SocketAddr::new(address, 8080)
}

fn vip(family6: bool) -> SocketAddr {
    let vip: IpAddr =
        if family6 { [0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x100].into() } else { [192, 168, 178, 100].into() };
    SocketAddr::new(vip, 80)
}

pub(crate) fn balancer(family6: bool, mode: NatMode) -> Result<NatBalancer> {
    let balancer = NatBalancer::load(&NatConfig::default().capacity(CAPACITY))?;
    let service = NatService::new((0..BACKENDS).map(|number| backend(family6, number))).mode(mode);
    balancer.insert(ServiceAddr::tcp(vip(family6).ip(), 80), &service)?;
    Ok(balancer)
}
