//! Changes of the host's network under traffic: followed within a second, where the kernel's own forwarding follows at once.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use ipnet::IpNet;
use xdpkit_lab::{Namespace, Route};

use crate::{
    balancers::{Balancers, Method},
    bench::{
        Bench, Judgement, TABLE, assert_followed, compare, default_route, echoes, followed, lead, losses, patience,
        probe, replies_by, rules, two_paths, within,
    },
    lab::{BACK, BALANCER, CLIENT, CLIENTS, FAMILIES, FAR, FIRST_BACKEND, FRONT, Lab, NEAR, SECOND, ip, net, reply_by},
};

/// A MAC address that was nobody's, and all these addresses of the interface announced.
fn change_mac(ns: &Namespace, dev: &str, addresses: &[(u8, u8)]) {
    set_new_mac(ns, dev);
    for family6 in FAMILIES {
        addresses.iter().for_each(|(network, number)| ns.announce(dev, ip(family6, *network, *number)).unwrap());
    }
}

fn set_new_mac(ns: &Namespace, dev: &str) {
    static LAST: AtomicU16 = AtomicU16::new(0);
    let [high, low] = LAST.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    ns.set_mac(dev, [2, 0, 0, 0xee, high, low]).unwrap();
}

/// The backend's, as the balancer's next hop and as itself; and the client's, which is the gateway of NAT's replies.
pub(crate) fn change_macs(lab: &Lab) {
    let number = lab.number(0);
    change_mac(&lab.backends[0], "eth0", &[(BACK, number), (NEAR, number)]);
    change_mac(&lab.client, "eth0", &[(FRONT, CLIENT)]);
}

/// The neighbours that the balancer's host has on its first path: interfaces and addresses.
fn neighbours(lab: &Lab) -> impl Iterator<Item = (&'static str, IpAddr)> {
    let number = lab.number(0);
    let of = move |family6| {
        [("eth1", BACK, number), ("eth1", NEAR, number), ("eth0", FRONT, CLIENT)]
            .map(|(dev, network, number)| (dev, ip(family6, network, number)))
    };
    FAMILIES.into_iter().flat_map(of)
}

/// The kernel does; who needs them has to find them out again.
pub(crate) fn forget_neighbours(lab: &Lab) {
    neighbours(lab).for_each(|(dev, ip)| lab.balancer.forget_neighbour(dev, ip).unwrap());
}

#[test]
fn announced_macs_are_followed() {
    followed(change_macs);
}

#[test]
fn deleted_neighbours_are_found_again() {
    followed(forget_neighbours);
}

/// The first path leads nowhere any more; the carrier of the balancer's card stays.
pub(crate) fn leave_first_path(lab: &Lab) {
    lab.switch.set_down("backend0-eth0").unwrap();
}

#[test]
fn routes_to_other_gateways_are_followed() {
    followed(|lab| {
        lead(lab, SECOND, FIRST_BACKEND, None);
        replies_by(lab, SECOND);
        leave_first_path(lab);
    });
}

#[test]
fn a_link_that_goes_down_is_left_for_the_second_path() {
    followed(|lab| {
        lab.balancer.set_down("eth1").unwrap();
        replies_by(lab, SECOND);
    });
}

/// Other numbers in the back network for the balancer and for the backend, which is its next hop there.
pub(crate) fn renumber(lab: &Lab, balancer: [u8; 2], backend: [u8; 2]) {
    for family6 in FAMILIES {
        let with = |number| IpNet::new_assert(ip(family6, BACK, number), if family6 { 64 } else { 24 });
        lab.balancer.add_address("eth1", with(balancer[1])).unwrap();
        lab.backends[0].add_address("eth0", with(backend[1])).unwrap();
        let far = Route::to(ip(family6, FAR, lab.number(0)).into());
        lab.balancer.replace_route(&far.via_dev(ip(family6, BACK, backend[1]), "eth1")).unwrap();
        reply_by(&lab.backends[0], family6, BACK, balancer[1]).unwrap();
        lab.balancer.remove_address("eth1", with(balancer[0])).unwrap();
        lab.backends[0].remove_address("eth0", with(backend[0])).unwrap();
    }
}

#[test]
fn changed_addresses_are_followed() {
    let (balancer, other) = ([BALANCER, BALANCER + 50], [FIRST_BACKEND, FIRST_BACKEND + 50]);
    followed(|lab| renumber(lab, balancer, other));
    Bench::with(|lab, _| renumber(lab, [balancer[1], balancer[0]], [other[1], other[0]]));
}

/// For as long as the kernel looks after a neighbour by itself when a packet has gone there once.
const LOOKED_AFTER: Duration = Duration::from_secs(4);

/// In a second and a half instead of eight.
fn probe_soon(lab: &Lab, reachable: &str) {
    probe(&lab.balancer, "1", "2", "250", reachable);
    // Who is known is believed for as long as was right before.
    forget_neighbours(lab);
}

#[test]
fn stale_neighbours_are_confirmed_as_soon_as_the_kernel_does() {
    // As long as nobody confirms it, the old one is used.
    let kernel = Duration::from_millis(500)..=patience();
    compare(
        &Judgement { flow: LOOKED_AFTER, kernel, more: 2 * within() },
        |lab| probe_soon(lab, "30000"),
        |lab| {
            let nobody = [2, 0, 0, 0xdd, 0, 1];
            neighbours(lab).for_each(|(dev, ip)| lab.balancer.add_stale_neighbour(dev, ip, nobody).unwrap());
        },
    );
}

#[test]
fn macs_that_change_in_silence_are_followed_as_soon_as_the_kernel_does() {
    compare(
        &Judgement { flow: LOOKED_AFTER, kernel: Duration::ZERO..=patience(), more: 2 * within() },
        |lab| probe_soon(lab, "700"),
        |lab| {
            for (ns, port) in [(&lab.backends[0], "backend0-eth0"), (&lab.client, "client-eth0")] {
                // What they ask before they know the balancer again is not heard.
                lab.switch.set_down(port).unwrap();
                set_new_mac(ns, "eth0");
                lab.introduce_balancer().unwrap();
                lab.switch.set_up(port).unwrap();
            }
        },
    );
}

#[test]
fn rules_by_source_are_followed() {
    followed(|lab| {
        let (host, number) = (&lab.balancer, lab.number(0));
        for family6 in FAMILIES {
            let far = Route::to(ip(family6, FAR, number).into()).via_dev(ip(family6, SECOND, number), "eth2");
            let clients = Route::to(net(family6, CLIENTS)).via_dev(ip(family6, FRONT, CLIENT), "eth0");
            for route in [far, Route::to(net(family6, NEAR)).on_link("eth2"), clients] {
                host.replace_route(&route.table(TABLE)).unwrap();
            }
            rules(family6).iter().for_each(|rule| host.add_rule(rule).unwrap());
            // Without the rules, everything is lost.
            host.replace_route(&default_route(family6, NOBODY)).unwrap();
        }
        replies_by(lab, SECOND);
        leave_first_path(lab);
    });
}

/// A host that is not there.
const NOBODY: u8 = 99;

/// Clients' packets come in by an interface that is not on the way to them: the stack throws them away.
#[test]
fn a_service_comes_up_under_strict_reverse_path_filtering() {
    let lab = two_paths();
    let everywhere = IpNet::new_assert([0; 4].into(), 0);
    lab.balancer.replace_route(&Route::to(everywhere).via_dev(ip(false, SECOND, NOBODY), "eth2")).unwrap();
    for dev in ["all", "eth0", "eth1"] {
        lab.balancer.sysctl(&format!("net.ipv4.conf.{dev}.rp_filter"), "1").unwrap();
    }
    let _echoes = echoes(&lab);
    let _balancers = Balancers::start(&lab);
    // Replies of NAT would go by the default route.
    let targets = [Method::L2, Method::IpIp].map(|method| (format!("{method:?}"), method.target(false)));
    let losses = losses(&lab, targets.into(), Duration::ZERO, |_| {});
    assert_followed(Duration::ZERO, &losses, within());
}
