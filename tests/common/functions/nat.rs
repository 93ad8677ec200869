//! A NAT balancer, one of whose services has backends that come and go.

use std::net::SocketAddr;

use fastrand::Rng;
use xdpkit::{
    AttachOptions, BackendState, Interface, NatBalancer, NatConfig, NatService, NatTimeouts, Result, ServiceAddr,
    Stage, TestRun,
};
use xdpkit_lab::frame::{Frame, tcp};

use super::{Attached, MADE_UP, Owned, Place, made_up, possible};

pub(super) struct Translating {
    balancer: NatBalancer,
    mac: [u8; 6],
}

/// Behind which the made-up hosts are, and real ones.
const NAT_MOVING: &str = "tcp/198.51.100.10:81";
const NAT_REAL: &str = "tcp/198.51.100.10:80";

impl Translating {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let more = place.more.get();
        let config = NatConfig::default().services(64 + more).backends(1024 + more);
        let balancer = NatBalancer::load_or_adopt(&place.directory, &config)?;
        if balancer.services().is_empty() {
            let real = [11, 12].map(|last| SocketAddr::from(([192, 168, 178, last], 8080)));
            balancer.insert(NAT_REAL.parse()?, &NatService::new(real))?;
        }
        if balancer.get(&NAT_MOVING.parse()?).is_err() {
            balancer.insert(NAT_MOVING.parse()?, &NatService::new([(made_up(0), 8080).into()]))?;
        }
        Ok(Self { balancer, mac: place.mac })
    }
}

impl Owned for Translating {
    fn stage(&self) -> &dyn Stage {
        &self.balancer
    }

    fn attach(&self, place: &Place) -> Result<Vec<Attached>> {
        let attach = |name| self.balancer.attach(&AttachOptions::new(name).pin(&place.directory));
        Ok(vec![Attached::Alone(attach("eth0")?), Attached::Alone(attach("eth1")?)])
    }

    fn edit(&self, random: &mut Rng) -> Result<()> {
        let balancer = &self.balancer;
        let service: ServiceAddr = NAT_MOVING.parse()?;
        let backend = SocketAddr::new(made_up(random.u8(..MADE_UP)), 8080);
        possible(match random.u8(..10) {
            0..3 => balancer.set_backend(&service, backend, 1).map(drop),
            3 => balancer.drain(&service, backend),
            4 => balancer.remove_backend(&service, backend),
            5 => balancer.kill(&service, backend),
            6 => {
                let list: Vec<_> = (0..MADE_UP)
                    .filter(|_| random.bool())
                    .map(|number| (SocketAddr::new(made_up(number), 8080), 1))
                    .collect();
                balancer.set_backends(&service, &list)
            }
            7 => balancer.set_timeouts(&NatTimeouts::default()),
            8 => balancer.set_sample(random.u32(..1000)),
            _ => {
                let other = ServiceAddr::tcp([198, 51, 100, 10], random.u16(82..86));
                match random.bool() {
                    true => balancer.insert(other, &NatService::new([backend])),
                    false => balancer.remove(&other).map(drop),
                }
            }
        })
    }

    fn list(&self) {
        for service in self.balancer.services() {
            self.balancer.backends(&service).unwrap();
        }
    }

    fn agrees(&self, random: &mut Rng, probes: usize) {
        let service: ServiceAddr = NAT_MOVING.parse().unwrap();
        let eth0 = Interface::by_name("eth0").unwrap();
        let list = self.balancer.backends(&service).unwrap();
        let active: Vec<SocketAddr> = list
            .iter()
            .filter(|backend| backend.state == BackendState::Active && backend.weight > 0)
            .map(|backend| backend.address)
            .collect();
        let mut hit = vec![0; active.len()];
        for _ in 0..probes.max(100 * active.len()) {
            let client = SocketAddr::from(([10, 0, 0, random.u8(100..200)], random.u16(1024..)));
            if self.balancer.find(client, &service).unwrap().is_some() {
                continue;
            }
            let frame = Frame::tcp(client, "198.51.100.10:81".parse().unwrap()).flags(tcp::SYN);
            let frame = frame.macs([2, 0, 0, 0, 1, 1], self.mac).build();
            self.balancer.run(&TestRun::new(&frame).ingress(&eth0, 0)).unwrap();
            let found = self.balancer.find(client, &service).unwrap().map(|connection| connection.backend);
            match found {
                None => assert!(active.is_empty(), "{client} finds none of {active:?}"),
                Some(backend) => {
                    let at = active.iter().position(|other| *other == backend);
                    hit[at.unwrap_or_else(|| panic!("{client} goes to {backend}, which is none of {list:?}"))] += 1;
                }
            }
        }
        assert!(hit.iter().all(|hits| *hits > 0), "{active:?} got {hit:?} connections");
    }
}
