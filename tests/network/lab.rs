//! A network with a balancer's host in its middle, whose cards carry bridges, VLANs, bonds and the like.
//!
//! ```text
//! client eth0 ---- [front] ---- balancer ---- [back] ------ eth0 backend0, ...
//!        eth1 -------------- [return] --------------------- eth2
//!                               balancer ---- [second] ---- eth1    (with a second path)
//! ```
//!
//! Networks are 10.N.0.0/24 and 2001:db8:N::/64, hosts the same number in each. The client's own address is behind its address
//! in the front network, so that it is the balancer's gateway. Backends have addresses that the balancer reaches through
//! their address in the back network (FAR) and others that are on the link (NEAR), and the virtual addresses of
//! direct server return.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use xdpkit::XdpMode;
use xdpkit_lab::{
    Error, Membership, Namespace, Result, Route, Rule, Tag, XdpPass, topology::add_silent_vip, traffic::HttpServer,
    veth,
};

pub(crate) const CLIENTS: u8 = 0;
pub(crate) const FRONT: u8 = 1;
pub(crate) const BACK: u8 = 2;
pub(crate) const SECOND: u8 = 3;
const RETURN: u8 = 4;
pub(crate) const FAR: u8 = 5;
pub(crate) const NEAR: u8 = 9;
const VIPS: u8 = 100;

pub(crate) const CLIENT: u8 = 1;
pub(crate) const BALANCER: u8 = 10;
pub(crate) const FIRST_BACKEND: u8 = 11;
const NAT_VIP: u8 = 1;
const DSR_VIP: u8 = 2;

/// The table in which a VRF has its routes.
const VRF_TABLE: u32 = 100;

/// What stands between the cards of the balancer's host and its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Plain,
    /// The same, with programs in generic mode.
    Generic,
    Bridge,
    Macvlan,
    /// One bridge with both cards as ports, and a VLAN on it for each side: without tag to the front, tagged to the back.
    FilteringBridge,
    Vlan,
    /// IEEE 802.1ad.
    ServiceVlan,
    /// A VLAN within a service VLAN.
    StackedVlan,
    /// One card, with both sides as VLANs on it.
    Trunk,
    Bond,
    /// A trunk of two cables.
    VlanOnBond,
    Vrf,
}

impl Host {
    /// The VLAN tags of frames to the front and to the back, outer first.
    fn tags(self) -> [Vec<Tag>; 2] {
        use Tag::{Customer, Service};
        match self {
            Self::Vlan | Self::Trunk | Self::VlanOnBond => [vec![Customer(10)], vec![Customer(20)]],
            Self::FilteringBridge => [vec![], vec![Customer(20)]],
            Self::ServiceVlan => [vec![Service(10)], vec![Service(20)]],
            Self::StackedVlan => [vec![Service(5), Customer(10)], vec![Service(6), Customer(20)]],
            _ => [vec![], vec![]],
        }
    }

    /// The cards, those to the front and those to the back.
    fn cards(self) -> [&'static [&'static str]; 2] {
        match self {
            Self::Trunk => [&["eth0"], &["eth0"]],
            Self::Bond => [&["eth0", "eth2"], &["eth1", "eth3"]],
            Self::VlanOnBond => [&["eth0", "eth2"], &["eth0", "eth2"]],
            _ => [&["eth0"], &["eth1"]],
        }
    }
}

/// An address in a network.
pub(crate) fn ip(family6: bool, net: u8, number: u8) -> IpAddr {
    let text = if family6 { format!("2001:db8:{net}::{number}") } else { format!("10.{net}.0.{number}") };
    text.parse().expect("an address")
}

/// A network.
pub(crate) fn net(family6: bool, net: u8) -> IpNet {
    let text = if family6 { format!("2001:db8:{net}::/64") } else { format!("10.{net}.0.0/24") };
    text.parse().expect("a network")
}

/// The virtual address of the NAT balancer, and that of the balancer with direct server return.
pub(crate) fn nat_vip(family6: bool) -> IpAddr {
    ip(family6, VIPS, NAT_VIP)
}

pub(crate) fn dsr_vip(family6: bool) -> IpAddr {
    ip(family6, VIPS, DSR_VIP)
}

pub(crate) const FAMILIES: [bool; 2] = [false, true];

pub(crate) struct Lab {
    pub(crate) client: Namespace,
    pub(crate) balancer: Namespace,
    pub(crate) backends: Vec<Namespace>,
    pub(crate) switch: Namespace,
    /// The balancer's cards, where its programs run, and how; by which of them clients come in.
    pub(crate) cards: Vec<&'static str>,
    pub(crate) front_cards: &'static [&'static str],
    pub(crate) mode: XdpMode,
    second_path: bool,
    /// The devices that have the balancer's addresses in the front and the back network.
    pub(crate) front: String,
    pub(crate) back: String,
    _guards: Vec<XdpPass>,
}

impl Lab {
    /// Builds it with as many backends, and a second path to them.
    ///
    /// # Errors
    /// [`Error::is_unsupported`] when the kernel has no such devices.
    pub(crate) fn new(host: Host, backends: u8, second_path: bool) -> Result<Self> {
        let [client, balancer, switch] = ["client", "balancer", "switch"].map(Namespace::new);
        let (client, balancer, switch) = (client?, balancer?, switch?);
        let backends: Vec<_> = (0..backends).map(|n| Namespace::new(&format!("backend{n}"))).collect::<Result<_>>()?;
        let mut lab = Self {
            client,
            balancer,
            backends,
            switch,
            cards: Vec::new(),
            front_cards: host.cards()[0],
            mode: if host == Host::Generic { XdpMode::Generic } else { XdpMode::Native },
            second_path,
            front: String::new(),
            back: String::new(),
            _guards: Vec::new(),
        };
        for ns in lab.backends.iter().chain([&lab.balancer]) {
            // An address that goes leaves the others of its network.
            ns.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
        }
        lab.connect(host)?;
        [lab.front, lab.back] = lab.stack(host)?;
        lab.address(host)?;
        lab.introduce_balancer()?;
        Ok(lab)
    }

    /// Cables and switches.
    fn connect(&mut self, host: Host) -> Result<()> {
        let (tags, cards) = (host.tags(), host.cards());
        let mut sides = [Vec::new(), Vec::new()];
        for (side, names) in cards.into_iter().enumerate() {
            for card in names {
                let port = format!("card-{card}");
                if !self.cards.contains(card) {
                    self.plug(card, &port)?;
                    if tags != [vec![], vec![]] {
                        self.balancer.set_vlan_offload(card, false)?;
                        self.switch.set_vlan_offload(&port, false)?;
                    }
                }
                sides[side].push(add_vlans(&self.switch, &port, &tags[side])?);
            }
        }
        let mut second = Vec::new();
        if self.second_path {
            self.plug("eth2", "card-eth2")?;
            second.push("card-eth2".to_owned());
        }
        let [mut front, mut back] = sides;
        let mut direct = Vec::new();
        let join = |bridge: &mut Vec<String>, host: &Namespace, dev: &str| {
            let port = format!("{}-{dev}", host.name());
            bridge.push(port.clone());
            veth((host, dev), (&self.switch, &port))
        };
        join(&mut front, &self.client, "eth0")?;
        join(&mut direct, &self.client, "eth1")?;
        for backend in &self.backends {
            join(&mut back, backend, "eth0")?;
            join(&mut direct, backend, "eth2")?;
            if self.second_path {
                join(&mut second, backend, "eth1")?;
            }
        }
        for (name, ports) in [("front", front), ("back", back), ("return", direct), ("second", second)] {
            let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
            self.switch.add_bridge(name, &ports)?;
        }
        Ok(())
    }

    /// One of the balancer's cards. Its port takes what native programs send.
    fn plug(&mut self, card: &'static str, port: &str) -> Result<()> {
        veth((&self.balancer, card), (&self.switch, port))?;
        self._guards.push(self.switch.xdp_pass(port)?);
        self.cards.push(card);
        Ok(())
    }

    /// What the host has on its cards: the devices with its addresses.
    fn stack(&self, host: Host) -> Result<[String; 2]> {
        let ns = &self.balancer;
        let tags = host.tags();
        match host {
            Host::Bridge => {
                ns.add_bridge("br0", &["eth0"])?;
                ns.add_bridge("br1", &["eth1"])?;
                Ok(["br0".into(), "br1".into()])
            }
            Host::Macvlan => {
                ns.add_macvlan("mv0", "eth0", [2, 0, 0, 0, 0xa, 1])?;
                ns.add_macvlan("mv1", "eth1", [2, 0, 0, 0, 0xa, 2])?;
                Ok(["mv0".into(), "mv1".into()])
            }
            Host::FilteringBridge => {
                ns.add_filtering_bridge("br0", &["eth0", "eth1"])?;
                ns.add_bridge_vlan("eth0", 10, Membership::Untagged)?;
                ns.add_bridge_vlan("eth1", 20, Membership::Tagged)?;
                for id in [10, 20] {
                    ns.add_bridge_vlan("br0", id, Membership::Bridge)?;
                }
                Ok([add_vlans(ns, "br0", &[Tag::Customer(10)])?, add_vlans(ns, "br0", &[Tag::Customer(20)])?])
            }
            Host::Bond => {
                ns.add_bond("bond0", host.cards()[0])?;
                ns.add_bond("bond1", host.cards()[1])?;
                Ok(["bond0".into(), "bond1".into()])
            }
            Host::VlanOnBond => {
                ns.add_bond("bond0", host.cards()[0])?;
                Ok([add_vlans(ns, "bond0", &tags[0])?, add_vlans(ns, "bond0", &tags[1])?])
            }
            Host::Vrf => {
                ns.add_vrf("vrf0", VRF_TABLE, &["eth0", "eth1"])?;
                Ok(["eth0".into(), "eth1".into()])
            }
            _ => {
                let [front, back] = host.cards().map(|cards| cards[0]);
                Ok([add_vlans(ns, front, &tags[0])?, add_vlans(ns, back, &tags[1])?])
            }
        }
    }

    fn address(&self, host: Host) -> Result<()> {
        let in_table = |route: Route| if host == Host::Vrf { route.table(VRF_TABLE) } else { route };
        self.balancer.enable_forwarding()?;
        for family6 in FAMILIES {
            let (client, balancer) = (&self.client, &self.balancer);
            let own = ip(family6, CLIENTS, 20);
            client.add_address("lo", own.into())?;
            add_address(client, "eth0", family6, FRONT, CLIENT)?;
            add_address(client, "eth1", family6, RETURN, CLIENT)?;
            add_address(balancer, &self.front, family6, FRONT, BALANCER)?;
            add_address(balancer, &self.back, family6, BACK, BALANCER)?;
            for to in [VIPS, FAR, NEAR] {
                client.replace_route(&Route::to(net(family6, to)).via(ip(family6, FRONT, BALANCER)).source(own))?;
            }
            let everywhere = Route::to(IpNet::new_assert(if family6 { [0; 16].into() } else { [0; 4].into() }, 0));
            balancer.replace_route(&in_table(everywhere.via_dev(ip(family6, FRONT, CLIENT), &self.front)))?;
            balancer.replace_route(&in_table(Route::to(net(family6, NEAR)).on_link(&self.back)))?;
            if self.second_path {
                add_address(balancer, "eth2", family6, SECOND, BALANCER)?;
            }
            for (backend, number) in self.backends.iter().zip(FIRST_BACKEND..) {
                let far = IpNet::from(ip(family6, FAR, number));
                balancer.replace_route(&in_table(Route::to(far).via_dev(ip(family6, BACK, number), &self.back)))?;
                backend.add_address("lo", far)?;
                add_silent_vip(backend, dsr_vip(family6))?;
                add_address(backend, "eth2", family6, RETURN, number)?;
                for (dev, link) in
                    [("eth0", BACK), ("eth1", SECOND)].into_iter().take(1 + usize::from(self.second_path))
                {
                    add_address(backend, dev, family6, link, number)?;
                    backend.add_address(dev, ip(family6, NEAR, number).into())?;
                }
                // Replies from an address of direct server return go to the client past the balancer.
                let direct = Route::to(net(family6, CLIENTS)).via(ip(family6, RETURN, CLIENT)).table(200);
                backend.replace_route(&direct)?;
                backend.add_rule(&Rule::new(dsr_vip(family6).into(), 200))?;
                reply_by(backend, family6, BACK, BALANCER)?;
            }
        }
        Ok(())
    }

    /// Lets all others know the balancer's MAC addresses for good: they never ask, from which it would learn theirs. Who gets
    /// another MAC address forgets it.
    pub(crate) fn introduce_balancer(&self) -> Result<()> {
        let host = &self.balancer;
        for family6 in FAMILIES {
            self.client.add_neighbour("eth0", ip(family6, FRONT, BALANCER), host.mac(&self.front)?)?;
            for backend in &self.backends {
                backend.add_neighbour("eth0", ip(family6, BACK, BALANCER), host.mac(&self.back)?)?;
                if self.second_path {
                    backend.add_neighbour("eth1", ip(family6, SECOND, BALANCER), host.mac("eth2")?)?;
                }
            }
        }
        Ok(())
    }

    /// The number of a backend in its networks.
    pub(crate) fn number(&self, backend: usize) -> u8 {
        FIRST_BACKEND + backend as u8
    }

    /// The backends' addresses in a network.
    pub(crate) fn backend_ips(&self, family6: bool, net: u8) -> Vec<IpAddr> {
        (0..self.backends.len()).map(|backend| ip(family6, net, self.number(backend))).collect()
    }

    /// Web servers on all backends, at these ports of all their addresses; a page tells the backend's number.
    pub(crate) fn pages(&self, ports: &[u16]) -> Vec<HttpServer> {
        let every = |(number, ns): (usize, &Namespace)| {
            let serve = |port: &u16| {
                let any = SocketAddr::new([0_u8; 16].into(), *port);
                HttpServer::start(ns, any, move |_| number.to_string()).unwrap()
            };
            ports.iter().map(serve).collect::<Vec<_>>()
        };
        self.backends.iter().enumerate().flat_map(every).collect()
    }
}

/// Has a backend send what goes back through the balancer to its address in this network.
pub(crate) fn reply_by(backend: &Namespace, family6: bool, link: u8, balancer: u8) -> Result<()> {
    let via = ip(family6, link, balancer);
    backend.replace_route(&Route::to(net(family6, CLIENTS)).via(via))?;
    backend.replace_route(&Route::to(nat_vip(family6).into()).via(via))
}

fn add_address(ns: &Namespace, dev: &str, family6: bool, link: u8, number: u8) -> Result<()> {
    ns.add_address(dev, IpNet::new_assert(ip(family6, link, number), net(family6, link).prefix_len()))
}

/// A device for frames with these tags, which may be there; the interface itself for none.
fn add_vlans(ns: &Namespace, dev: &str, tags: &[Tag]) -> Result<String> {
    tags.iter().try_fold(dev.to_owned(), |lower, tag| {
        let (Tag::Customer(id) | Tag::Service(id)) = tag;
        let name = format!("{lower}.{id}");
        match ns.ifindex(&name) {
            Err(Error::NoSuchDevice { .. }) => ns.add_vlan(&name, &lower, *tag)?,
            other => drop(other?),
        }
        Ok(name)
    })
}
