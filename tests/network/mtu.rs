//! MTUs of the balancer's egress that shrink and grow: senders of what does not fit are told at once, and what fits again goes on.

use std::{
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use xdpkit_lab::traffic::UdpEcho;

use crate::{
    bench::{Bench, Losses, assert_followed, balanced, echoes, patience, routed, two_paths, within},
    common::is_emulated,
    lab::{FAMILIES, Lab},
};

/// Fits a link of 1500 bytes with an outer IPv6 header; without one, it does not fit a narrow one.
const LARGE: usize = 1360;
const NARROW: u32 = 1340;

/// A client's socket, whose host forgets what it was told before.
fn client(lab: &Lab, target: SocketAddr) -> UdpSocket {
    for family in ["ipv4", "ipv6"] {
        lab.client.sysctl(&format!("net.{family}.route.flush"), "1").unwrap();
    }
    let socket = lab.client.run(|| UdpSocket::bind(if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })).unwrap();
    socket.connect(target).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(if is_emulated() { 300 } else { 20 }))).unwrap();
    socket
}

fn set_mtu(lab: &Lab, mtu: u32) -> Instant {
    // Clients' packets come in by eth0.
    ["eth1", "eth2"].iter().for_each(|dev| lab.balancer.set_mtu(dev, mtu).unwrap());
    Instant::now()
}

/// After how long something comes about, if it does.
fn until(since: Instant, mut holds: impl FnMut() -> bool) -> Option<Duration> {
    while !holds() {
        if since.elapsed() > patience() {
            return None;
        }
    }
    Some(since.elapsed())
}

/// How long it takes until a change is heard of: what is too large, and what is not any more.
fn told(lab: &Lab, echoes: &[UdpEcho], targets: Vec<(String, SocketAddr)>) -> Losses {
    let arrived = || echoes.iter().map(UdpEcho::datagrams).sum::<usize>();
    // One error is said for many datagrams, otherwise.
    lab.balancer.sysctl("net.ipv4.icmp_ratelimit", "0").unwrap();
    lab.balancer.sysctl("net.ipv6.icmp.ratelimit", "0").unwrap();
    let every = |(name, target): (String, SocketAddr)| {
        let grown = set_mtu(lab, 1500);
        let goes = until(grown, || {
            let socket = client(lab, target);
            socket.send(&[7; LARGE]).is_ok() && socket.recv(&mut [0; LARGE]).is_ok()
        });
        let socket = client(lab, target);
        let narrow = set_mtu(lab, NARROW);
        let before = arrived();
        let told = until(narrow, || {
            // Who was told sends the next one in fragments. It may come back too large for the narrow interface.
            let _ = socket.send(&[7; LARGE]);
            let _ = socket.recv(&mut [0; LARGE]);
            arrived() > before
        });
        [(format!("{name}, grown"), goes), (format!("{name}, narrow"), told)]
    };
    targets.into_iter().flat_map(every).collect()
}

#[test]
fn changed_mtus_are_followed() {
    let kernel = {
        let lab = two_paths();
        let echoes = echoes(&lab);
        told(&lab, &echoes, routed(&lab))
    };
    assert_followed(Duration::ZERO, &kernel, within());
    assert_eq!(kernel.len(), 4 * FAMILIES.len());
    Bench::with(|lab, echoes| assert_followed(Duration::ZERO, &told(lab, echoes, balanced()), within()));
}
