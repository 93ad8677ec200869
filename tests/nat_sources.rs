//! What the NAT balancer's backends see as their clients: addresses and ports that are given once. Traps: L13, L14, H2.

mod common;

use std::net::SocketAddr;

use common::{
    nat::{Bench, at, ip, service},
    nat_talk::{TCP4, conversations, open, tcp4},
};
use xdpkit::{Action, NatConfig, NatMode, NatService, Reason};
use xdpkit_lab::frame::{Frame, tcp};

#[test]
fn l13_clients_with_the_same_port_get_ports_of_their_own() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let mut sources = std::collections::BTreeSet::new();
    for last in 20..50 {
        for family in ["10.0.0.", "2001:db8:a::"] {
            for port in [4000, 4001] {
                let client: SocketAddr = (ip(&format!("{family}{last}")), port).into();
                let name = if client.is_ipv4() { TCP4 } else { "tcp/[2001:db8:a::100]:80" };
                let connection = open(&bench, &service(name), client);
                assert!(sources.insert(connection.source), "{connection} shares its port");
                let found = bench.balancer.find_by_backend(connection.backend, connection.source).unwrap();
                assert_eq!(found.iter().map(|found| found.client).collect::<Vec<_>>(), [client]);
            }
        }
    }
}

#[test]
fn a_pool_of_addresses_is_the_source_of_connections() {
    let pool = ["10.0.0.101", "10.0.0.102", "2001:db8:a::101"];
    let bench = Bench::with_services(&NatConfig::default().addresses(pool.map(ip).to_vec()), NatMode::Full);
    let mut seen = std::collections::BTreeSet::new();
    for port in 4000..4050 {
        for (name, client, vip, _) in conversations() {
            let client = SocketAddr::new(client.ip(), port);
            let connection = open(&bench, &name, client);
            seen.insert(connection.source.ip());
            assert!(connection.source.ip() != vip.ip());
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), pool.map(ip));
    assert_eq!(bench.client_sends(&Frame::echo(ip("10.0.0.20"), ip("10.0.0.101"), 1, 1)).reason, Reason::EchoAnswered);
}

#[test]
fn nothing_is_refused_up_to_half_of_the_capacity() {
    for (mode, capacity) in [(NatMode::Full, 2048), (NatMode::Destination, 2048), (NatMode::Full, 100)] {
        let bench = Bench::with_services(&NatConfig::default().capacity(capacity), mode);
        for n in 0..capacity / 2 {
            let client = SocketAddr::new(ip(&format!("10.0.0.{}", 20 + n % 30)), 2000 + (n / 30) as u16);
            assert_eq!(bench.client_sends(&Frame::tcp(client, at("10.0.0.100:80"))).reason, Reason::Forwarded);
        }
        assert_eq!(bench.balancer.counts().unwrap().total(), u64::from(capacity / 2));
        assert_eq!(bench.balancer.evicted().unwrap(), 0, "and nothing went");
    }
}

#[test]
fn l13_ports_can_run_out_and_that_is_counted() {
    let bench = Bench::with_services(&NatConfig::default().ports(40_000..=40_007), NatMode::Full);
    let mut opened = Vec::new();
    for port in 4000..4100 {
        let client = SocketAddr::new(ip("10.0.0.20"), port);
        let outcome = bench.client_sends(&Frame::tcp(client, at("10.0.0.100:80")));
        if outcome.reason == Reason::Forwarded {
            // Established: it may not go for the next one.
            opened.push(open(&bench, &service(TCP4), client));
        } else {
            assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::PortsExhausted));
        }
    }
    let ports: std::collections::BTreeSet<u16> = opened.iter().map(|connection| connection.source.port()).collect();
    assert_eq!((opened.len(), ports.len()), (8, 8), "each port was given once");
    // One that ends makes room for one. A client tries 32 ports at random, and may miss it.
    bench.balancer.end(&opened[0]).unwrap();
    let clients = (4000..4100).map(|port| SocketAddr::new(ip("10.0.0.21"), port));
    let next = clients
        .filter(|client| bench.client_sends(&Frame::tcp(*client, at("10.0.0.100:80"))).reason == Reason::Forwarded)
        .map(|client| open(&bench, &service(TCP4), client));
    assert_eq!(next.map(|next| next.source).collect::<Vec<_>>(), [opened[0].source]);
}

#[test]
fn two_services_with_one_backend_never_mix_up_a_client_whose_address_is_kept() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Destination);
    let other = service("tcp/10.0.0.101:80");
    let backend = at("192.168.178.11:8080");
    bench.balancer.insert(other, &NatService::new([backend]).mode(NatMode::Destination)).unwrap();
    let client = at("10.0.0.20:4000");
    let first = open(&bench, &service(TCP4), client);
    // The backend could not tell it from the first.
    let outcome = bench.client_sends(&Frame::tcp(client, at("10.0.0.101:80")));
    assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::PortsExhausted));
    assert_eq!(bench.client_sends(&tcp4(tcp::ACK).sequence(2, 1001)).reason, Reason::Forwarded);
    bench.balancer.end(&first).unwrap();
    open(&bench, &other, client);
}
