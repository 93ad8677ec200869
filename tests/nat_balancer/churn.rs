//! Connections that come and go, many more than there is room for: those that have closed make room for new ones.

use std::net::SocketAddr;

use crate::common::nat::{Bench, SERVICES, at, ip, service};
use xdpkit::{Action, NatConfig, NatMode, Stage as _, TestRun};
use xdpkit_lab::frame::{Frame, tcp};

/// Far fewer than are opened; each record is used again and again.
const CAPACITY: u32 = 1024;

/// Opens and closes connections to these of the services in turn.
fn come_and_go(config: &NatConfig, mode: NatMode, services: &[usize], connections: u32) {
    let bench = Bench::with_services(config, mode);
    let (client_macs, backend_macs) = (bench.macs_of_clients(), bench.macs_of_backends());
    bench.lab.balancer.run(|| {
        let send = |from_client: bool, frame: Frame| {
            let (interface, macs) = if from_client { (&bench.front, client_macs) } else { (&bench.back, backend_macs) };
            let frame = frame.macs(macs.0, macs.1).build();
            bench.balancer.run(&TestRun::new(&frame).ingress(interface, 0)).unwrap()
        };
        for number in 0..connections {
            let (name, backend) = SERVICES[services[number as usize % services.len()]];
            let (name, backend) = (service(name), at(backend));
            let vip = SocketAddr::new(name.address, name.port.unwrap());
            let last = 20 + number / 50_000 % 30;
            let address = if vip.is_ipv4() { format!("10.0.0.{last}") } else { format!("2001:db8:a::{last}") };
            let client = SocketAddr::new(ip(&address), (1024 + number % 50_000) as u16);
            let syn = send(true, Frame::tcp(client, vip).flags(tcp::SYN));
            let counts = || bench.balancer.stats().unwrap();
            assert_eq!(syn.action, Action::Redirect, "connection {number}: {:?}", counts());
            let transport = if vip.is_ipv4() { 34 } else { 54 };
            let port = u16::from_be_bytes([syn.frame[transport], syn.frame[transport + 1]]);
            let seen = if mode == NatMode::Full { SocketAddr::new(vip.ip(), port) } else { client };
            for (from_client, flags, sequence) in [
                (false, tcp::SYN | tcp::ACK, (100, 1)),
                (true, tcp::ACK, (1, 101)),
                (true, tcp::FIN | tcp::ACK, (1, 101)),
                (false, tcp::FIN | tcp::ACK, (101, 2)),
                (true, tcp::ACK, (2, 102)),
            ] {
                let frame = if from_client { Frame::tcp(client, vip) } else { Frame::tcp(backend, seen) };
                let outcome = send(from_client, frame.flags(flags).sequence(sequence.0, sequence.1));
                assert_eq!(outcome.action, Action::Redirect, "connection {number}, flags {flags}: {:?}", counts());
            }
        }
    });
}

fn many(mode: NatMode) {
    let config = NatConfig::default().capacity(CAPACITY);
    come_and_go(&config, mode, &[0], crate::common::times(30, 200, 5) as u32 * CAPACITY);
}

#[test]
fn closed_connections_make_room_with_full_translation() {
    many(NatMode::Full);
}

#[test]
fn closed_connections_make_room_with_clients_addresses_kept() {
    many(NatMode::Destination);
}

/// Few ports, among them the service's own, and places that all are taken: what stands in the one that cannot be had is no
/// victim.
#[test]
fn the_place_of_a_services_own_port_is_passed_over() {
    let config = NatConfig::default().capacity(32_u32).ports(64..=127_u16);
    come_and_go(&config, NatMode::Full, &[0, 2], crate::common::times(20_000, 200_000, 2_000) as u32);
}
