//! Namespaces, links, addresses and real traffic between two of them.

use std::time::Duration;

use xdpkit_lab::frame::Frame;
use xdpkit_lab::traffic::{self, HttpServer, TcpEcho, UdpEcho};
use xdpkit_lab::{Namespace, PacketSocket, veth};

const SECOND: Duration = Duration::from_secs(1);

fn two() -> (Namespace, Namespace) {
    let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
    veth((&a, "eth0"), (&b, "eth0")).unwrap();
    for (ns, host) in [(&a, 1), (&b, 2)] {
        ns.add_address("eth0", format!("10.0.0.{host}/24").parse().unwrap()).unwrap();
        ns.add_address("eth0", format!("fd00::{host}/64").parse().unwrap()).unwrap();
    }
    (a, b)
}

#[test]
fn tcp_udp_http_and_ping_work_in_both_families() {
    let (a, b) = two();
    for ip in ["10.0.0.2", "fd00::2"] {
        let ip: std::net::IpAddr = ip.parse().unwrap();
        let tcp = TcpEcho::start(&b, (ip, 7).into()).unwrap();
        let udp = UdpEcho::start(&b, (ip, 7).into()).unwrap();
        let http = HttpServer::start(&b, (ip, 80).into(), |peer| format!("hello {}", peer.ip())).unwrap();
        let big = vec![7; 3 << 20];
        assert!(traffic::tcp_echo(&a, tcp.addr(), &big, 10 * SECOND).unwrap() == big);
        assert_eq!(traffic::udp_echo(&a, udp.addr(), b"ping", SECOND).unwrap(), b"ping");
        let page = traffic::http_get(&a, http.addr(), "/", SECOND).unwrap();
        assert!(page.starts_with(b"hello "), "{page:?}");
        assert_eq!(traffic::http_get(&a, http.addr(), "/bytes/1000000", 5 * SECOND).unwrap().len(), 1_000_000);
        assert_eq!(tcp.connections(), 1);
        let report = traffic::ping(&a, ip, 3, Duration::from_millis(10), SECOND).unwrap();
        assert_eq!((report.sent, report.received), (3, 3));
    }
}

#[test]
fn a_capture_has_the_frames_of_the_other_end_only_and_their_vlan_tags() {
    let (a, b) = two();
    let sender = PacketSocket::open(&a, "eth0").unwrap();
    let receiver = PacketSocket::open(&b, "eth0").unwrap();
    let mut frame = vec![0xff; 12];
    frame.extend([0x81, 0x00, 0x60, 0x64, 0x88, 0xb5]);
    frame.extend([0x5a; 46]);
    sender.send(&frame).unwrap();
    let got = receiver.recv_matching(SECOND, |got| got.contains(&0x5a)).unwrap();
    assert_eq!(got.as_deref(), Some(&frame[..]));
    assert_eq!(sender.recv_matching(Duration::from_millis(50), |got| got == frame).unwrap(), None);
}

/// The longest frame of a download, as the receiver captures it.
fn longest_frame(from: &Namespace, to: &Namespace) -> usize {
    let capture = PacketSocket::open(to, "eth0").unwrap();
    let server = HttpServer::start(from, "10.0.0.1:80".parse().unwrap(), |_| String::new()).unwrap();
    traffic::http_get(to, server.addr(), "/bytes/1000000", 5 * SECOND).unwrap();
    let lengths = || capture.recv(Duration::ZERO).unwrap().map(|frame| frame.len());
    std::iter::from_fn(lengths).max().unwrap()
}

#[test]
fn offloads_are_off_until_asked_for_and_xdp_does_not_turn_them_on() {
    let (a, b) = two();
    assert_eq!(longest_frame(&a, &b), 1514);
    let pass = b.xdp_pass("eth0").unwrap();
    assert_eq!(longest_frame(&a, &b), 1514);
    drop(pass);
    a.set_offload("eth0", true).unwrap();
    b.set_offload("eth0", true).unwrap();
    assert!(longest_frame(&a, &b) > 1514);
}

#[test]
fn links_take_their_settings() {
    let (a, b) = two();
    let mac = [2, 0, 0, 0, 0, 42];
    a.set_mac("eth0", mac).unwrap();
    assert_eq!(a.mac("eth0").unwrap(), mac);
    let both_mtu = |mtu| [&a, &b].map(|ns| ns.set_mtu("eth0", mtu).unwrap());
    both_mtu(9000);
    let _jumbo = b.xdp_pass("eth0").unwrap();
    assert_eq!(longest_frame(&a, &b), 9014);
    let ping = || {
        let ip = "10.0.0.2".parse().unwrap();
        traffic::ping(&a, ip, 1, Duration::ZERO, SECOND).unwrap().received
    };
    assert_eq!(ping(), 1);
    b.set_down("eth0").unwrap();
    assert_eq!(ping(), 0);
    b.set_up("eth0").unwrap();
    a.add_neighbour("eth0", "10.0.0.2".parse().unwrap(), [2, 0, 0, 0, 0, 99]).unwrap();
    assert_eq!(ping(), 0, "the permanent entry leads elsewhere");
    a.add_neighbour("eth0", "10.0.0.2".parse().unwrap(), b.mac("eth0").unwrap()).unwrap();
    assert_eq!(ping(), 1);
    a.delete_link("eth0").unwrap();
    assert!(b.ifindex("eth0").is_err());
}

#[test]
fn a_promiscuous_capture_sees_frames_for_others_and_bursts_are_complete() {
    let (a, b) = two();
    let sender = PacketSocket::open(&a, "eth0").unwrap();
    sender.set_qdisc_bypass(true).unwrap();
    let receiver = PacketSocket::open(&b, "eth0").unwrap();
    receiver.set_promiscuous().unwrap();
    let frame = |i| Frame::ethernet(0x88b5).payload(&[i; 50]).build();
    let frames: Vec<_> = (0..100).map(frame).collect();
    sender.send_many(&frames.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    for frame in &frames {
        let got = receiver.recv_matching(SECOND, |got| got[12..14] == [0x88, 0xb5]).unwrap();
        assert_eq!(got.as_ref(), Some(frame));
    }
}

#[test]
fn a_route_without_a_gateway_reaches_its_neighbours() {
    let (a, b) = two();
    b.add_address("lo", "192.0.2.1/32".parse().unwrap()).unwrap();
    a.add_onlink_route("192.0.2.0/24".parse().unwrap(), "eth0").unwrap();
    let ip = "192.0.2.1".parse().unwrap();
    assert_eq!(traffic::ping(&a, ip, 1, Duration::ZERO, SECOND).unwrap().received, 1);
}

#[test]
fn clients_give_up() {
    let (a, b) = two();
    b.set_down("eth0").unwrap();
    let (short, addr) = (SECOND / 10, "10.0.0.2:7".parse().unwrap());
    let start = std::time::Instant::now();
    assert!(traffic::tcp_echo(&a, addr, b"x", short).is_err());
    assert!(traffic::udp_echo(&a, addr, b"x", short).is_err());
    assert!(traffic::http_get(&a, addr, "/", short).is_err());
    assert!(start.elapsed() < 30 * SECOND, "not by themselves: {:?}", start.elapsed());
}
