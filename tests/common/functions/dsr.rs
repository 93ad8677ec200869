//! A DSR balancer, one of whose services has backends that come and go.

use std::net::{IpAddr, SocketAddr};

use fastrand::Rng;
use xdpkit::{
    Action, BackendState, DsrBalancer, DsrConfig, DsrService, Interface, Result, ServiceAddr, Stage, TestRun,
};
use xdpkit_lab::frame::{Frame, tcp};

use super::{MADE_UP, Owned, Place, made_up, made_up_mac, possible};

pub(super) struct Spreading {
    balancer: DsrBalancer,
    mac: [u8; 6],
}

pub(super) const DSR_VIP: [u8; 4] = [192, 168, 178, 100];

impl Spreading {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let more = place.more.get();
        let config = DsrConfig::default().services(16 + more).table_size(1021).flows(4096).backends(2000 + more);
        let balancer = DsrBalancer::load_or_adopt(&place.directory, &config)?;
        let (real, moving) = (ServiceAddr::tcp(DSR_VIP, 80), ServiceAddr::tcp(DSR_VIP, 81));
        if balancer.service(real).is_err() {
            let hosts = [11, 12].map(|last| (IpAddr::from([192, 168, 178, last]), 1));
            balancer.insert_service(real, DsrService::l2(), hosts)?;
        }
        if balancer.service(moving).is_err() {
            balancer.insert_service(moving, DsrService::l2(), [(made_up(0), 1)])?;
        }
        Ok(Self { balancer, mac: place.mac })
    }
}

impl Owned for Spreading {
    fn stage(&self) -> &dyn Stage {
        &self.balancer
    }

    fn edit(&self, random: &mut Rng) -> Result<()> {
        let balancer = &self.balancer;
        let service = ServiceAddr::tcp(DSR_VIP, 81);
        let backend = made_up(random.u8(..MADE_UP));
        possible(match random.u8(..8) {
            0..3 => balancer.set_backend(service, backend, 1).map(drop),
            3 => balancer.drain(service, backend),
            4 => balancer.remove_backend(service, backend),
            5 => balancer.kill(service, backend),
            6 => {
                let list: Vec<_> = (0..MADE_UP).filter(|_| random.bool()).map(|number| (made_up(number), 1)).collect();
                balancer.set_backends(service, list)
            }
            _ => {
                let other = ServiceAddr::tcp(DSR_VIP, random.u16(82..86));
                match random.bool() {
                    true => balancer.insert_service(other, DsrService::l2(), [(backend, 1)]),
                    false => balancer.remove_service(other),
                }
            }
        })
    }

    fn list(&self) {
        for entry in self.balancer.services().unwrap() {
            self.balancer.backends(entry.address).unwrap();
        }
    }

    fn agrees(&self, random: &mut Rng, probes: usize) {
        let service = ServiceAddr::tcp(DSR_VIP, 81);
        let eth0 = Interface::by_name("eth0").unwrap();
        let list = self.balancer.backends(service).unwrap();
        let active: Vec<[u8; 6]> = (0..MADE_UP)
            .filter(|number| {
                list.iter().any(|backend| {
                    backend.address == made_up(*number)
                        && backend.state == BackendState::Active
                        && backend.weight > 0
                        && backend.slots > 0
                })
            })
            .map(made_up_mac)
            .collect();
        let mut hit = vec![0; active.len()];
        for _ in 0..probes.max(100 * active.len()) {
            let client = SocketAddr::from((random.u32(0x0a00_1000..0x0a00_ffff).to_be_bytes(), random.u16(1024..)));
            let frame = Frame::tcp(client, SocketAddr::from((DSR_VIP, 81))).flags(tcp::SYN);
            let frame = frame.macs([2, 0, 0, 0, 1, 1], self.mac).build();
            let verdict = self.balancer.run(&TestRun::new(&frame).ingress(&eth0, 0)).unwrap();
            if active.is_empty() {
                assert_eq!(verdict.action, Action::Drop, "{client}: {list:?}");
                continue;
            }
            let to: [u8; 6] = verdict.frame[..6].try_into().unwrap();
            assert_eq!(verdict.action, Action::Tx, "{client} to {to:x?}: {list:?}");
            let at = active.iter().position(|mac| *mac == to);
            hit[at.unwrap_or_else(|| panic!("{client} goes to {to:x?}, which is none of {list:?}"))] += 1;
        }
        assert!(hit.iter().all(|hits| *hits > 0), "{active:x?} got {hit:?} connections: {list:?}");
    }
}
