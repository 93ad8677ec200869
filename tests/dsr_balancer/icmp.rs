//! What belongs to flows without naming them: ICMP errors, echo requests, fragments, and packets that do not fit, which are
//! answered. Traps L4, L6, L21 and L22.

use std::net::{IpAddr, SocketAddr};

use crate::common::dsr::{
    Balancer, GATEWAY, Host, arriving, client, config, mac, neighbour4, neighbour6, neighbours, network_at,
    one_hop_further, segment, service_text, vip,
};
use xdpkit::{Action, DsrService, Echo, Reason};
use xdpkit_lab::frame::{Frame, extension};

#[test]
fn l22_echo_requests_are_answered_forwarded_or_left_alone() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &neighbours(family6, &[11]));
        for payload in [&b""[..], b"0", b"01234567", &[0xff; 1400]] {
            let request = arriving(&host, Frame::echo(client(family6, 3), vip(family6), 77, 5).payload(payload).ttl(9));
            let frame = request.build();
            b.balancer.set_echo(Echo::Answer).unwrap();
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::EchoAnswered));
            let kind = if family6 { 129 } else { 0 };
            let reply = Frame::icmp(vip(family6), client(family6, 3), kind, 0, [0, 77, 0, 5]).payload(payload);
            assert_eq!(out, reply.macs(host.mac, mac(GATEWAY)).build());

            b.balancer.set_echo(Echo::Backend).unwrap();
            let (action, reason, out) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::Forwarded));
            assert_eq!(out, one_hop_further(&frame, mac(11), host.mac));

            b.balancer.set_echo(Echo::Pass).unwrap();
            assert_eq!(b.run(&frame), (Action::Pass, Reason::NoService, frame));
        }
        b.balancer.set_echo(Echo::Answer).unwrap();
        let other = arriving(&host, Frame::echo(client(family6, 3), client(family6, 9), 77, 5)).build();
        assert_eq!(b.run(&other), (Action::Pass, Reason::NotForVip, other), "only virtual addresses answer");
    }
}

/// Which neighbour a frame goes to.
fn taken_by(b: &Balancer<'_>, frame: Frame) -> (Reason, u8) {
    let frame = arriving(b.host, frame).build();
    let (action, reason, out) = b.run(&frame);
    if action != Action::Tx {
        return (reason, 0);
    }
    assert_eq!(out, one_hop_further(&frame, [&out[..6]].concat().try_into().unwrap(), b.host.mac));
    (reason, out[5])
}

#[test]
fn l4_icmp_errors_go_to_the_backend_of_the_flow_that_they_quote() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        let backends = neighbours(family6, &[11, 12, 13, 14]);
        b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &backends);
        b.service(&service_text("udp", family6, "*"), DsrService::l2(), &backends);
        let router: IpAddr = if family6 { "2001:db8:ee::1" } else { "10.99.0.1" }.parse().unwrap();
        let errors: &[(u8, u8)] =
            if family6 { &[(1, 4), (2, 0), (3, 0), (4, 1)] } else { &[(3, 4), (3, 1), (11, 0), (12, 0)] };
        let mut met = std::collections::HashSet::new();
        for number in 0..40 {
            let (_, backend) = taken_by(&b, segment(family6, number, 5000));
            met.insert(backend);
            let to = SocketAddr::new(client(family6, number), 5000);
            for (kind, code) in errors {
                // As the backend's answer looked: the other way round. Eight bytes of TCP are enough.
                let answer = Frame::tcp(SocketAddr::new(vip(family6), 80), to).payload(&[1; 600]).packet();
                let header = if family6 { 40 } else { 20 };
                for length in [header + 8, header + 20, 500] {
                    let error =
                        Frame::icmp(router, vip(family6), *kind, *code, [0, 0, 5, 0x78]).payload(&answer[..length]);
                    assert_eq!(taken_by(&b, error), (Reason::ErrorForwarded, backend), "{kind} {code} {length}");
                }
            }
            let (_, backend) = {
                let query = Frame::udp(to, SocketAddr::new(vip(family6), 53));
                taken_by(&b, query)
            };
            let answer = Frame::udp(SocketAddr::new(vip(family6), 53), to).packet();
            let error = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&answer);
            assert_eq!(taken_by(&b, error), (Reason::ErrorForwarded, backend));
        }
        assert_eq!(met.len(), 4);
        // Errors about nothing of ours go on.
        let to = SocketAddr::new(client(family6, 1), 5000);
        let own = SocketAddr::new(vip(family6), 80);
        for (what, quoted) in [
            ("the request", Frame::tcp(to, own)),
            ("another port", Frame::tcp(SocketAddr::new(vip(family6), 22), to)),
            ("a later fragment", Frame::tcp(own, to).fragment(800, false).payload(&[0; 80])),
            ("another protocol", Frame::ip(vip(family6), to.ip(), 47).payload(&[0; 40])),
        ] {
            let error = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&quoted.packet());
            assert_eq!(taken_by(&b, error), (Reason::ErrorUnknown, 0), "{what}");
        }
        let cut = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&[0x45; 10]);
        assert_eq!(taken_by(&b, cut), (Reason::ErrorUnknown, 0));
        let nested = Frame::tcp(own, to).extension(extension::DESTINATION, &[]).packet();
        let error = Frame::icmp(router, vip(family6), errors[0].0, errors[0].1, [0; 4]).payload(&nested);
        assert_eq!(taken_by(&b, error), (Reason::ErrorForwarded, taken_by(&b, segment(family6, 1, 5000)).1));
    }
}

#[test]
fn l21_fragments_follow_the_first_one() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("udp", family6, "53"), DsrService::l2(), &neighbours(family6, &[11, 12, 13, 14]));
        let mut met = std::collections::HashSet::new();
        for number in 0..40 {
            let from = SocketAddr::new(client(family6, number), 6000);
            let datagram =
                Frame::udp(from, SocketAddr::new(vip(family6), 53)).payload(&[9; 3000]).identification(number + 1);
            let whole = Frame::udp(from, SocketAddr::new(vip(family6), 53)).payload(&[9; 30]);
            let (_, backend) = taken_by(&b, whole);
            met.insert(backend);
            let parts = arriving(&host, datagram).fragments(1000);
            let go = |part: &Vec<u8>| {
                let (_, reason, out) = b.run(part);
                (reason, if reason == Reason::Forwarded { out[5] } else { 0 })
            };
            assert_eq!(go(&parts[1]), (Reason::FragmentUnknown, 0), "before the first one");
            for part in [&parts[0], &parts[2], &parts[1], &parts[3]] {
                assert_eq!(go(part), (Reason::Forwarded, backend));
            }
            let other = Frame::udp(from, SocketAddr::new(vip(family6), 53)).payload(&[9; 3000]).identification(99_999);
            assert_eq!(go(&arriving(&host, other).fragments(1000)[1]), (Reason::FragmentUnknown, 0));
        }
        assert_eq!(met.len(), 4);
    }
}

/// L23: what is not for a service goes on untouched, in one piece or in several.
#[test]
fn l23_fragments_of_no_service_go_where_their_first_one_went() {
    let host = Host::new();
    let b = host.balancer(&config());
    for family6 in [false, true] {
        b.service(&service_text("udp", family6, "53"), DsrService::l2(), &neighbours(family6, &[11]));
        let from = SocketAddr::new(client(family6, 1), 6000);
        let datagram = |port, number| {
            Frame::udp(from, SocketAddr::new(vip(family6), port)).payload(&[9; 3000]).identification(number)
        };
        let parts = |frame| arriving(&host, frame).fragments(1000);
        let go = |part: &Vec<u8>| {
            let (action, reason, out) = b.run(part);
            assert!(action != Action::Pass || out == *part, "untouched");
            (action, reason)
        };
        let parts_of_none = parts(datagram(4500, 7));
        assert_eq!(go(&parts_of_none[1]), (Action::Drop, Reason::FragmentUnknown), "before the first one");
        for part in &parts_of_none {
            assert_eq!(go(part), (Action::Pass, Reason::NoService));
        }
        // An identification that comes again is another datagram's.
        for part in &parts(datagram(53, 7)) {
            assert_eq!(go(part), (Action::Tx, Reason::Forwarded));
        }
        for part in &parts(datagram(4500, 7)) {
            assert_eq!(go(part), (Action::Pass, Reason::NoService));
        }
        let first = &parts(datagram(0, 8))[..2];
        assert_eq!(go(&first[0]), (Action::Drop, Reason::PortZero));
        assert_eq!(go(&first[1]), (Action::Drop, Reason::FragmentUnknown));
        // Other protocols are nobody's service, first fragment or not.
        let esp = Frame::ip(from.ip(), vip(family6), 50).payload(&[9; 3000]).identification(9);
        for part in parts(esp).iter().rev() {
            assert_eq!(go(part), (Action::Pass, Reason::NoService));
        }
    }
}

#[test]
fn l6_what_does_not_fit_the_tunnel_is_answered_with_the_size_that_does() {
    let host = Host::new();
    let b = host.balancer(&config().answers_per_second(u32::MAX));
    for (family6, backend, overhead) in [
        (false, neighbour4(11), 20),
        (false, neighbour6(11), 40),
        (true, neighbour4(11), 20),
        (true, neighbour6(11), 40),
    ] {
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[backend]);
        let headers = if family6 { 60 } else { 40 };
        let of = |length: usize| {
            let payload: Vec<u8> = (0..length - headers).map(|n| n as u8).collect();
            segment(family6, 7, 7000).payload(&payload).dont_fragment()
        };
        for tags in 0..=2 {
            let tagged = |mut frame: Frame| {
                for tag in 0..tags {
                    frame = frame.vlan(5 + tag);
                }
                arriving(&host, frame)
            };
            let fits = tagged(of(1500 - overhead)).build();
            let (action, reason, out) = b.run(&fits);
            assert_eq!((action, reason, out.len()), (Action::Tx, Reason::Forwarded, fits.len() + overhead));

            for length in [1501 - overhead, 1500] {
                let frame = tagged(of(length)).build();
                let (action, reason, out) = b.run(&frame);
                assert_eq!((action, reason), (Action::Tx, Reason::TooBigAnswered), "{length}");
                let at = network_at(&frame);
                let mtu = (1500 - overhead as u16).to_be_bytes();
                let (quote, answer) = match family6 {
                    false => {
                        (504, Frame::icmp(vip(false), client(false, 7), 3, 4, [0, 0, mtu[0], mtu[1]]).dont_fragment())
                    }
                    true => (1184, Frame::icmp(vip(true), client(true, 7), 2, 0, [0, 0, mtu[0], mtu[1]])),
                };
                let wanted = tagged(answer.payload(&frame[at..at + quote])).macs(host.mac, mac(GATEWAY)).build();
                assert_eq!(out, wanted, "{length}, {tags} tags");
            }
        }
        if !family6 {
            let frame = arriving(&host, segment(false, 7, 7000).payload(&[0; 1460])).build();
            let (action, reason, _) = b.run(&frame);
            assert_eq!((action, reason), (Action::Tx, Reason::TooBigAnswered), "it may be fragmented: all the same");
        }
        let stats = b.balancer.service(service).unwrap().stats;
        assert_eq!(stats.too_big, if family6 { 6 } else { 7 });
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
    }
}
