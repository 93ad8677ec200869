//! Backends that come, go, and get another share, while hundreds of real connections are busy: only those of a backend
//! that was killed end. Traps: L15, L16, L17.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    net::SocketAddr,
    thread,
    time::Duration,
};

use crate::common::{
    busy::{Busy, Visitor},
    nat::{ROUTED_VIPS as VIPS, attach, backends, ip},
};
use xdpkit::{BackendState, NatBackend, NatBalancer, NatConfig, NatMode, NatService, ServiceAddr};
use xdpkit_lab::{topology::Nat, traffic::TcpEcho};

/// Everybody who talks, and what was done to the balancer while they did.
struct World {
    balancer: NatBalancer,
    services: [ServiceAddr; 2],
    busy: Vec<Busy>,
    visitors: Vec<Visitor>,
    /// The backends' addresses, by family.
    backends: [Vec<SocketAddr>; 2],
}

impl World {
    /// Does something to both services' backend of this number.
    fn change(&self, number: usize, change: impl Fn(&ServiceAddr, SocketAddr)) {
        self.services.iter().zip(&self.backends).for_each(|(service, backends)| change(service, backends[number]));
    }

    /// What the balancer says of it, in both services. Removed and gone: none.
    fn backend(&self, number: usize) -> Vec<NatBackend> {
        let listed = |(service, backends): (&ServiceAddr, &Vec<SocketAddr>)| {
            let found = self.balancer.backends(service).unwrap();
            found.into_iter().find(|backend| backend.address == backends[number])
        };
        self.services.iter().zip(&self.backends).filter_map(listed).collect()
    }

    fn opened(&self, number: usize) -> u64 {
        self.backend(number).iter().map(|backend| backend.stats.opened).sum()
    }

    /// Lets everybody go on for a while.
    fn go_on(&self) {
        let visits: Vec<_> = self.visitors.iter().map(Visitor::done).collect();
        self.busy.iter().for_each(Busy::all_go_on);
        crate::common::wait_for(|| {
            self.visitors.iter().zip(&visits).all(|(visitor, before)| visitor.done() >= before + 20)
        });
        for (visitor, before) in self.visitors.iter().zip(visits) {
            assert!(visitor.done() >= before + 20, "new connections come about: {:?}", visitor.failed());
        }
    }

    fn broken(&self) -> BTreeMap<SocketAddr, ErrorKind> {
        self.busy.iter().flat_map(Busy::broken).collect()
    }

    /// Nothing failed since this was last asked.
    fn all_is_well(&self, after: &str) {
        self.go_on();
        assert_eq!(self.broken(), BTreeMap::new(), "{after}");
        assert_eq!(self.visitors.iter().flat_map(Visitor::failed).collect::<Vec<_>>(), Vec::<String>::new(), "{after}");
    }
}

#[test]
fn l16_backends_come_and_go_under_load_and_only_the_killed_ones_connections_end() {
    let each = crate::common::times(100, 250, 10);
    let lab = Nat::new(4, 4).unwrap();
    for mode in [NatMode::Full, NatMode::Destination] {
        let balancer = NatBalancer::load(&NatConfig::default().reset_unknown(true)).unwrap();
        let _attached = attach(&lab, &balancer);
        let services = VIPS.map(|vip| ServiceAddr::tcp(ip(vip), 80));
        let at = services.map(|service| SocketAddr::new(service.address, 80));
        let backends = [false, true].map(|ipv6| backends(&lab, ipv6, 8080));
        let _echoes: Vec<_> = (backends.iter())
            .flat_map(|family| lab.backends.iter().zip(family))
            .map(|(ns, at)| TcpEcho::start(ns, *at).unwrap())
            .collect();
        for (service, backends) in services.iter().zip(&backends) {
            let with = NatService::new(backends[..3].iter().copied()).mode(mode);
            balancer.insert(*service, &with).unwrap();
        }
        let busy = lab.clients[..2].iter().map(|ns| Busy::start(ns, &at, each)).collect();
        let visitors = lab.clients[2..].iter().map(|ns| Visitor::start(ns, &at)).collect();
        let world = World { balancer, services, busy, visitors, backends };
        world.all_is_well("the beginning");

        world.change(0, |service, backend| _ = world.balancer.set_backend(service, backend, 5).unwrap());
        world.all_is_well("another weight");
        world.change(3, |service, backend| _ = world.balancer.set_backend(service, backend, 2).unwrap());
        world.all_is_well("a backend more");
        crate::common::wait_for(|| world.opened(3) > 0);
        assert!(world.opened(3) > 0, "the new one is used");

        world.change(1, |service, backend| world.balancer.drain(service, backend).unwrap());
        thread::sleep(Duration::from_millis(50));
        let before = world.opened(1);
        world.all_is_well("draining");
        assert_eq!(world.opened(1), before, "a draining one gets nothing new");
        world.change(1, |service, backend| world.balancer.remove_backend(service, backend).unwrap());
        world.all_is_well("removing what drains");
        assert!(world.backend(1).iter().all(|backend| backend.state == BackendState::Leaving));
        world.change(0, |service, backend| _ = world.balancer.set_backend(service, backend, 0).unwrap());
        world.all_is_well("weight 0");
        // The whole list at once, twenty times.
        for round in 0..20 {
            for (service, backends) in world.services.iter().zip(&world.backends) {
                let list = [(backends[0], 1 + round % 2), (backends[2], 1), (backends[3], 1 + round)];
                world.balancer.set_backends(service, &list).unwrap();
            }
        }
        world.all_is_well("other lists");

        let all: BTreeSet<_> = world.busy.iter().flat_map(|busy| busy.clients.iter().copied()).collect();
        assert_eq!(all.len(), 2 * each);
        let of_killed: BTreeSet<_> = (world.balancer.connections().unwrap().iter())
            .filter(|found| world.backends.iter().any(|family| family[2] == found.backend))
            .map(|found| found.client)
            .filter(|client| all.contains(client))
            .collect();
        assert!(!of_killed.is_empty() && of_killed.len() < all.len(), "{} of {}", of_killed.len(), all.len());
        world.change(2, |service, backend| world.balancer.kill(service, backend).unwrap());
        world.go_on();
        let broken = world.broken();
        let reset: BTreeSet<_> =
            broken.iter().filter(|(_, how)| **how == ErrorKind::ConnectionReset).map(|(client, _)| *client).collect();
        assert!(reset == of_killed && broken.len() == reset.len(), "{} were killed: {broken:?}", of_killed.len());
        let failed: Vec<_> = world.visitors.iter().flat_map(Visitor::failed).collect();
        assert!(failed.len() <= world.visitors.len(), "at most those that were there just then: {failed:?}");
        assert!(world.backend(2).is_empty());
        world.go_on();
        assert_eq!(world.broken(), broken, "{mode:?}: nothing else ended");
        println!("{mode:?}: {} connections, {} of them killed and reset", all.len(), broken.len());
    }
}
