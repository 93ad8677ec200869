//! What traffic the rate limiter's scopes are about, and what is in none; traps P1 to P8.

use crate::common::{
    judge,
    rate::{ACK, SYN, address, just, limiter, server, tcp, udp},
};
use xdpkit::{Action, Decision, Limit, Rate, RateLimiter, RateLimiterConfig, Reason, Scope};
use xdpkit_lab::frame::{Frame, extension};

/// What is in which scope, by both families.
#[test]
fn every_scope_is_about_its_own_packets() {
    let (v4, v6) = ("192.0.2.1", "2001:db8:1::1");
    for source in [v4, v6] {
        let kind = if source == v4 { (8, 0) } else { (128, 129) };
        let icmp = |kind| Frame::icmp(address(source), server(address(source)), kind, 0, [0; 4]);
        let mut frames: Vec<(&str, Frame, &[Scope])> = vec![
            ("SYN to 80", tcp(source, 80, SYN), &[Scope::All, Scope::Tcp, Scope::TcpSyn, Scope::TcpPort(80)]),
            ("SYN+ACK to 80", tcp(source, 80, SYN | ACK), &[Scope::All, Scope::Tcp, Scope::TcpPort(80)]),
            ("ACK to 81", tcp(source, 81, ACK), &[Scope::All, Scope::Tcp]),
            ("SYN+ECE+CWR to 81", tcp(source, 81, SYN | 0xc0), &[Scope::All, Scope::Tcp, Scope::TcpSyn]),
            ("UDP to 80", udp(source, 80), &[Scope::All, Scope::Udp]),
            ("UDP to 53", udp(source, 53), &[Scope::All, Scope::Udp, Scope::UdpPort(53)]),
            ("echo request", icmp(kind.0), &[Scope::All, Scope::IcmpEcho]),
            ("echo reply", icmp(kind.1), &[Scope::All]),
            ("GRE", Frame::ip(address(source), server(address(source)), 47).payload(&[0; 24]), &[Scope::All]),
            (
                "first fragment to 53",
                udp(source, 53).payload(&[0; 64]).fragment(0, true),
                &[Scope::All, Scope::Udp, Scope::UdpPort(53)],
            ),
            ("later fragment of UDP", udp(source, 53).payload(&[0; 64]).fragment(64, true), &[Scope::All, Scope::Udp]),
            (
                "tagged SYN to 80",
                tcp(source, 80, SYN).vlan(7),
                &[Scope::All, Scope::Tcp, Scope::TcpSyn, Scope::TcpPort(80)],
            ),
            (
                "SYN to 80 with two tags",
                tcp(source, 80, SYN).tag(0x88a8, 7).vlan(8),
                &[Scope::All, Scope::Tcp, Scope::TcpSyn, Scope::TcpPort(80)],
            ),
            (
                "later fragment of TCP",
                tcp(source, 80, SYN).payload(&[0; 64]).fragment(64, true),
                &[Scope::All, Scope::Tcp],
            ),
            ("later fragment of a ping", icmp(kind.0).payload(&[0; 64]).fragment(64, false), &[Scope::All]),
        ];
        if source == v6 {
            let dns =
                udp(source, 53).extension(extension::HOP_BY_HOP, &[0; 6]).extension(extension::DESTINATION, &[0; 14]);
            frames.push(("UDP to 53 behind options", dns, &[Scope::All, Scope::Udp, Scope::UdpPort(53)]));
            let ping = icmp(kind.0).extension(extension::ROUTING, &[0; 6]);
            frames.push(("echo request behind a routing header", ping, &[Scope::All, Scope::IcmpEcho]));
        } else {
            let dns = udp(source, 53).options(&[1; 8]);
            frames.push(("UDP to 53 with IPv4 options", dns, &[Scope::All, Scope::Udp, Scope::UdpPort(53)]));
        }
        let all = [
            Scope::All,
            Scope::Tcp,
            Scope::TcpSyn,
            Scope::Udp,
            Scope::TcpPort(80),
            Scope::UdpPort(53),
            Scope::IcmpEcho,
        ];
        for scope in all {
            let limiter = limiter(&[(scope, 1)]);
            for (name, frame, scopes) in &frames {
                limiter.reset(address(source)).unwrap();
                let frame = frame.build();
                let first = judge(&limiter, &frame);
                let expected = if scopes.contains(&scope) { Reason::WithinLimit } else { Reason::NoLimit };
                assert_eq!(first, (Action::Pass, expected), "{scope}: {name} from {source}");
                let second = judge(&limiter, &frame).0;
                assert_eq!(second == Action::Drop, scopes.contains(&scope), "{scope}: {name} from {source}");
            }
        }
    }
}

#[test]
fn neighbours_and_what_is_not_ip_are_not_limited() {
    let limiter = limiter(&[(Scope::All, 1)]);
    let mac = [2, 0, 0, 0, 0, 1];
    let arp = Frame::arp_request(mac, "10.0.0.9".parse().unwrap(), "10.0.0.1".parse().unwrap()).build();
    let solicitation =
        Frame::neighbour_solicitation(mac, "2001:db8::9".parse().unwrap(), "2001:db8::1".parse().unwrap());
    for _ in 0..5 {
        assert_eq!(judge(&limiter, &arp), (Action::Pass, Reason::Arp));
        assert_eq!(judge(&limiter, &solicitation.build()), (Action::Pass, Reason::NeighbourDiscovery));
        assert_eq!(judge(&limiter, &Frame::ethernet(0x88cc).payload(&[0; 46]).build()), (Action::Pass, Reason::NotIp));
    }
    // From behind a router, it is ICMPv6 as any other.
    let forged = solicitation.clone().ttl(64).build();
    assert_eq!(judge(&limiter, &forged).1, Reason::WithinLimit);
    assert_eq!(judge(&limiter, &forged).1, Reason::OverPackets);
    let strict = RateLimiterConfig::default().pass_neighbours(false).limit(Scope::All, just(1));
    let strict = RateLimiter::load(&strict).unwrap();
    assert_eq!(judge(&strict, &solicitation.build()).1, Reason::WithinLimit);
    assert_eq!(judge(&strict, &solicitation.build()).1, Reason::OverPackets);
}

#[test]
fn malformed_packets_are_dropped_and_unsupported_ones_go_by_their_policy() {
    let short = udp("192.0.2.1", 53).udp_length(4).build();
    let deep = udp("192.0.2.1", 53).vlan(1).vlan(2).vlan(3).build();
    for (decision, action) in [(Decision::Deny, Action::Drop), (Decision::Allow, Action::Pass)] {
        let config = RateLimiterConfig::default().unsupported(decision).limit(Scope::All, just(1));
        let limiter = RateLimiter::load(&config).unwrap();
        for _ in 0..3 {
            assert_eq!(judge(&limiter, &short), (Action::Drop, Reason::UdpLength));
            assert_eq!(judge(&limiter, &deep), (action, Reason::VlanTooDeep));
        }
        assert_eq!(limiter.tracked(), 0, "neither has cost its source anything");
    }
}

/// Trap P8: a jumbo frame is charged all its bytes, wherever its buffers end; what is behind the IP packet counts too (P3).
#[test]
fn p8_a_frame_in_several_buffers_is_charged_all_its_bytes() {
    let limit = Limit::bytes(Rate::per_hour(3600).burst(30_000));
    for source in ["192.0.2.1", "2001:db8:1::1"] {
        let limiter = RateLimiter::load(&RateLimiterConfig::default().limit(Scope::All, limit)).unwrap();
        let headers = udp(source, 53).build().len();
        let jumbo = udp(source, 53).payload(&vec![0; 9000 - headers]).build();
        assert_eq!(jumbo.len(), 9000);
        for _ in 0..3 {
            assert_eq!(judge(&limiter, &jumbo), (Action::Pass, Reason::WithinLimit));
        }
        assert_eq!(judge(&limiter, &jumbo), (Action::Drop, Reason::OverBytes));
        // 3,000 are left, and what came back in the meantime.
        let trailed = udp(source, 53).payload(&[0; 18]).trailer(&vec![0; 1460 - headers - 18]).build();
        assert_eq!(trailed.len(), 1460);
        let verdicts = [0; 3].map(|_| judge(&limiter, &trailed).1);
        assert_eq!(verdicts, [Reason::WithinLimit, Reason::WithinLimit, Reason::OverBytes]);
    }
}
