//! Connections that come and go, many more than there is room for: those that have closed make room for new ones.

mod common;

use std::net::SocketAddr;

use common::nat::{Bench, SERVICES, at, service};
use xdpkit::{Action, NatConfig, NatMode, Stage as _, TestRun};
use xdpkit_lab::frame::{Frame, tcp};

/// Far fewer than are opened; each record is used again and again.
const CAPACITY: u32 = 1024;

fn come_and_go(mode: NatMode) {
    let bench = Bench::with_services(&NatConfig::default().capacity(CAPACITY), mode);
    let (name, backend) = (service(SERVICES[0].0), at(SERVICES[0].1));
    let vip = SocketAddr::new(name.address, name.port.unwrap());
    let (client_macs, backend_macs) = (bench.macs_of_clients(), bench.macs_of_backends());
    bench.lab.balancer.run(|| {
        let send = |from_client: bool, frame: Frame| {
            let (interface, macs) = if from_client { (&bench.front, client_macs) } else { (&bench.back, backend_macs) };
            let frame = frame.macs(macs.0, macs.1).build();
            bench.balancer.run(&TestRun::new(&frame).ingress(interface, 0)).unwrap()
        };
        for number in 0..common::times(30, 200, 5) as u32 * CAPACITY {
            let client =
                SocketAddr::new([10, 0, 0, 20 + (number / 50_000 % 30) as u8].into(), (1024 + number % 50_000) as u16);
            let syn = send(true, Frame::tcp(client, vip).flags(tcp::SYN));
            let counts = || bench.balancer.stats().unwrap();
            assert_eq!(syn.action, Action::Redirect, "connection {number}: {:?}", counts());
            let port = u16::from_be_bytes([syn.frame[34], syn.frame[35]]);
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

#[test]
fn closed_connections_make_room_with_full_translation() {
    come_and_go(NatMode::Full);
}

#[test]
fn closed_connections_make_room_with_clients_addresses_kept() {
    come_and_go(NatMode::Destination);
}
