//! Pages through every balancer, by every kind of device that a host has between its cards and its addresses; what was counted
//! as sent is what arrived.

use std::{
    cell::{Cell, RefCell},
    io::{self, Write as _},
    net::SocketAddr,
    time::{Duration, Instant},
};

use xdpkit::{Action, Reason, Stats};
use xdpkit_lab::{PacketSocket, traffic::http_get};

use crate::{
    balancers::{Balancers, METHODS, Method, PORTS},
    common::{is_emulated, times},
    lab::{FAMILIES, FAR, Host, Lab, NEAR},
};

const BACKENDS: u8 = 2;

/// How long a page may take whose packets may be repeated, and the equality of counters that another CPU counts.
fn patience() -> Duration {
    Duration::from_secs(if is_emulated() { 10 } else { 4 })
}

/// TCP segments on the wire by their port of the service.
struct Wire {
    socket: PacketSocket,
    /// Of segments from the service instead of those to it.
    from: bool,
    counts: RefCell<[u64; PORTS.len()]>,
    /// Of all, those that have not crossed exactly one router.
    strayed: Cell<u64>,
}

/// The hop limit of Linux's packets after one router.
const ONE_HOP: u8 = 63;

impl Wire {
    fn count(&self, port: u16) -> u64 {
        let mut counts = self.counts.borrow_mut();
        let take = |frame: &[u8]| {
            let found = tcp_ports(frame).map(|(from, to)| if self.from { from } else { to });
            if let Some(at) = PORTS.iter().position(|port| found == Some(*port)) {
                counts[at] += 1;
                let hops = frame[if frame[12..14] == [8, 0] { 22 } else { 21 }];
                self.strayed.set(self.strayed.get() + u64::from(hops != ONE_HOP));
            }
        };
        self.socket.drain(&mut Vec::new(), take).unwrap();
        assert_eq!(self.socket.lost().unwrap(), 0);
        PORTS.iter().zip(*counts).find(|(other, _)| **other == port).expect("a service's port").1
    }
}

/// Source and destination port of an untagged TCP segment.
fn tcp_ports(frame: &[u8]) -> Option<(u16, u16)> {
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let at = match (word(12)?, *frame.get(23)?, *frame.get(20)?) {
        (0x0800, 6, _) => 14 + usize::from(frame[14] & 15) * 4,
        (0x86dd, _, 6) => 54,
        _ => return None,
    };
    Some((word(at)?, word(at + 2)?))
}

/// What a balancer says that it sent, and what arrived, in comparable numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sent {
    forwarded: u64,
    answered: u64,
    /// What the host's stack was given to send.
    by_stack: u64,
    transmitted: u64,
    dropped: u64,
    at_backends: u64,
    at_client: u64,
    strayed: u64,
}

impl Sent {
    fn of(stats: &Stats, [at_backends, at_client, strayed]: [u64; 3]) -> Self {
        let of = |name: &str| -> u64 {
            let lines = stats.reasons.iter().filter(|line| line.reason.name() == name);
            lines.map(|line| line.count.packets).sum()
        };
        Self {
            forwarded: stats.reason(Reason::Forwarded).packets,
            answered: stats.reason(Reason::Answered).packets,
            by_stack: of("via_stack") + of("unresolved"),
            transmitted: [Action::Tx, Action::Redirect].map(|action| stats.action(action).packets).iter().sum(),
            dropped: stats.dropped().packets,
            at_backends,
            at_client,
            strayed,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            forwarded: self.forwarded - before.forwarded,
            answered: self.answered - before.answered,
            by_stack: self.by_stack - before.by_stack,
            transmitted: self.transmitted - before.transmitted,
            dropped: self.dropped - before.dropped,
            at_backends: self.at_backends - before.at_backends,
            at_client: self.at_client - before.at_client,
            strayed: self.strayed - before.strayed,
        }
    }

    fn is_true(self) -> bool {
        let counted = self.forwarded + self.answered;
        self.transmitted == counted
            && self.dropped == 0
            && self.strayed == 0
            && self.forwarded <= self.at_backends
            && self.answered <= self.at_client
            && counted + self.by_stack == self.at_backends + self.at_client
    }
}

struct Net {
    lab: Lab,
    balancers: Balancers,
    backends: Vec<Wire>,
    client: Wire,
}

impl Net {
    fn sent(&self, method: Method) -> Sent {
        let port = method.target(false).port();
        let at_backends = self.backends.iter().map(|wire| wire.count(port)).sum();
        let at_client = if method.is_nat() { self.client.count(port) } else { 0 };
        let strayed = self.backends.iter().chain([&self.client]).map(|wire| wire.strayed.get()).sum();
        Sent::of(&self.balancers.stats(method), [at_backends, at_client, strayed])
    }

    /// Pages come by a method, from both backends, and counters are true.
    fn row(&self, host: Host, method: Method, family6: bool) -> Result<(), String> {
        let target = method.target(family6);
        // The first ones may find neighbours and next hops unknown.
        let fetch = || http_get(&self.lab.client, target, "/", patience()).map_err(|error| error.to_string());
        let before = self.settled(method);
        let first = (0..2).try_for_each(|_| fetch().map(drop));
        if host == Host::Macvlan && method == Method::L2 {
            // The packet's destination is not the backend's address: no stack can send it on.
            let sent = self.sent(method).since(before);
            let right = first.is_err() && sent.forwarded == 0 && sent.at_backends == 0 && sent.dropped > 0;
            return if right { Ok(()) } else { Err(format!("expected counted drops: {first:?}, {sent:?}")) };
        }
        first
            .map_err(|error| format!("{error}; {:?} {:?}", self.sent(method), self.balancers.stats(method).reasons))?;
        // A bridge may have to learn first where a neighbour is.
        let end = Instant::now() + patience();
        let mut before = self.settled(method);
        while host != Host::Macvlan && Instant::now() < end {
            fetch().map_err(|error| format!("after {before:?}: {error}"))?;
            let now = self.settled(method);
            let by_stack = now.since(before).by_stack;
            before = now;
            if by_stack == 0 {
                break;
            }
        }
        let count = times(8, 200, 3);
        let pages = (0..count).map(|_| fetch()).collect::<Result<Vec<_>, _>>();
        let pages = pages.map_err(|error| format!("after {before:?}: {error}"))?;
        let end = Instant::now() + patience();
        loop {
            let sent = self.sent(method).since(before);
            let native = sent.by_stack == 0 || host == Host::Macvlan;
            if sent.is_true() && native && sent.at_backends >= 4 * count as u64 {
                break;
            }
            if Instant::now() > end {
                return Err(format!("{count} pages came, but {sent:?}"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        match pages.iter().all(|page| page == b"0" || page == b"1") {
            true => Ok(()),
            false => Err(format!("strange pages: {pages:?}")),
        }
    }

    /// What was sent until nothing moves.
    fn settled(&self, method: Method) -> Sent {
        let mut last = self.sent(method);
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.sent(method);
            if now == last {
                return now;
            }
            last = now;
        }
    }
}

/// Whether pages come by the kernel's own forwarding, to the addresses by which the balancer reaches the backends.
fn control(lab: &Lab) {
    for family6 in FAMILIES {
        for address in [FAR, NEAR].into_iter().flat_map(|net| lab.backend_ips(family6, net)) {
            let page = http_get(&lab.client, SocketAddr::new(address, PORTS[0]), "/", Duration::from_secs(60));
            page.unwrap_or_else(|error| panic!("the kernel's own forwarding: {error}"));
        }
    }
}

/// The laboratory; `None`, and a line that says so, where this kernel has no such devices: those of the guests have all.
pub(crate) fn lab_of(host: Host, backends: u8, second_path: bool) -> Option<Lab> {
    match Lab::new(host, backends, second_path) {
        Err(error) if error.is_unsupported() && !is_emulated() => {
            not_run(host, &format!("this kernel has no such devices ({error}); see `./x vm`"));
            None
        }
        lab => Some(lab.unwrap()),
    }
}

/// Says so. Not by `eprintln!`: the test harness would keep it to itself.
fn not_run(host: Host, why: &str) {
    let mut out = io::stderr().lock();
    writeln!(out, "NOT RUN: {host:?}: {why}").unwrap();
}

fn rows(host: Host) {
    // Loading the programs takes half a minute there.
    if is_emulated() && matches!(host, Host::Generic | Host::Bridge | Host::Macvlan) {
        return not_run(host, "`./x test` does");
    }
    let Some(lab) = lab_of(host, BACKENDS, false) else { return };
    let _pages = lab.pages(&PORTS);
    control(&lab);
    let balancers = Balancers::start(&lab);
    let wire = |ns, from| Wire {
        socket: PacketSocket::open(ns, "eth0").unwrap(),
        from,
        counts: RefCell::default(),
        strayed: Cell::new(0),
    };
    let backends = lab.backends.iter().map(|ns| wire(ns, false)).collect();
    let client = wire(&lab.client, true);
    let net = Net { lab, balancers, backends, client };
    let mut wrong = net.balancers.refused.clone();
    for (method, family6) in METHODS.into_iter().flat_map(|method| FAMILIES.map(|family6| (method, family6))) {
        if let Err(error) = net.row(host, method, family6) {
            wrong.push(format!("{host:?} {method:?} {}: {error}", if family6 { "IPv6" } else { "IPv4" }));
        }
    }
    assert!(wrong.is_empty(), "{host:?}:\n{}", wrong.join("\n"));
}

#[test]
fn plain_cards() {
    rows(Host::Plain);
}

#[test]
fn generic_mode() {
    rows(Host::Generic);
}

#[test]
fn bridges() {
    rows(Host::Bridge);
}

#[test]
fn macvlans() {
    rows(Host::Macvlan);
}

#[test]
fn a_bridge_that_filters_vlans() {
    rows(Host::FilteringBridge);
}

#[test]
fn vlans() {
    rows(Host::Vlan);
}

#[test]
fn service_vlans() {
    rows(Host::ServiceVlan);
}

#[test]
fn vlans_in_service_vlans() {
    rows(Host::StackedVlan);
}

#[test]
fn a_router_on_a_stick() {
    rows(Host::Trunk);
}

#[test]
fn bonds() {
    rows(Host::Bond);
}

#[test]
fn a_trunk_of_a_bond() {
    rows(Host::VlanOnBond);
}

#[test]
fn a_vrf() {
    rows(Host::Vrf);
}
