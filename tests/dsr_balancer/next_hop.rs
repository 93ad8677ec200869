//! Ways to backends, packet by packet: neighbours, routers, other links, and what is sent when there is none. Traps L10 to
//! L12; `links.rs` has them under real traffic.

use std::net::IpAddr;

use crate::common::dsr::{
    Host, SECOND_LINK, arriving, config, inner_at, mac, neighbour4, neighbour6, neighbours, one_hop_further, segment,
    service_text,
};
use xdpkit::{Action, DsrConfig, DsrService, Reason, ServiceAddr};
use xdpkit_lab::frame::checksum;

#[test]
fn l10_a_backend_off_link_is_refused_and_noticed() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, far, own) in [(false, "203.0.113.5", "192.168.178.10"), (true, "2001:db8:ffff::5", "2001:db8:b::10")]
    {
        let text = service_text("tcp", family6, "80");
        let service: ServiceAddr = text.parse().unwrap();
        for (address, expected) in [(far, "a neighbour on a link"), (own, "another host")] {
            let list = [(address.parse().unwrap(), 1)];
            let error = host.ns.run(|| b.balancer.insert_service(service, DsrService::l2(), list)).unwrap_err();
            assert!(error.to_string().contains(&format!("backend `{address}`: expected {expected}")), "{error}");
            assert!(b.balancer.services().unwrap().iter().all(|entry| entry.address != service));
        }
        let other_family = [(neighbours(!family6, &[11])[0], 1)];
        let error = host.ns.run(|| b.balancer.insert_service(service, DsrService::l2(), other_family)).unwrap_err();
        assert!(error.to_string().contains("the service's family"), "{error}");
    }
    drop(b);
    let blind = host.balancer(&config().check_on_link(false));
    blind.service(&service_text("tcp", false, "80"), DsrService::l2(), &["203.0.113.5".parse().unwrap()]);
    blind.service(&service_text("tcp", true, "80"), DsrService::l2(), &["2001:db8:ffff::5".parse().unwrap()]);
    for family6 in [false, true] {
        let (action, reason, _) = blind.run(&arriving(&host, segment(family6, 0, 1)).build());
        assert_eq!((action, reason), (Action::Drop, Reason::OffLink));
    }
}

#[test]
fn l12_a_backend_on_another_interface_is_redirected_to() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, backend) in [(false, "172.31.0.77"), (true, "2001:db8:d::77")] {
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &[backend.parse().unwrap()]);
        let frame = arriving(&host, segment(family6, 0, 1)).build();
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Redirect, Reason::Forwarded));
        assert_eq!(out, one_hop_further(&frame, mac(SECOND_LINK), host.ns.mac("eth1").unwrap()));
    }
}

#[test]
fn no_route_is_counted() {
    let host = Host::new();
    let b = host.balancer(&config());
    b.service(&service_text("tcp", false, "80"), DsrService::ipip(), &["203.0.113.5".parse().unwrap()]);
    host.ns.sysctl("net.ipv4.conf.eth0.forwarding", "0").unwrap();
    let frame = arriving(&host, segment(false, 0, 1)).build();
    let (action, reason, _) = b.run(&frame);
    assert_eq!((action, reason), (Action::Drop, Reason::NoRoute));
    host.ns.sysctl("net.ipv4.conf.eth0.forwarding", "1").unwrap();
    // The answer was kept for one tick of the kernel's clock only.
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(b.run(&frame).1, Reason::Forwarded);
}

#[test]
fn l11_an_unknown_neighbour_is_asked_for_by_the_stack() {
    let host = Host::new();
    let b = host.balancer(&config());
    for (family6, unknown) in [(false, neighbour4(200)), (true, neighbour6(200))] {
        let tcp80 = b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &[unknown]);
        let frame = arriving(&host, segment(family6, 0, 1)).build();
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Pass, Reason::Unresolved), "{unknown}");
        // Something for the neighbour itself, that it will throw away.
        match unknown {
            IpAddr::V4(ip) => {
                assert_eq!((&out[30..34], out[23], out[34]), (&ip.octets()[..], 1, 0xfd));
                assert_eq!((checksum(&out[14..34]), checksum(&out[34..42])), (0, 0));
            }
            IpAddr::V6(ip) => assert_eq!((&out[38..54], &out[18..21]), (&ip.octets()[..], &[0, 0, 59][..])),
        }
        host.ns.run(|| b.balancer.remove_service(tcp80)).unwrap();

        // In a tunnel, the stack forwards the packet itself.
        b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[unknown]);
        let (action, reason, out) = b.run(&frame);
        assert_eq!((action, reason), (Action::Pass, Reason::Unresolved), "{unknown}");
        assert_eq!(out[..12], frame[..12]);
        assert_eq!(out[inner_at(&out)..], one_hop_further(&frame, mac(0), mac(0))[14..]);
    }
}

#[test]
fn l11_the_stack_is_given_no_packet_from_its_own_address() {
    // Without a prefix for outer sources they are the host's own, which its stack would not forward.
    let host = Host::new();
    let b = host.balancer(&DsrConfig::default().services(8).table_size(4099));
    for (backend, action, source) in
        [(neighbour4(200), Action::Pass, [192, 0, 0, 8]), (neighbour4(11), Action::Tx, [192, 168, 178, 10])]
    {
        let service = b.service(&service_text("tcp", true, "80"), DsrService::ipip(), &[backend]);
        let (went, _, out) = b.run(&arriving(&host, segment(true, 0, 1)).build());
        assert_eq!((went, &out[26..30]), (action, &source[..]), "{backend}");
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}
