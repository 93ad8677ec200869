//! ICMP errors through the NAT balancer, packet by packet: whose they are, and how they are translated. Traps: L4, L5.

mod common;

use common::{
    nat::{Bench, Outcome, ip},
    nat_talk::{conversations, open, segment, too_big},
};
use xdpkit::{Action, NatConfig, NatMode, Reason};

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
