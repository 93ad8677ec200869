//! ICMP errors through the NAT balancer, packet by packet: whose they are, and how they are translated. Traps: L1, L4, L5.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::common::{
    nat::{Bench, Outcome, at, ip, service},
    nat_talk::{conversations, open, segment, too_big},
};
use xdpkit::{Action, NatConfig, NatMode, NatTimeouts, Reason, ServiceProtocol, Stage as _};
use xdpkit_lab::frame::{
    Frame,
    extension::{AUTHENTICATION, DESTINATION, HOP_BY_HOP, ROUTING},
    tcp,
};

#[test]
fn l4_and_l5_icmp_errors_are_translated_outside_and_inside_in_both_directions() {
    for mode in [NatMode::Full, NatMode::Destination] {
        let bench = Bench::with_services(&NatConfig::default(), mode);
        for (service, client, vip, backend) in conversations() {
            let ipv4 = client.is_ipv4();
            let source = open(&bench, &service, client).source;
            let router = ip(if ipv4 { "10.0.0.1" } else { "2001:db8:a::1" });
            let inner_router = ip(if ipv4 { "192.168.178.1" } else { "2001:db8:b::1" });
            let full = mode == NatMode::Full;
            let header = if ipv4 { 20 } else { 40 };
            // All of the packet, TCP's checksum just there or not, and no more than the ports and what follows.
            for cut in [2000, header + 18, header + 16, header + 8] {
                // A router before the balancer, about what the backend has sent.
                let sent = segment(&service, backend, source);
                let seen = segment(&service, vip, client);
                let error = too_big(router, vip.ip(), &seen, cut);
                let wanted = too_big(if full { source.ip() } else { router }, backend.ip(), &sent, cut).ttl(63);
                let wanted = Outcome { reason: Reason::ErrorForwarded, ..bench.to_backend(&wanted) };
                assert_eq!(bench.client_sends(&error), wanted, "{mode:?} {service} {cut}");

                // One behind it, and the backend itself, about what the client has sent.
                let sent = segment(&service, client, vip);
                let seen = segment(&service, source, backend);
                for reporter in [inner_router, backend.ip()] {
                    let error = too_big(reporter, source.ip(), &seen, cut);
                    let shown = if full || reporter == backend.ip() { vip.ip() } else { reporter };
                    let wanted = too_big(shown, client.ip(), &sent, cut).ttl(63);
                    let wanted = Outcome { reason: Reason::ErrorForwarded, ..bench.to_client(&wanted) };
                    assert_eq!(bench.backend_sends(&error), wanted, "{mode:?} {service} {cut} {reporter}");
                }
            }
        }
    }
}

#[test]
fn l4_an_error_about_nothing_of_ours_goes_on_and_opens_nothing() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, _) in conversations() {
        let router = ip(if client.is_ipv4() { "10.0.0.1" } else { "2001:db8:a::1" });
        let error = too_big(router, vip.ip(), &segment(&service, vip, client), 2000);
        let outcome = bench.client_sends(&error);
        assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::ErrorUnknown));
        // Less than eight bytes of the transport header say nothing.
        open(&bench, &service, client);
        let header = if client.is_ipv4() { 20 } else { 40 };
        let error = too_big(router, vip.ip(), &segment(&service, vip, client), header + 7);
        assert_eq!(bench.client_sends(&error).reason, Reason::ErrorUnknown);
    }
    assert_eq!(bench.balancer.counts().unwrap().total(), 4);
}

/// An error of a router before the balancer, about what the backend has sent, as it is sent and has to arrive.
fn about_answer(
    bench: &Bench,
    seen: &Frame,
    sent: &Frame,
    vip: IpAddr,
    source: IpAddr,
    backend: IpAddr,
) -> [Outcome; 2] {
    let router = ip(if vip.is_ipv4() { "10.0.0.1" } else { "2001:db8:a::1" });
    let went = bench.client_sends(&too_big(router, vip, seen, 2000));
    let wanted = bench.to_backend(&too_big(source, backend, sent, 2000).ttl(63));
    [went, Outcome { reason: Reason::ErrorForwarded, ..wanted }]
}

/// Of a datagram in fragments, the first one tells its ports.
#[test]
fn l5_extension_headers_and_options_stand_in_quoted_packets_too() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (service, client, vip, backend) in conversations() {
        let source = open(&bench, &service, client).source;
        let dressed = |frame: Frame| {
            [
                frame.clone().options(&[7, 11, 4, 1, 2, 3, 4, 5, 6, 7, 8]).extension(DESTINATION, &[1; 20]),
                frame.clone().extension(HOP_BY_HOP, &[]).fragment(0, true).identification(9),
                frame.extension(HOP_BY_HOP, &[]).extension(ROUTING, &[0, 0]).extension(AUTHENTICATION, &[0; 10]),
            ]
        };
        let seen = dressed(segment(&service, vip, client));
        for (seen, sent) in seen.iter().zip(dressed(segment(&service, backend, source))) {
            let [went, wanted] = about_answer(&bench, seen, &sent, vip.ip(), source.ip(), backend.ip());
            assert_eq!(went, wanted, "{service}");
        }
        // Later ones do not, and what is cut among its headers neither.
        let later = segment(&service, vip, client).fragment(64, true);
        let long = segment(&service, vip, client).options(&[1; 40]).extension(DESTINATION, &[0; 60]);
        let router = ip(if client.is_ipv4() { "10.0.0.1" } else { "2001:db8:a::1" });
        for error in [too_big(router, vip.ip(), &later, 2000), too_big(router, vip.ip(), &long, 64)] {
            let outcome = bench.client_sends(&error);
            assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::ErrorUnknown), "{service}");
        }
    }
}

#[test]
fn l1_a_quoted_datagram_without_a_checksum_stays_without() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    let (client, vip, backend) = (at("10.0.0.20:4000"), at("10.0.0.100:53"), at("192.168.178.11:5353"));
    let source = open(&bench, &service("udp/10.0.0.100:53"), client).source;
    let quoted = |from, to| Frame::udp(from, to).payload(b"as sent").checksum(0);
    let (seen, sent) = (quoted(vip, client), quoted(backend, source));
    let [went, wanted] = about_answer(&bench, &seen, &sent, vip.ip(), source.ip(), backend.ip());
    assert_eq!(went, wanted);
}

/// RFC 5508, section 4.2: else anybody could keep a connection for ever.
#[test]
fn l4_errors_do_not_keep_a_connection_alive() {
    let mut timeouts = NatTimeouts::default();
    (timeouts.udp, timeouts.established) = (Duration::from_secs(3), Duration::from_secs(3));
    let bench = Bench::with_services(&NatConfig::default().timeouts(timeouts), NatMode::Full);
    let [kept, left] = [4000, 4001].map(|port| {
        let with = |(name, client, vip, _): (_, SocketAddr, _, _)| (name, SocketAddr::new(client.ip(), port), vip);
        conversations().map(with).collect::<Vec<_>>()
    });
    let opened: Vec<_> = kept.iter().chain(&left).map(|(name, client, _)| open(&bench, name, *client)).collect();
    let is_there = |known: &xdpkit::Connection| bench.balancer.find(known.client, &known.service).unwrap().is_some();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(400));
        for (name, client, vip) in &kept {
            let talk = segment(name, *client, *vip);
            let talk =
                if name.protocol == ServiceProtocol::Tcp { talk.flags(tcp::ACK).sequence(2, 1001) } else { talk };
            assert_eq!(bench.client_sends(&talk).reason, Reason::Forwarded, "{name}");
        }
        for (name, client, vip) in &left {
            let router = ip(if client.is_ipv4() { "10.0.0.1" } else { "2001:db8:a::1" });
            bench.client_sends(&too_big(router, vip.ip(), &segment(name, *vip, *client), 2000));
        }
    }
    let errors = bench.balancer.stats().unwrap();
    assert!(errors.reason(Reason::ErrorForwarded).packets > 0 && errors.reason(Reason::ErrorUnknown).packets == 0);
    assert!(opened[..4].iter().all(is_there) && !opened[4..].iter().any(is_there));
}
