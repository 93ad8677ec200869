//! What happens to flows when the list of backends changes. Traps L15, L16, L17, and floods of SYNs meanwhile.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use crate::common::{
    dsr::{Balancer, Host, arriving, client, neighbour4, neighbour6, segment, service_text, vip},
    times,
};
use xdpkit::{Action, BackendState, DsrConfig, DsrFlow, DsrService, PlacementReason, ServiceAddr, ServiceProtocol};
use xdpkit_lab::frame::{Frame, tcp};

/// Long enough for a slow machine to say something three times in it.
const IDLE: Duration = Duration::from_millis(1500);

fn config() -> DsrConfig {
    DsrConfig::default().services(8).table_size(1021).flows(8192).check_on_link(false)
}

/// A service whose backends are neighbours, told by number.
struct Service<'h> {
    b: Arc<Balancer<'h>>,
    family6: bool,
    address: ServiceAddr,
    protocol: ServiceProtocol,
}

impl<'h> Service<'h> {
    fn new(host: &'h Host, config: &DsrConfig, family6: bool, protocol: &str, port: &str, backends: &[u8]) -> Self {
        Self::of(&Arc::new(host.balancer(config)), family6, protocol, port, backends)
    }

    fn of(b: &Arc<Balancer<'h>>, family6: bool, protocol: &str, port: &str, backends: &[u8]) -> Self {
        let b = Arc::clone(b);
        let list: Vec<_> = backends.iter().map(|number| ip(family6, *number)).collect();
        let address = b.service(&service_text(protocol, family6, port), DsrService::l2(), &list);
        Self { b, family6, address, protocol: address.protocol }
    }

    fn set(&self, backends: &[u8]) {
        let list = backends.iter().map(|number| (ip(self.family6, *number), 1));
        self.b.host.ns.run(|| self.b.balancer.set_backends(self.address, list.collect::<Vec<_>>())).unwrap();
    }

    /// Where a TCP segment of a client goes, by its flags; 0 when it goes nowhere. The look-up says the same before.
    fn send(&self, number: u32, flags: u8) -> u8 {
        let frame = segment(self.family6, number, 9000).flags(flags);
        self.send_frame(frame, number, flags & (tcp::SYN | tcp::ACK) == tcp::SYN)
    }

    fn send_udp(&self, number: u32) -> u8 {
        let from = SocketAddr::new(client(self.family6, number), 9000);
        self.send_frame(Frame::udp(from, SocketAddr::new(vip(self.family6), 80)).payload(b"x"), number, false)
    }

    fn send_frame(&self, frame: Frame, number: u32, opens: bool) -> u8 {
        let (told, _) = self.place(number, opens);
        let went = self.goes(frame);
        assert_eq!(told, went, "the look-up says what happens");
        went
    }

    fn goes(&self, frame: Frame) -> u8 {
        let (action, _, out) = self.b.run(&arriving(self.b.host, frame).build());
        if action == Action::Tx { out[5] } else { 0 }
    }

    fn place(&self, number: u32, opens: bool) -> (u8, PlacementReason) {
        let flow = DsrFlow {
            protocol: self.protocol,
            client: SocketAddr::new(client(self.family6, number), 9000),
            destination: SocketAddr::new(vip(self.family6), 80),
            opens,
        };
        let placement = self.b.balancer.place(flow).expect("for the service");
        let number = placement.backend.map_or(0, |ip| match ip {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            // Written in decimal digits: 2001:db8:b::11.
            std::net::IpAddr::V6(ip) => format!("{:x}", ip.segments()[7]).parse().unwrap(),
        });
        (number, placement.reason)
    }

    fn in_transition(&self) -> u32 {
        self.b.balancer.service(self.address).unwrap().slots_in_transition
    }
}

fn ip(family6: bool, number: u8) -> std::net::IpAddr {
    if family6 { neighbour6(number) } else { neighbour4(number) }
}

/// Both families, one port and any: exact keys and records beside.
fn each(host: &Host, config: &DsrConfig, backends: &[u8], test: impl Fn(&Service<'_>)) {
    for port in ["80", "*"] {
        let b = Arc::new(host.balancer(config));
        for family6 in [false, true] {
            test(&Service::of(&b, family6, "tcp", port, backends));
        }
    }
}

#[test]
fn unknown_flows_stay_new_ones_go_to_the_new_backend() {
    let host = Host::new();
    each(&host, &config(), &[11], |s| {
        assert_eq!((s.send(1, tcp::SYN), s.send(1, tcp::ACK)), (11, 11));
        assert_eq!(s.place(1, false), (11, PlacementReason::Table));
        s.set(&[12]);
        assert_eq!(s.in_transition(), 1021);
        assert_eq!(s.place(1, false), (11, PlacementReason::Previous));
        assert_eq!(s.send(1, tcp::ACK), 11, "unknown: an old flow");
        assert_eq!(s.place(1, false), (11, PlacementReason::Recorded));
        assert_eq!(s.place(2, true), (12, PlacementReason::New));
        assert_eq!((s.send(2, tcp::SYN), s.send(2, tcp::ACK), s.send(2, tcp::ACK | tcp::PSH)), (12, 12, 12));
        assert_eq!(s.send(3, tcp::SYN | tcp::ACK), 11, "not the beginning of a client's flow");
        assert_eq!(s.send(4, tcp::RST), 11, "L15: a reset begins nothing new");
        let entry = s.b.balancer.service(s.address).unwrap();
        assert_eq!((entry.recorded, entry.unrecorded, entry.packets_in_transition), (4, 0, 6));
        let list = s.b.balancer.backends(s.address).unwrap();
        assert_eq!(
            list.iter().map(|e| (e.state, e.slots, e.slots_leaving)).collect::<Vec<_>>(),
            [(BackendState::Leaving, 0, 1021), (BackendState::Active, 1021, 0)]
        );
    });
}

#[test]
fn the_previous_backend_is_the_last_one_without_records_however_often_the_list_changes() {
    let host = Host::new();
    each(&host, &config(), &[11], |s| {
        assert_eq!(s.send(1, tcp::ACK), 11);
        s.set(&[12]);
        assert_eq!((s.send(2, tcp::SYN), s.send(2, tcp::ACK)), (12, 12));
        s.set(&[13]);
        assert_eq!((s.send(1, tcp::ACK), s.send(5, tcp::ACK)), (11, 11), "unknown and non-SYN: the first one's");
        assert_eq!(s.send(2, tcp::ACK), 12, "recorded");
        assert_eq!(s.send(3, tcp::SYN), 13);
        s.set(&[11]);
        assert_eq!(
            (s.send(1, tcp::ACK), s.send(2, tcp::ACK), s.send(3, tcp::ACK), s.send(6, tcp::SYN)),
            (11, 12, 13, 11)
        );
        assert_eq!(s.in_transition(), 1021, "also where present and previous are the same");
        // 11 came back as another backend: its first identity is killed, and its unknown flows are nobody's.
        let states: Vec<_> = s.b.balancer.backends(s.address).unwrap().iter().map(|e| e.state).collect();
        assert_eq!(states, [BackendState::Killed, BackendState::Leaving, BackendState::Leaving, BackendState::Active]);
    });
}

#[test]
fn l15_a_syn_moves_no_live_flow_and_a_port_used_again_is_a_new_one() {
    let host = Host::new();
    each(&host, &config(), &[11], |s| {
        s.set(&[12]);
        assert_eq!((s.send(1, tcp::ACK), s.send(2, tcp::SYN), s.send(2, tcp::ACK)), (11, 12, 12));
        s.set(&[13]);
        assert_eq!((s.send(1, tcp::SYN), s.send(2, tcp::SYN)), (11, 12), "live flows");
        assert_eq!((s.send(2, tcp::FIN | tcp::ACK), s.send(2, tcp::ACK)), (12, 12), "TIME_WAIT");
        assert_eq!((s.send(2, tcp::SYN), s.send(2, tcp::ACK)), (13, 13), "and the port again");
        assert_eq!((s.send(1, tcp::RST | tcp::ACK), s.send(1, tcp::SYN)), (11, 13));
    });
}

#[test]
fn l16_a_killed_backend_gets_nothing() {
    let host = Host::new();
    each(&host, &config(), &[11, 12], |s| {
        let all = || (0..64).map(|number| s.send(number, tcp::ACK)).collect::<Vec<_>>();
        let before = all();
        assert!(before.contains(&11) && before.contains(&12));
        s.b.balancer.kill(s.address, ip(s.family6, 11)).unwrap();
        assert!(all().iter().all(|number| *number == 12));
        assert_eq!(s.in_transition() > 0, before.is_empty(), "nothing is left to remember of a killed one");
        // In the middle of a transition, too: records and previous backend.
        s.set(&[13]);
        assert_eq!((s.send(1, tcp::ACK), s.send(100, tcp::SYN), s.send(100, tcp::ACK)), (12, 13, 13));
        s.set(&[14]);
        s.b.balancer.kill(s.address, ip(s.family6, 13)).unwrap();
        assert_eq!((s.send(1, tcp::ACK), s.send(100, tcp::ACK)), (12, 12), "its flow is an unknown one now");
        s.b.balancer.kill(s.address, ip(s.family6, 12)).unwrap();
        assert_eq!((s.send(1, tcp::ACK), s.send(100, tcp::ACK), s.send(200, tcp::ACK)), (14, 14, 14));
    });
}

#[test]
fn a_transition_ends_when_nothing_goes_elsewhere_and_what_left_is_gone() {
    let host = Host::new();
    each(&host, &config().idle(IDLE), &[11], |s| {
        assert_eq!(s.send(1, tcp::ACK), 11);
        s.set(&[12]);
        // One flow goes on; its slot stays in transition, the others end.
        for _ in 0..6 {
            std::thread::sleep(IDLE / 3);
            assert_eq!(s.send(1, tcp::ACK), 11, "it has never been silent for long");
        }
        assert_eq!(s.in_transition(), 1, "the slots without such a flow are stateless again");
        let states = || s.b.balancer.backends(s.address).unwrap().iter().map(|e| e.state).collect::<Vec<_>>();
        assert_eq!(states(), [BackendState::Leaving, BackendState::Active]);
        std::thread::sleep(IDLE + Duration::from_millis(100));
        // Told by the program itself, not by who asks.
        assert_eq!(s.send(1, tcp::ACK), 12);
        assert_eq!((s.in_transition(), states()), (0, vec![BackendState::Active]));
        assert_eq!(s.place(1, false), (12, PlacementReason::Table));
        // What was recorded then says nothing in the next transition.
        s.set(&[13]);
        assert_eq!(s.send(1, tcp::ACK), 12);
    });
}

#[test]
fn a_transition_lasts_no_longer_than_it_may() {
    let host = Host::new();
    let config = config().idle(Duration::from_secs(2)).longest_transition(Duration::from_secs(3));
    let s = Service::new(&host, &config, false, "tcp", "80", &[11]);
    s.set(&[12]);
    let start = std::time::Instant::now();
    // Without a look-up, which might say what was true an instant before the end.
    while s.goes(segment(false, 1, 9000).flags(tcp::ACK)) == 11 {
        std::thread::sleep(Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    assert!(start.elapsed() > Duration::from_millis(2900), "{:?}", start.elapsed());
}

#[test]
fn udp_flows_that_are_not_known_are_old_ones_for_a_while() {
    let host = Host::new();
    for (family6, port) in [(false, "80"), (true, "*")] {
        let grace = Duration::from_secs(2);
        let s = Service::new(&host, &config().udp_grace(grace), family6, "udp", port, &[11]);
        assert_eq!(s.send_udp(1), 11);
        s.set(&[12]);
        assert_eq!((s.send_udp(1), s.send_udp(2)), (11, 11));
        std::thread::sleep(grace + Duration::from_millis(100));
        assert_eq!((s.send_udp(1), s.send_udp(2), s.send_udp(3)), (11, 11, 12));
        assert_eq!(s.place(1, false).1, PlacementReason::Recorded);
        drop(s);
        let s = Service::new(&host, &config().udp_grace(Duration::ZERO), family6, "udp", port, &[11]);
        s.set(&[12]);
        // The next tick of the program's clock.
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(s.send_udp(1), 12, "without grace, all are new");
    }
}

#[test]
fn removing_one_of_ten_moves_no_flow_of_the_others() {
    let host = Host::new();
    for number in 20..30 {
        for family6 in [false, true] {
            host.ns.add_neighbour("eth0", ip(family6, number), crate::common::dsr::mac(number)).unwrap();
        }
    }
    let all: Vec<u8> = (20..30).collect();
    for family6 in [false, true] {
        let s = Service::new(&host, &config().flows(1 << 16), family6, "tcp", "80", &all);
        let flows = times(1000, 30_000, 300) as u32;
        let before: Vec<u8> = (0..flows).map(|flow| s.send(flow, tcp::ACK)).collect();
        let slots = |s: &Service<'_>| -> Vec<u32> {
            s.b.balancer.backends(s.address).unwrap().iter().map(|entry| entry.slots_leaving).collect()
        };
        s.set(&all[1..]);
        for (flow, number) in (0..flows).zip(before) {
            assert_eq!(s.send(flow, tcp::ACK), number);
        }
        // Few slots of the others change hands, and those only among them.
        let leaving = slots(&s);
        let moved: u32 = leaving[1..].iter().sum();
        assert!(leaving[0] >= 100 && moved <= 1021 / 20, "{leaving:?}");
        s.b.balancer.kill(s.address, ip(family6, 20)).unwrap();
        assert!((0..flows).all(|flow| s.send(flow, tcp::ACK) != 20));
    }
}

#[test]
fn l17_every_slot_has_a_backend_while_the_table_changes() {
    let host = Host::new();
    let s = Service::new(&host, &config().table_size(65_537), false, "tcp", "80", &[11, 12]);
    let frames: Vec<Vec<u8>> =
        (0..2000).map(|flow| arriving(&host, segment(false, flow, 9000).flags(tcp::SYN)).build()).collect();
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            for round in 0..times(20, 100, 2) {
                s.set([&[11, 12][..], &[13, 14], &[12, 13, 15], &[11]][round % 4]);
            }
        });
        while !changing.is_finished() {
            for (action, out) in s.b.run_all(&frames) {
                assert!(action == Action::Tx && (11..=15).contains(&out[5]));
            }
        }
    });
}

#[test]
fn a_flood_of_syns_ends_no_established_flow() {
    let host = Host::new();
    let flows = times(4096, 4096, 1024) as u32;
    let s = Service::new(&host, &config().flows(flows), false, "tcp", "80", &[11]);
    let established = times(500, 1000, 50) as u32;
    s.set(&[12]);
    for flow in 0..established {
        assert_eq!((s.send(flow, tcp::SYN), s.send(flow, tcp::ACK)), (12, 12));
    }
    s.set(&[13]);
    // Old ones, which nobody has recorded, and those between.
    let holds = |when: &str| {
        for flow in 0..established {
            assert_eq!(s.send(flow, tcp::ACK), 12, "flow {flow}, {when}");
            assert_eq!(s.send(1_000_000 + flow, tcp::ACK), 11, "old flow {flow}, {when}");
        }
    };
    holds("before");
    let count = times(40_000, 10_000_000, 2_000) as u32;
    let mut frame = arriving(&host, segment(false, 0, 1).flags(tcp::SYN)).build();
    for start in (0..count).step_by(50_000) {
        let frames: Vec<_> = (start..count.min(start + 50_000))
            .map(|n| {
                frame[26..30].copy_from_slice(&(0x3000_0000 + n.wrapping_mul(0x9e37_79b9) % 0x1000_0000).to_be_bytes());
                frame[34..36].copy_from_slice(&(n as u16).to_be_bytes());
                frame.clone()
            })
            .collect();
        s.b.run_all(&frames);
    }
    holds("after");
    let entry = s.b.balancer.service(s.address).unwrap();
    assert!(entry.recorded > u64::from(flows), "the flood was too small for the table: {entry:?}");
}
