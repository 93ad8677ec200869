//! What becomes of next hops in real namespaces. These need root.

use std::{
    net::IpAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use xdpkit_lab::{Namespace, PacketSocket, XdpPass, frame::Frame, veth};

use super::{
    Host, TICK,
    neighbours::{Change, Neighbours, Station},
    requests::Requests,
};
use crate::{
    abi::next_hop::{Egress, LinkKey, NEXT_HOP_USED, NEXT_HOPS, NextHopKey, mac_word},
    base::{Hop, NextHops, next_hops},
    sys::clock::Clock,
};

const BACKEND: &str = "192.0.2.2";
const BACKEND6: &str = "2001:db8::2";
const ROUTER: &str = "192.0.2.254";
/// Longer than anything takes that is waited for.
const DEADLINE: Duration = Duration::from_secs(60);

pub(super) fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is() {
        assert!(Instant::now() < end, "it never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A host with a table, and another on its interface.
struct Bed {
    ns: Namespace,
    peer: Namespace,
    host: Arc<Host>,
    table: Arc<NextHops>,
    _pass: XdpPass,
}

impl Bed {
    fn new(wanted: &[&str]) -> Self {
        let [ns, peer] = ["host", "peer"].map(|name| Namespace::new(name).unwrap());
        veth((&ns, "eth0"), (&peer, "eth0")).unwrap();
        for (ns, nets) in [
            (&ns, &["192.0.2.1/24", "2001:db8::1/64"][..]),
            (&peer, &["192.0.2.2/24", "192.0.2.254/24", "2001:db8::2/64"]),
        ] {
            nets.iter().for_each(|net| ns.add_address("eth0", net.parse().unwrap()).unwrap());
        }
        let _pass = peer.xdp_pass("eth0").unwrap();
        let host = ns.run(Host::here).unwrap();
        let table = Arc::new(next_hops());
        let addresses: Vec<_> = wanted.iter().copied().map(ip).collect();
        table.want(move || addresses.clone());
        host.serve(&table).unwrap();
        Self { ns, peer, host, table, _pass }
    }

    fn interface(&self) -> u32 {
        self.ns.ifindex("eth0").unwrap()
    }

    fn key(&self, address: &str) -> NextHopKey {
        NextHopKey { interface: self.interface(), address: ip(address), mtu: 1500 }
    }

    /// The entry of a neighbour.
    fn entry(&self, key: NextHopKey) -> Option<u32> {
        (1..NEXT_HOPS)
            .find(|number| self.table.state(*number).0 == NEXT_HOP_USED && self.table.key(*number) == Some(key))
    }

    fn hop(&self, address: &str) -> Hop {
        self.table.hop(self.entry(self.key(address)).expect("it has an entry"))
    }

    /// Waits until frames to this neighbour have that address.
    fn resolved(&self, address: &str, mac: [u8; 6]) {
        eventually(&format!("{address} is at {mac:02x?}"), || self.hop(address).to == mac_word(mac));
    }

    fn peer_mac(&self) -> [u8; 6] {
        self.peer.mac("eth0").unwrap()
    }

    fn generation_is_raised_by(&self, what: impl FnOnce()) {
        let before = self.table.generation();
        what();
        eventually("the generation is raised", || self.table.generation() != before);
    }
}

/// An announcement (RFC 5227) from where the address is now.
fn announce(ns: &Namespace, dev: &str, mac: [u8; 6], address: [u8; 4]) {
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &mac, &address, &mac, &address].concat();
    let frame = Frame::ethernet(0x0806).macs(mac, [0xff; 6]).payload(&arp).build();
    PacketSocket::open(ns, dev).unwrap().send(&frame).unwrap();
}

#[test]
fn wanted_addresses_are_resolved_before_any_packet() {
    let bed = Bed::new(&[BACKEND, BACKEND6, "198.51.100.1"]);
    assert!(bed.entry(bed.key(BACKEND)).is_some(), "when `serve` returns");
    for address in [BACKEND, BACKEND6] {
        bed.resolved(address, bed.peer_mac());
        let egress = Egress::Device(bed.interface(), vec![]).word();
        assert_eq!(bed.hop(address).from, mac_word(bed.ns.mac("eth0").unwrap()));
        assert_eq!(bed.hop(address).egress, egress);
        let links = bed.table.links();
        let info = links.get(&LinkKey { device: bed.interface(), tags: 0 }).unwrap().unwrap();
        assert_eq!((info.egress, info.layer3), (egress, bed.interface()));
    }
    // There is no route to the third, until there is one.
    bed.ns.add_default_route(ip(ROUTER)).unwrap();
    eventually("the router has an entry", || bed.entry(bed.key(ROUTER)).is_some());
    bed.resolved(ROUTER, bed.peer_mac());
    bed.host.serve(&bed.table).unwrap();
}

#[test]
fn entries_of_programs_are_resolved() {
    let bed = Bed::new(&[]);
    bed.table.find_or_make(&bed.key(BACKEND), Clock::new().unwrap().now().unwrap()).unwrap();
    bed.resolved(BACKEND, bed.peer_mac());
}

#[test]
fn an_announced_mac_is_followed() {
    let bed = Bed::new(&[BACKEND]);
    bed.resolved(BACKEND, bed.peer_mac());
    let mac = [2, 0, 0, 0, 9, 9];
    bed.generation_is_raised_by(|| {
        announce(&bed.peer, "eth0", mac, [192, 0, 2, 2]);
        bed.resolved(BACKEND, mac);
    });
}

#[test]
fn a_neighbour_that_was_deleted_is_resolved_again() {
    let bed = Bed::new(&[BACKEND]);
    bed.resolved(BACKEND, bed.peer_mac());
    let mac = [2, 0, 0, 0, 9, 9];
    bed.peer.set_mac("eth0", mac).unwrap();
    bed.ns.forget_neighbour("eth0", ip(BACKEND)).unwrap();
    bed.resolved(BACKEND, mac);
}

#[test]
fn a_mac_that_changes_in_silence_is_followed() {
    let bed = Bed::new(&[]);
    for (key, value) in
        [("base_reachable_time_ms", "1000"), ("delay_first_probe_time", "1"), ("retrans_time_ms", "100")]
    {
        bed.ns.sysctl(&format!("net.ipv4.neigh.eth0.{key}"), value).unwrap();
    }
    bed.table.want(|| vec![ip(BACKEND)]);
    eventually("it has an entry", || bed.entry(bed.key(BACKEND)).is_some());
    bed.resolved(BACKEND, bed.peer_mac());
    let mac = [2, 0, 0, 0, 9, 9];
    bed.peer.set_mac("eth0", mac).unwrap();
    bed.resolved(BACKEND, mac);
}

#[test]
fn what_the_administrator_has_written_stays() {
    let bed = Bed::new(&[]);
    let mac = [2, 0, 0, 0, 9, 9];
    bed.ns.add_neighbour("eth0", ip(BACKEND), mac).unwrap();
    bed.table.want(|| vec![ip(BACKEND)]);
    eventually("it has an entry", || bed.entry(bed.key(BACKEND)).is_some());
    bed.resolved(BACKEND, mac);
    // The interval of looking at it.
    let mut requests = bed.ns.run(Requests::open).unwrap();
    for _ in 0..3 {
        thread::sleep(TICK);
        let links = requests.links().unwrap();
        let neighbours = Neighbours::of(requests.neighbours(&links).unwrap());
        let neighbour = neighbours.get((bed.interface(), ip(BACKEND))).unwrap();
        assert!(!neighbour.managed && neighbour.mac == Some(mac), "{neighbour:?}");
    }
}

#[test]
fn neighbours_are_left_alone_at_the_end_unless_programs_go_on() {
    for pinned in [false, true] {
        let bed = Bed::new(&[BACKEND]);
        bed.resolved(BACKEND, bed.peer_mac());
        if pinned {
            bed.table.set_pinned();
        }
        let mut requests = bed.ns.run(Requests::open).unwrap();
        let links = requests.links().unwrap();
        let place = (bed.interface(), ip(BACKEND));
        let mut managed = || {
            Neighbours::of(requests.neighbours(&links).unwrap()).get(place).is_some_and(|neighbour| neighbour.managed)
        };
        assert!(managed());
        // The pinned one is heard of with a tick.
        let lease = bed.table.lease();
        eventually("the table is looked at", || bed.table.lease() != lease);
        let Bed { ns: _ns, peer: _peer, host, table, _pass } = bed;
        drop((host, table));
        eventually("the host is forgotten", || managed() == pinned);
    }
}

#[test]
fn a_veth_end_that_transmits_from_now_on_is_used() {
    let bed = Bed::new(&[]);
    let other = Namespace::new("other").unwrap();
    veth((&bed.ns, "eth1"), (&other, "eth0")).unwrap();
    let device = bed.ns.ifindex("eth1").unwrap();
    let egress = || bed.table.links().get(&LinkKey { device, tags: 0 }).unwrap().map(|info| info.egress);
    if !crate::sys::kernel_older_than(6, 3) {
        eventually("nobody receives there", || egress() == Some(Egress::Stack(device, vec![]).word()));
    }
    let _pass = other.xdp_pass("eth0").unwrap();
    eventually("it is used", || egress() == Some(Egress::Device(device, vec![]).word()));
}

#[test]
fn changes_of_routes_addresses_and_links_raise_the_generation() {
    let bed = Bed::new(&[]);
    bed.generation_is_raised_by(|| bed.ns.add_route("198.51.100.0/24".parse().unwrap(), ip(ROUTER)).unwrap());
    bed.generation_is_raised_by(|| bed.ns.add_route("2001:db8:1::/64".parse().unwrap(), ip(BACKEND6)).unwrap());
    bed.generation_is_raised_by(|| bed.ns.add_address("eth0", "203.0.113.1/24".parse().unwrap()).unwrap());
    bed.generation_is_raised_by(|| bed.ns.enable_forwarding().unwrap());
    bed.generation_is_raised_by(|| bed.ns.set_mtu("eth0", 1400).unwrap());
}

#[test]
fn nothing_leaves_by_a_link_that_is_down() {
    let bed = Bed::new(&[]);
    bed.table.find_or_make(&bed.key(BACKEND), Clock::new().unwrap().now().unwrap()).unwrap();
    bed.resolved(BACKEND, bed.peer_mac());
    let egress = bed.hop(BACKEND).egress;
    bed.generation_is_raised_by(|| bed.peer.set_down("eth0").unwrap());
    eventually("the egress is gone", || bed.hop(BACKEND).egress == Egress::None.word());
    bed.peer.set_up("eth0").unwrap();
    eventually("the egress is back", || bed.hop(BACKEND).egress == egress);
    bed.resolved(BACKEND, bed.peer_mac());
    bed.ns.delete_link("eth0").unwrap();
    eventually("the links are gone", || bed.table.links().entries().unwrap().len() == 1);
}

#[test]
fn only_the_stack_sends_by_what_transmits_no_frames() {
    let bed = Bed::new(&[]);
    bed.ns.add_macvlan("mac0", "eth0", [2, 0, 0, 0, 9, 9]).unwrap();
    let _tun = bed.ns.add_tun("tun0").unwrap();
    for dev in ["mac0", "tun0"] {
        let device = bed.ns.ifindex(dev).unwrap();
        let egress = || bed.table.links().get(&LinkKey { device, tags: 0 }).unwrap().map(|info| info.egress);
        eventually(dev, || egress() == Some(Egress::Stack(device, vec![]).word()));
    }
    // But for programs in generic mode.
    bed.table.set_generic(true);
    let exits = || {
        ["mac0", "tun0"].map(|dev| {
            let device = bed.ns.ifindex(dev).unwrap();
            bed.table.links().get(&LinkKey { device, tags: 0 }).unwrap().map(|info| info.egress >> 60)
        })
    };
    eventually("the macvlan transmits, the tunnel does not", || exits() == [Some(1), Some(2)]);
}

#[test]
fn leases_are_renewed_until_the_host_is_dropped() {
    let clock = Clock::new().unwrap();
    let bed = Bed::new(&[]);
    let left = |table: &NextHops| table.lease().cast_signed() - clock.now_whole().unwrap().cast_signed();
    assert!(left(&bed.table) <= i64::from(clock.hertz()) / 2);
    eventually("it is vouched for", || left(&bed.table) > 0);
    let lease = bed.table.lease();
    eventually("it is renewed", || bed.table.lease() != lease);
    let table = Arc::clone(&bed.table);
    drop(bed);
    eventually("it lapses", || left(&table) < 0);
    let lease = table.lease();
    thread::sleep(3 * TICK);
    assert_eq!(table.lease(), lease);
}

#[test]
fn a_table_that_was_led_before_begins_with_another_generation() {
    let bed = Bed::new(&[]);
    let (table, generation) = (Arc::clone(&bed.table), bed.table.generation());
    let Bed { ns, peer: _peer, host, _pass, .. } = bed;
    drop(host);
    let clock = Clock::new().unwrap();
    eventually("the lease lapses", || table.lease() < clock.now_whole().unwrap());
    let host = ns.run(Host::here).unwrap();
    host.serve(&table).unwrap();
    assert_ne!(table.generation(), generation);
}

#[test]
fn a_bridge_sends_where_the_station_is() {
    let [ns, a, b] = ["host", "a", "b"].map(|name| Namespace::new(name).unwrap());
    veth((&ns, "port0"), (&a, "eth0")).unwrap();
    veth((&ns, "port1"), (&b, "eth0")).unwrap();
    let _passes = [&a, &b].map(|ns| ns.xdp_pass("eth0").unwrap());
    ns.add_bridge("br0", &["port0", "port1"]).unwrap();
    ns.add_address("br0", "192.0.2.1/24".parse().unwrap()).unwrap();
    a.add_address("eth0", "192.0.2.2/24".parse().unwrap()).unwrap();
    // Nothing but the resolver asks anything of the neighbour again.
    ns.sysctl("net.ipv4.neigh.br0.base_reachable_time_ms", "3600000").unwrap();
    let host = ns.run(Host::here).unwrap();
    let table = Arc::new(next_hops());
    table.want(|| vec![ip(BACKEND)]);
    host.serve(&table).unwrap();
    let index = |dev| ns.ifindex(dev).unwrap();
    let key = NextHopKey { interface: index("br0"), address: ip(BACKEND), mtu: 1500 };
    let number = table.find_or_make(&key, 0).unwrap();
    let leaves_by = |dev| {
        let egress = Egress::Device(index(dev), vec![]).word();
        eventually(dev, || table.hop(number).egress == egress);
    };
    leaves_by("port0");
    let mac = a.mac("eth0").unwrap();
    assert_eq!(table.hop(number).to, mac_word(mac));
    assert_eq!(table.hop(number).from, mac_word(ns.mac("br0").unwrap()));
    let info = |device| table.links().get(&LinkKey { device, tags: 0 }).unwrap().unwrap();
    assert_eq!(info(index("port1")).layer3, index("br0"));
    assert_eq!(info(index("br0")).egress, Egress::Bridge.word(), "it depends on the neighbour");

    // What a bridge has forgotten, it is taught again.
    let mut requests = ns.run(Requests::open).unwrap();
    let mut flush = LinkMessage::default();
    flush.header.index = index("br0");
    let data = LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::FdbFlush]));
    flush.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), data])];
    requests.order(RouteNetlinkMessage::NewLink(flush), NLM_F_ACK).unwrap();
    let links = requests.links().unwrap();
    let station = Station { bridge: index("br0"), vlan: 0, mac };
    eventually("the bridge knows the station", || {
        requests.neighbours(&links).unwrap().contains(&Change::Station(station, Some(index("port0"))))
    });
    leaves_by("port0");

    let generation = table.generation();
    announce(&b, "eth0", mac, [192, 0, 2, 2]);
    leaves_by("port1");
    eventually("the generation is raised", || table.generation() != generation);
    b.set_down("eth0").unwrap();
    eventually("the port is down", || table.hop(number).egress != Egress::Device(index("port1"), vec![]).word());
}
