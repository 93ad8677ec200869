//! What the NAT balancer's backends see as their clients: addresses and ports that are given once. Traps: L13, L14, H2.

use std::{collections::BTreeSet, net::SocketAddr};

use crate::common::{
    nat::{Bench, Outcome, at, ip, service},
    nat_talk::{TCP4, conversations, open, segment, tcp4, too_big},
};
use xdpkit::{Action, NatConfig, NatMode, NatService, Reason, ServiceProtocol};
use xdpkit_lab::frame::{Frame, tcp};

#[test]
fn l13_clients_with_the_same_port_get_ports_of_their_own() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let mut sources = BTreeSet::new();
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
    let mut seen = BTreeSet::new();
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
    let ports: BTreeSet<u16> = opened.iter().map(|connection| connection.source.port()).collect();
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

/// A pair that the backend could not tell from another is given once, whatever service asks for it.
#[test]
fn l13_and_l14_services_that_share_a_backend_share_its_ports_and_get_their_own_answers() {
    let bench = Bench::new(&NatConfig::default().ports(40_000..=40_031));
    let backend = at("192.168.178.11:8080");
    let names = ["tcp/10.0.0.100:80", "tcp/10.0.0.100:81", "tcp/10.0.0.101:80", "udp/10.0.0.100:80"].map(service);
    for name in names {
        bench.balancer.insert(name, &NatService::new([backend])).unwrap();
    }
    // The same clients for all: 20 of the 32 pairs of the first address are taken for TCP.
    let clients: Vec<SocketAddr> = (20..30).map(|last| (ip(&format!("10.0.0.{last}")), 4000).into()).collect();
    let opened: Vec<_> = clients.iter().flat_map(|client| names.map(|name| open(&bench, &name, *client))).collect();
    let pairs: BTreeSet<_> = opened.iter().map(|found| (found.protocol() as u8, found.source)).collect();
    assert_eq!(pairs.len(), opened.len(), "no two look the same");
    for found in &opened {
        let vip = SocketAddr::new(found.service.address, found.service.port.unwrap());
        let (sent, wanted) =
            (segment(&found.service, backend, found.source), segment(&found.service, vip, found.client));
        let [sent, wanted] = [sent, wanted].map(|frame| match found.protocol() {
            ServiceProtocol::Tcp => frame.flags(tcp::ACK).sequence(1001, 2),
            _ => frame,
        });
        assert_eq!(bench.backend_sends(&sent), bench.to_client(&wanted.ttl(63)), "{found}");
    }
    // What goes of one service takes nothing of another's along.
    bench.balancer.remove(&names[0]).unwrap();
    for found in opened.iter().filter(|found| found.service != names[0]) {
        assert_eq!(bench.balancer.find(found.client, &found.service).unwrap().unwrap().source, found.source);
    }
}

#[test]
fn l14_a_new_service_does_not_cut_off_the_connections_that_have_its_port() {
    for (name, client, vip, backend) in conversations() {
        let bench = Bench::with_services(&NatConfig::default().ports(40_000..=40_003), NatMode::Full);
        let tcp = name.protocol == ServiceProtocol::Tcp;
        let talk = |from: SocketAddr, to| {
            let frame = segment(&name, from, to);
            if tcp { frame.flags(tcp::ACK).sequence(2, 1001) } else { frame }
        };
        let first = open(&bench, &name, client);
        let mut taken = name;
        taken.port = Some(first.source.port());
        let other = SocketAddr::new(ip(if vip.is_ipv4() { "192.168.178.12" } else { "2001:db8:b::12" }), 9000);
        bench.balancer.insert(taken, &NatService::new([other])).unwrap();
        for _ in 0..2 {
            let answer = bench.backend_sends(&talk(backend, first.source));
            assert_eq!(answer, bench.to_client(&talk(vip, client).ttl(63)), "{name}: still the first one's");
            assert_eq!(bench.client_sends(&talk(client, vip)), bench.to_backend(&talk(first.source, backend).ttl(63)));
        }
        // An error about what the client sent, quoted as the backend was to see it.
        let seen = too_big(backend.ip(), first.source.ip(), &talk(first.source, backend), 2000);
        let wanted = too_big(vip.ip(), client.ip(), &talk(client, vip), 2000).ttl(63);
        let wanted = Outcome { reason: Reason::ErrorForwarded, ..bench.to_client(&wanted) };
        assert_eq!(bench.backend_sends(&seen), wanted, "{name}");
        // The new one's clients are its own, and nobody gets its port any more.
        assert_eq!(open(&bench, &taken, SocketAddr::new(client.ip(), 4001)).backend, other);
        for port in 5000..5060 {
            let outcome = bench.client_sends(&segment(&name, SocketAddr::new(client.ip(), port), vip));
            assert!([Reason::Forwarded, Reason::PortsExhausted].contains(&outcome.reason));
        }
        let mut of_first = bench.balancer.connections().unwrap();
        of_first.retain(|found| found.service == name && found.source == first.source);
        assert_eq!(of_first.iter().map(|found| found.client).collect::<Vec<_>>(), [client]);
        // It closes as every other.
        if tcp {
            bench.client_sends(&Frame::tcp(client, vip).flags(tcp::FIN | tcp::ACK).sequence(2, 1001));
            bench.backend_sends(&Frame::tcp(backend, first.source).flags(tcp::FIN | tcp::ACK).sequence(1001, 3));
            let closed = bench.balancer.find(client, &name).unwrap().unwrap().state;
            assert_eq!(closed, xdpkit::ConnectionState::TcpTimeWait);
        }
    }
}
