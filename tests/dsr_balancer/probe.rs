//! Health checks' probes through the DSR balancer, packet by packet: to the backend that they name, and no trace of them.

use std::net::{IpAddr, SocketAddr};

use crate::common::dsr::{
    Balancer, Host, VIP4, VIP6, arriving, inner_at, mac, neighbour4, neighbour6, network_at, one_hop_further,
    service_text, vip,
};
use xdpkit::{Action, BackendState, DsrConfig, DsrService, Error, Interface, Reason, ServiceAddr};
use xdpkit_lab::frame::{Frame, tcp};

fn config() -> DsrConfig {
    DsrConfig::default().services(8).backends(64).table_size(4099).flows(4096)
}

fn eth1(host: &Host) -> Interface {
    host.ns.run(|| Interface::by_name("eth1")).unwrap()
}

fn neighbour(family6: bool, number: u8) -> IpAddr {
    if family6 { neighbour6(number) } else { neighbour4(number) }
}

/// The host's own address.
fn own(family6: bool) -> IpAddr {
    neighbour(family6, 10)
}

/// A probe of a backend on port 80.
fn probe(b: &Balancer<'_>, service: ServiceAddr, backend: IpAddr) -> Frame {
    let source = b.balancer.probe_source(service, backend, own(service.address.is_ipv6())).unwrap();
    Frame::tcp(source, SocketAddr::new(service.address, 80)).flags(tcp::SYN).ttl(255)
}

#[test]
fn a_probe_reaches_the_backend_that_it_names_and_leaves_no_trace() {
    let host = Host::new();
    let b = host.balancer(&config());
    let eth1 = eth1(&host);
    b.balancer.set_probe_interface(Some(&eth1)).unwrap();
    for family6 in [false, true] {
        let [active, without_weight, draining] = [11, 12, 13].map(|number| neighbour(family6, number));
        let all = [active, without_weight, draining];
        // The protocol and port of the service do not matter to probes.
        let text = service_text(if family6 { "udp" } else { "tcp" }, family6, if family6 { "53" } else { "80" });
        let service = b.service(&text, DsrService::l2(), &all);
        host.ns.run(|| {
            b.balancer.set_backend(service, without_weight, 0).unwrap();
            b.balancer.drain(service, draining).unwrap();
        });
        let before = b.balancer.service(service).unwrap();
        assert!(before.slots_in_transition > 0);
        for (backend, number) in all.into_iter().zip([11, 12, 13]) {
            for flags in [tcp::SYN, tcp::ACK, tcp::RST] {
                let frame = arriving(&host, probe(&b, service, backend).flags(flags)).build();
                let (action, reason, out) = b.run_by(&eth1, &frame);
                assert_eq!((action, reason), (Action::Redirect, Reason::Probed), "{backend}");
                assert_eq!(out, one_hop_further(&frame, mac(number), host.mac), "{backend}");
            }
        }
        assert_eq!(b.balancer.service(service).unwrap(), before, "not the service's packets, flows or transitions");
        for entry in b.balancer.backends(service).unwrap() {
            assert_eq!((entry.stats.forwarded.packets, entry.stats.new_flows), (0, 0), "{entry:?}");
        }
        assert_eq!(b.balancer.recorded_flows(), 0);
    }
}

#[test]
fn probes_go_through_tunnels_of_all_mixes_of_families() {
    let host = Host::new();
    let b = host.balancer(&config());
    let eth1 = eth1(&host);
    b.balancer.set_probe_interface(Some(&eth1)).unwrap();
    for (family6, outer6) in [(false, false), (true, true), (false, true), (true, false)] {
        let backends = [11, 12].map(|number| neighbour(outer6, number));
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &backends);
        for (backend, number) in backends.into_iter().zip([11, 12]) {
            let frame = arriving(&host, probe(&b, service, backend)).build();
            let (action, reason, out) = b.run_by(&eth1, &frame);
            assert_eq!((action, reason), (Action::Redirect, Reason::Probed), "{backend}");
            let (at, moved) = (network_at(&frame), one_hop_further(&frame, mac(number), host.mac));
            assert_eq!(out[..12], moved[..12], "{backend}: MACs");
            assert_eq!(out[inner_at(&out)..], moved[at..], "{backend}: what is inside");
            let destination = match backend {
                IpAddr::V4(ip) => (&out[at + 16..at + 20], ip.octets().to_vec()),
                IpAddr::V6(ip) => (&out[at + 24..at + 40], ip.octets().to_vec()),
            };
            assert_eq!(destination.0, destination.1, "{backend}");
        }
        // Requests that do not fit are no reason to cut the tunnel's packets.
        let big = arriving(&host, probe(&b, service, backends[0]).payload(&[0; 1450])).build();
        let (action, reason, _) = b.run_by(&eth1, &big);
        assert_eq!((action, reason), (Action::Drop, Reason::TooBig));
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}

#[test]
fn nothing_but_probes_gets_to_a_virtual_address_by_their_interface() {
    let host = Host::new();
    let b = host.balancer(&config());
    let eth1 = eth1(&host);
    b.balancer.set_probe_interface(Some(&eth1)).unwrap();
    for family6 in [false, true] {
        let [first, second, other] = [11, 12, 13].map(|number| neighbour(family6, number));
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &[first, second]);
        let elsewhere = if family6 { "tcp/[2001:db8:b::101]:80" } else { "tcp/192.168.178.101:80" };
        let elsewhere = b.service(elsewhere, DsrService::l2(), &[other]);
        let source = b.balancer.probe_source(service, first, own(family6)).unwrap();
        let killed = b.balancer.probe_source(service, second, own(family6)).unwrap();
        let of_other = b.balancer.probe_source(elsewhere, other, own(family6)).unwrap();
        host.ns.run(|| b.balancer.kill(service, second)).unwrap();
        let to = SocketAddr::new(vip(family6), 80);
        let from = |port| SocketAddr::new(own(family6), port);
        let syn = |from: SocketAddr| Frame::tcp(from, to).flags(tcp::SYN).ttl(255);
        let base = source.port() - source.port() % 1000;
        let echo = if family6 { (128, 58) } else { (8, 1) };
        for (what, frame) in [
            ("a packet that the host has forwarded", syn(source).ttl(254)),
            ("no hop left", syn(source).ttl(1)),
            ("no hop left of a reset", syn(source).flags(tcp::RST).ttl(1)),
            ("number 0", syn(from(base))),
            ("a number that nobody has", syn(from(base + 60))),
            ("a number beyond all", syn(from(base + 65))),
            ("a port below all", syn(from(base - 1))),
            ("a killed backend", syn(killed)),
            ("a backend of another address", syn(of_other)),
            ("UDP", Frame::udp(source, to).ttl(255)),
            ("an echo", Frame::icmp(own(family6), vip(family6), echo.0, 0, [0; 4]).ttl(255)),
            ("another protocol", Frame::ip(own(family6), vip(family6), 47).payload(&[0; 8]).ttl(255)),
        ] {
            let frame = arriving(&host, frame).build();
            let (action, reason, _) = b.run_by(&eth1, &frame);
            assert_eq!((action, reason), (Action::Drop, Reason::NotAProbe), "{what}");
        }
        let reset = arriving(&host, syn(source).flags(tcp::RST).ttl(64)).build();
        assert_eq!(b.run_by(&eth1, &reset).1, Reason::Probed, "the host's stack has sent it without a socket");
        let malformed = arriving(&host, syn(source).data_offset(3)).build();
        assert_eq!(b.run_by(&eth1, &malformed).1, Reason::TcpDataOffset);
        // What is for others goes on, and by other interfaces, the port says nothing.
        let ssh = Frame::tcp(source, SocketAddr::new(own(family6), 22)).ttl(255);
        let (action, reason, _) = b.run_by(&eth1, &arriving(&host, ssh).build());
        assert_eq!((action, reason), (Action::Pass, Reason::NotForVip));
        let client = arriving(&host, syn(killed)).build();
        assert_eq!(b.run(&client).1, Reason::Forwarded);
        assert_eq!(b.balancer.service(service).unwrap().stats.received.packets, 1);
    }
}

#[test]
fn a_probe_asks_for_a_neighbour_without_a_mac_and_no_way_is_a_reason() {
    let host = Host::new();
    let b = host.balancer(&config().check_on_link(false));
    let eth1 = eth1(&host);
    b.balancer.set_probe_interface(Some(&eth1)).unwrap();
    let unknown = neighbour4(99);
    let service = b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[unknown]);
    let frame = arriving(&host, probe(&b, service, unknown)).build();
    let (action, reason, out) = b.run_by(&eth1, &frame);
    assert_eq!((action, reason), (Action::Pass, Reason::Unresolved));
    let at = network_at(&out);
    assert_eq!(out[at + 16..at + 20], [192, 168, 178, 99], "for the backend itself now");
    let far: IpAddr = "203.0.113.5".parse().unwrap();
    host.ns.run(|| b.balancer.set_backend(service, far, 1)).unwrap();
    let frame = arriving(&host, probe(&b, service, far)).build();
    assert_eq!(b.run_by(&eth1, &frame).1, Reason::OffLink);
    // The way of clients' packets is looked up for them alone.
    assert!(b.balancer.events().unwrap().try_next().is_none(), "probes report no ways");
}

#[test]
fn the_interface_can_be_changed_and_is_none_at_first() {
    let host = Host::new();
    let b = host.balancer(&config());
    let eth1 = eth1(&host);
    let service = b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[neighbour4(11)]);
    let frame = arriving(&host, probe(&b, service, neighbour4(11))).build();
    assert_eq!(b.run_by(&eth1, &frame).1, Reason::Forwarded);
    b.balancer.set_probe_interface(Some(&eth1)).unwrap();
    assert_eq!(b.run_by(&eth1, &frame).1, Reason::Probed);
    b.balancer.set_probe_interface(None).unwrap();
    assert_eq!(b.run_by(&eth1, &frame).1, Reason::Forwarded);
}

#[test]
fn every_backend_has_a_source_port_of_its_own() {
    let host = Host::new();
    for (backends, first) in [(4535, 61_001), (4536, 61_000), (65_534, 2)] {
        let b = host.balancer(&config().services(1).backends(backends));
        let service = b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[neighbour4(11), neighbour4(12)]);
        let port = |backend| b.balancer.probe_source(service, backend, own(false)).map(|source| source.port());
        let mut ports = [port(neighbour4(11)).unwrap(), port(neighbour4(12)).unwrap()];
        ports.sort_unstable();
        assert_eq!(ports, [first, first + 1], "{backends}");
        let frame = arriving(&host, probe(&b, service, neighbour4(12))).build();
        let eth1 = eth1(&host);
        b.balancer.set_probe_interface(Some(&eth1)).unwrap();
        let (_, reason, out) = b.run_by(&eth1, &frame);
        assert_eq!((reason, &out[..6]), (Reason::Probed, &mac(12)[..]));

        assert!(matches!(port(neighbour4(13)), Err(Error::UnknownBackend { .. })));
        host.ns.run(|| b.balancer.remove_backend(service, neighbour4(12))).unwrap();
        let states: Vec<_> = b.balancer.backends(service).unwrap().iter().map(|entry| entry.state).collect();
        assert!(states.contains(&BackendState::Leaving) || states.len() == 1, "{states:?}");
        assert!(matches!(port(neighbour4(12)), Err(Error::UnknownBackend { .. })), "one that leaves is not checked");
        let none = ServiceAddr::tcp(VIP4.parse::<IpAddr>().unwrap(), 81);
        let asked = b.balancer.probe_source(none, neighbour4(11), own(false));
        assert!(matches!(asked, Err(Error::UnknownService { .. })));
        let asked = b.balancer.probe_source(service, neighbour4(11), VIP6.parse().unwrap()).unwrap_err().to_string();
        assert!(asked.contains("expected an address of the service's family"), "{asked}");
    }
}
