//! Next hops by VLANs, bonds and bridges that filter, on kernels that have them. These need root.

use std::sync::Arc;

use xdpkit_lab::{Namespace, XdpPass, veth};

use super::{
    Host,
    tests::{eventually, ip},
};
use crate::{
    abi::next_hop::{Egress, LinkKey, NextHopKey, Tag, mac_word, tags_word},
    base::{NextHops, next_hops},
};

/// A host with a table and two links to one other.
struct Bed {
    ns: Namespace,
    peer: Namespace,
    _host: Arc<Host>,
    table: Arc<NextHops>,
    _passes: [XdpPass; 2],
}

/// Runs `ip`, or another program, with these words; false when it refuses.
fn run(ns: &Namespace, line: &str) -> bool {
    let mut words = line.split_whitespace();
    let output = ns.command(words.next().unwrap()).args(words).output().unwrap();
    if !output.status.success() {
        eprintln!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    output.status.success()
}

impl Bed {
    /// `None`, and a line on standard error, where the kernel lacks one of these kinds of interfaces.
    fn new(kinds: &[&str]) -> Option<Self> {
        let [ns, peer] = ["host", "peer"].map(|name| Namespace::new(name).unwrap());
        for dev in ["eth0", "eth1"] {
            veth((&ns, dev), (&peer, dev)).unwrap();
        }
        let _passes = ["eth0", "eth1"].map(|dev| peer.xdp_pass(dev).unwrap());
        for kind in kinds {
            let probe = Namespace::new("probe").unwrap();
            veth((&probe, "eth0"), (&probe, "eth1")).unwrap();
            if !run(&probe, &format!("ip link add {kind}")) {
                eprintln!("not run: this kernel has no `{kind}`");
                return None;
            }
        }
        let host = ns.run(Host::here).unwrap();
        let table = Arc::new(next_hops());
        host.serve(&table).unwrap();
        Some(Self { ns, peer, _host: host, table, _passes })
    }

    fn run(&self, on: &Namespace, lines: &[&str]) {
        lines.iter().for_each(|line| assert!(run(on, line), "{line}"));
    }

    fn index(&self, dev: &str) -> u32 {
        self.ns.ifindex(dev).unwrap()
    }

    /// Waits until frames to the neighbour, whose interface is that of this name there, leave so.
    fn leaves(&self, dev: &str, address: &str, at: &str, egress: &Egress) {
        let wanted = ip(address);
        self.table.want(move || vec![wanted]);
        let key = NextHopKey { interface: self.index(dev), address: ip(address), mtu: 1500 };
        let number = self.table.find_or_make(&key, 0).unwrap();
        eventually(&format!("{address} by {egress:?}"), || {
            let hop = self.table.hop(number);
            hop.egress == egress.word() && hop.to == mac_word(self.peer.mac(at).unwrap())
        });
    }

    /// Waits until frames with these tags are for this interface.
    fn arrives(&self, by: &str, tags: &[Tag], dev: &str) {
        let key = LinkKey { device: self.index(by), tags: tags_word(tags) };
        eventually(&format!("{by} {tags:?} is for {dev}"), || {
            self.table.links().get(&key).unwrap().is_some_and(|info| info.layer3 == self.index(dev))
        });
    }
}

const fn tag(id: u16) -> Tag {
    Tag { id, ad: false }
}

#[test]
fn frames_of_vlans_leave_with_their_tags() {
    let Some(bed) = Bed::new(&["link eth0 name v type vlan id 1"]) else { return };
    for (ns, last) in [(&bed.ns, 1), (&bed.peer, 2)] {
        bed.run(
            ns,
            &[
                "ip link add link eth0 name eth0.100 type vlan id 100",
                "ip link add link eth0 name eth0.200 type vlan proto 802.1ad id 200",
                "ip link add link eth0.200 name eth0.200.30 type vlan id 30",
                "ip link set eth0.100 up",
                "ip link set eth0.200 up",
                "ip link set eth0.200.30 up",
                &format!("ip addr add 192.0.2.{last}/24 dev eth0.100"),
                &format!("ip addr add 198.51.100.{last}/24 dev eth0.200.30"),
            ],
        );
    }
    let outer = Tag { id: 200, ad: true };
    bed.arrives("eth0", &[tag(100)], "eth0.100");
    bed.arrives("eth0", &[outer, tag(30)], "eth0.200.30");
    bed.arrives("eth0", &[], "eth0");
    let eth0 = bed.index("eth0");
    bed.leaves("eth0.100", "192.0.2.2", "eth0.100", &Egress::Device(eth0, vec![tag(100)]));
    bed.leaves("eth0.200.30", "198.51.100.2", "eth0.200.30", &Egress::Device(eth0, vec![outer, tag(30)]));
}

#[test]
fn frames_of_bonds_and_vrfs_leave_by_them() {
    let Some(bed) = Bed::new(&["name b type bond", "name r type vrf table 9"]) else { return };
    bed.run(
        &bed.ns,
        &[
            "ip link add bond0 type bond mode active-backup miimon 50",
            "ip link set eth0 down",
            "ip link set eth0 master bond0",
            "ip link set bond0 up",
            "ip addr add 192.0.2.1/24 dev bond0",
            "ip link add red type vrf table 9",
            "ip link set red up",
            "ip link set eth1 master red",
            "ip addr add 198.51.100.1/24 dev eth1",
            "ip rule add to 198.51.100.0/24 lookup 9",
        ],
    );
    bed.run(&bed.peer, &["ip addr add 192.0.2.2/24 dev eth0", "ip addr add 198.51.100.2/24 dev eth1"]);
    bed.arrives("eth0", &[], "bond0");
    bed.arrives("eth1", &[], "eth1");
    bed.leaves("bond0", "192.0.2.2", "eth0", &Egress::Device(bed.index("bond0"), vec![]));
    bed.leaves("eth1", "198.51.100.2", "eth1", &Egress::Device(bed.index("eth1"), vec![]));
}

#[test]
fn a_bridge_that_filters_tags_for_its_ports() {
    let Some(bed) = Bed::new(&["link eth0 name v type vlan id 1", "name b type bridge vlan_filtering 1"]) else {
        return;
    };
    bed.run(
        &bed.ns,
        &[
            "ip link add br0 type bridge vlan_filtering 1",
            "ip link set eth0 master br0",
            "ip link set eth1 master br0",
            "ip link set br0 up",
            "bridge vlan add dev br0 vid 100-101 self",
            "bridge vlan add dev eth0 vid 100",
            "bridge vlan add dev eth1 vid 101 pvid untagged",
            "ip link add link br0 name br0.100 type vlan id 100",
            "ip link add link br0 name br0.101 type vlan id 101",
            "ip link set br0.100 up",
            "ip link set br0.101 up",
            "ip addr add 192.0.2.1/24 dev br0.100",
            "ip addr add 198.51.100.1/24 dev br0.101",
            "ip addr add 203.0.113.1/24 dev br0",
        ],
    );
    bed.run(
        &bed.peer,
        &[
            "ip link add link eth0 name eth0.100 type vlan id 100",
            "ip link set eth0.100 up",
            "ip addr add 192.0.2.2/24 dev eth0.100",
            "ip addr add 198.51.100.2/24 dev eth1",
            "ip addr add 203.0.113.2/24 dev eth0",
        ],
    );
    bed.arrives("eth0", &[tag(100)], "br0.100");
    bed.arrives("eth1", &[], "br0.101");
    bed.arrives("eth0", &[], "br0");
    let [eth0, eth1] = ["eth0", "eth1"].map(|dev| bed.index(dev));
    bed.leaves("br0.100", "192.0.2.2", "eth0.100", &Egress::Device(eth0, vec![tag(100)]));
    bed.leaves("br0.101", "198.51.100.2", "eth1", &Egress::Device(eth1, vec![]));
    bed.leaves("br0", "203.0.113.2", "eth0", &Egress::Device(eth0, vec![]));
    // A port that is taken out of a VLAN.
    bed.run(&bed.ns, &["bridge vlan del dev eth0 vid 100"]);
    let key = NextHopKey { interface: bed.index("br0.100"), address: ip("192.0.2.2"), mtu: 1500 };
    let number = bed.table.find_or_make(&key, 0).unwrap();
    eventually("the tag is gone", || bed.table.hop(number).egress != Egress::Device(eth0, vec![tag(100)]).word());
}
