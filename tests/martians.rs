//! Packets that are never answered and that begin no flow: from sources that are not one host, from our own virtual
//! addresses, to groups, and errors about errors. Traps N10 and A4.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::{
    dsr::{self, Host, arriving, neighbour4, neighbours, segment, service_text, vip},
    nat::{Bench, SERVICES, Side, at, ip, service},
    nat_talk::open,
};
use xdpkit::{Action, Connection, DsrService, Echo, NatConfig, NatMode, Reason, ServiceProtocol};
use xdpkit_lab::frame::{Frame, tcp};

/// The edges of every range that is not one host's, and both sides of each.
const MARTIANS: [&[&str]; 2] = [
    &[
        "0.0.0.0",
        "0.255.255.255",
        "127.0.0.0",
        "127.0.0.1",
        "127.255.255.255",
        "224.0.0.0",
        "239.255.255.255",
        "240.0.0.0",
        "255.255.255.254",
        "255.255.255.255",
    ],
    &["::", "::1", "ff00::", "ff02::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"],
];
const HOSTS: [&[&str]; 2] = [
    &["1.0.0.0", "126.255.255.255", "128.0.0.0", "223.255.255.255"],
    &["::2", "1::", "0:0:0:1::", "fe80::1", "fe00::"],
];

fn addresses(list: &[&[&str]; 2], family6: bool) -> Vec<IpAddr> {
    list[usize::from(family6)].iter().map(|text| ip(text)).collect()
}

#[test]
fn a4_no_flow_through_the_dsr_balancer_begins_with_a_martian_or_a_virtual_address() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    for family6 in [false, true] {
        let backends = neighbours(family6, &[11, 12]);
        for protocol in ["tcp", "udp"] {
            b.service(&service_text(protocol, family6, "80"), DsrService::l2(), &backends);
        }
        // A second virtual address, and the packet's own destination.
        let other = if family6 { "tcp/[2001:db8:b::101]:80" } else { "tcp/192.168.178.101:80" };
        let other = b.service(other, DsrService::l2(), &backends).address;
        let from = |source: IpAddr| {
            let (from, to) = (SocketAddr::new(source, 7), SocketAddr::new(vip(family6), 80));
            [Frame::udp(from, to), Frame::tcp(from, to), Frame::tcp(from, to).flags(tcp::ACK)]
        };
        for source in addresses(&MARTIANS, family6).into_iter().chain([other, vip(family6)]) {
            for frame in from(source) {
                let frame = arriving(&host, frame.payload(&[7; 40])).build();
                let (action, reason, _) = b.run(&frame);
                assert_eq!((action, reason), (Action::Drop, Reason::MartianSource), "{source}");
            }
            let datagram = Frame::udp((source, 7).into(), (vip(family6), 80).into()).payload(&[9; 2000]);
            let parts = arriving(&host, datagram.identification(9)).fragments(1000);
            assert_eq!(b.run(&parts[0]).1, Reason::MartianSource, "{source}");
            assert_eq!(b.run(&parts[1]).1, Reason::FragmentUnknown, "{source}");
            let echo = arriving(&host, Frame::echo(source, vip(family6), 1, 2)).build();
            for policy in [Echo::Answer, Echo::Backend] {
                b.balancer.set_echo(policy).unwrap();
                let (action, reason, _) = b.run(&echo);
                assert_eq!((action, reason), (Action::Drop, Reason::MartianSource), "{source} {policy:?}");
            }
            b.balancer.set_echo(Echo::Pass).unwrap();
            assert_eq!(b.run(&echo), (Action::Pass, Reason::NoService, echo));
            b.balancer.set_echo(Echo::Answer).unwrap();
        }
        for source in addresses(&HOSTS, family6) {
            for frame in from(source) {
                assert_eq!(b.run(&arriving(&host, frame).build()).1, Reason::Forwarded, "{source}");
            }
            let echo = arriving(&host, Frame::echo(source, vip(family6), 1, 2)).build();
            assert_eq!(b.run(&echo).1, Reason::EchoAnswered, "{source}");
        }
    }
}

#[test]
fn a4_no_connection_through_the_nat_balancer_begins_with_a_martian_or_a_virtual_address() {
    for mode in [NatMode::Full, NatMode::Destination] {
        // An address of the pool is ours, too.
        let pool = [ip("10.0.0.111"), ip("2001:db8:a::111")];
        let bench = Bench::with_services(&NatConfig::default().addresses(pool.to_vec()).reset_unknown(true), mode);
        for (name, _) in SERVICES {
            let name = service(name);
            let vip = SocketAddr::new(name.address, name.port.unwrap());
            let family6 = vip.is_ipv6();
            let begins = |source: IpAddr| match name.protocol {
                ServiceProtocol::Tcp => Frame::tcp((source, 7).into(), vip),
                _ => Frame::udp((source, 7).into(), vip),
            };
            let ours = [vip.ip(), pool[usize::from(family6)]];
            for source in addresses(&MARTIANS, family6).into_iter().chain(ours) {
                let before = bench.balancer.counts().unwrap().total();
                let refused = bench.balancer.service_stats(&name).unwrap().refused;
                let outcome = bench.client_sends(&begins(source));
                assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::MartianSource), "{name} {source}");
                assert_eq!(bench.balancer.counts().unwrap().total(), before);
                assert_eq!(bench.balancer.service_stats(&name).unwrap().refused, refused + 1);
                let outcome = bench.client_sends(&Frame::echo(source, vip.ip(), 1, 2));
                assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::MartianSource), "{source}");
                if name.protocol == ServiceProtocol::Tcp {
                    let outcome = bench.client_sends(&begins(source).flags(tcp::ACK));
                    assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::NoConnection), "no RST either");
                }
            }
            for source in addresses(&HOSTS, family6) {
                let reason = bench.client_sends(&begins(source)).reason;
                // Nobody forwards from a link-local address to another link (RFC 4291, 2.5.6).
                let stays = mode == NatMode::Destination && source == ip("fe80::1");
                assert_eq!(reason, if stays { Reason::NoRoute } else { Reason::Forwarded }, "{source}");
                assert_eq!(bench.client_sends(&Frame::echo(source, vip.ip(), 1, 2)).reason, Reason::EchoAnswered);
            }
        }
    }
}

/// The frame of an IPv4 packet of 1,488 bytes, type 3 code 4, about which nobody must be told.
#[test]
fn n10_the_dsr_balancer_answers_no_error_fragment_or_group_with_an_error() {
    let host = Host::new();
    let b = host.balancer(&dsr::config());
    for family6 in [false, true] {
        b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[neighbour4(11)]);
        let (length, headers) = (1488, if family6 { 48 } else { 28 });
        let client = dsr::client(family6, 7);
        let quoted = Frame::tcp((vip(family6), 80).into(), (client, 5000).into()).payload(&[1; 1600]).packet();
        let errors: &[u8] = if family6 { &[1, 2, 3, 4] } else { &[3, 11, 12] };
        for kind in errors {
            for code in [0, 4] {
                let error = Frame::icmp(client, vip(family6), *kind, code, [0; 4]).payload(&quoted[..length - headers]);
                let frame = arriving(&host, error.dont_fragment()).build();
                let (action, reason, _) = b.run(&frame);
                assert_eq!((action, reason), (Action::Drop, Reason::TooBig), "{kind} {code}");
            }
        }
        // Of one message to the backends, and of all others that are no error.
        let tcp_headers = if family6 { 60 } else { 40 };
        let big = segment(family6, 7, 7000).payload(&vec![1; 1500 - tcp_headers]).dont_fragment();
        assert_eq!(b.run(&arriving(&host, big.clone()).build()).1, Reason::TooBigAnswered);
        b.balancer.set_echo(Echo::Backend).unwrap();
        let echo = Frame::echo(client, vip(family6), 1, 2).payload(&vec![1; 1500 - headers]).dont_fragment();
        assert_eq!(b.run(&arriving(&host, echo).build()).1, Reason::TooBigAnswered);
        b.balancer.set_echo(Echo::Answer).unwrap();

        // To or from a group, and a broadcast.
        for (from, to, wanted) in [
            ([1, 0, 0x5e, 0, 0, 1], host.mac, Reason::TooBig),
            (dsr::mac(1), [1, 0, 0x5e, 0, 0, 1], Reason::NotForUs),
            (dsr::mac(1), [0xff; 6], Reason::NotForUs),
        ] {
            let reason = b.run(&big.clone().macs(from, to).build()).1;
            assert_eq!(reason, wanted, "{from:?} {to:?}");
        }
        // A later fragment that does not fit, behind a first one that does.
        let service = service_text("udp", family6, "53");
        b.service(&service, DsrService::ipip(), &[neighbour4(11)]);
        let datagram = Frame::udp((client, 6000).into(), (vip(family6), 53).into()).payload(&[9; 3000]);
        let parts = arriving(&host, datagram.identification(77).dont_fragment()).fragments(1400);
        assert_eq!(b.run(&parts[0]).1, Reason::Forwarded);
        let later = Frame::ip(client, vip(family6), 17)
            .payload(&vec![9; 1500 - headers])
            .fragment(1400, false)
            .identification(77);
        assert_eq!(b.run(&arriving(&host, later.dont_fragment()).build()).1, Reason::TooBig);
    }
}

#[test]
fn n10_the_nat_balancer_answers_no_error_with_an_error() {
    let bench = Bench::with_services(&NatConfig::default(), NatMode::Full);
    for (name, client) in
        [("tcp/10.0.0.100:80", at("10.0.0.20:4000")), ("tcp/[2001:db8:a::100]:80", at("[2001:db8:a::20]:4000"))]
    {
        let name = service(name);
        let opened: Connection = open(&bench, &name, client);
        let vip = SocketAddr::new(name.address, 80);
        let family6 = vip.is_ipv6();
        // The way to the backends takes less than what comes in.
        bench.lab.balancer.set_mtu("eth1", 1400).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let big = Frame::tcp(client, vip).flags(tcp::ACK).sequence(2, 1001).payload(&vec![1; 1400]).dont_fragment();
        assert_eq!(bench.client_sends(&big).reason, Reason::TooBigAnswered);
        let quoted = Frame::tcp(vip, client).payload(&[1; 1600]).packet();
        let headers = if family6 { 48 } else { 28 };
        let error = match family6 {
            false => Frame::icmp(client.ip(), vip.ip(), 3, 4, [0; 4]),
            true => Frame::icmp(client.ip(), vip.ip(), 2, 0, [0; 4]),
        };
        let error = error.payload(&quoted[..1488 - headers]).dont_fragment();
        let outcome = bench.client_sends(&error);
        assert_eq!((outcome.action, outcome.reason), (Action::Drop, Reason::TooBig), "{opened}");
        let (from, _) = bench.macs_of_clients();
        let outcome = bench.run(Side::Clients, &big.clone().macs(from, [0xff; 6]).build());
        assert_eq!((outcome.action, outcome.reason), (Action::Pass, Reason::NotForUs));
        bench.lab.balancer.set_mtu("eth1", 1500).unwrap();
    }
}
