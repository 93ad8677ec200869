//! The balancer and its model side by side: both get the same changes and the same frames.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use fastrand::Rng;
use xdpkit::{Action, DsrConfig, DsrService, Reason, ServiceAddr, Stage as _};

use super::{
    bytes::expected,
    frames::Generated,
    model::{Backend, Model},
};
use crate::common::dsr::{Balancer, Host, neighbour4, neighbour6};

const SIZE: u32 = 1021;
const SEED: u64 = 0x1234_5678_9abc_def0;
const BACKENDS: [Backend; 5] = [11, 12, 13, 14, 15];

fn config() -> DsrConfig {
    let day = Duration::from_secs(60 * 60 * 24);
    DsrConfig::default()
        .services(16)
        .table_size(SIZE)
        .backends(60_000)
        .seed(SEED)
        .flows(1 << 20)
        .idle(day)
        .longest_transition(2 * day)
        .udp_grace(day)
        .answers_per_second(u32::MAX)
        .outer_v4("10.200.0.0/16".parse().unwrap())
        .outer_v6("2001:db8:200::/64".parse().unwrap())
}

/// Text, through a tunnel, to backends of the other family, by source only.
pub(crate) const SERVICES: [(&str, bool, bool, bool); 10] = [
    ("tcp/192.168.178.100:80", false, false, false),
    ("tcp/192.168.178.100:*", true, false, false),
    ("udp/192.168.178.100:53", true, true, false),
    ("tcp/192.168.178.101:443", true, true, true),
    ("udp/192.168.178.101:*", false, false, true),
    ("tcp/[2001:db8:b::100]:80", true, false, false),
    ("udp/[2001:db8:b::100]:*", false, false, false),
    ("tcp/[2001:db8:b::101]:*", true, true, false),
    ("udp/[2001:db8:b::101]:53", true, false, true),
    ("udp/203.0.113.9:53", false, false, false),
];

pub(crate) struct World<'h> {
    pub(crate) b: Balancer<'h>,
    pub(crate) model: Model,
    reasons: BTreeMap<(Reason, Action), u64>,
}

impl<'h> World<'h> {
    pub(crate) fn new(host: &'h Host) -> Self {
        let b = host.balancer(&config());
        let mut model = Model::new(SIZE, SEED);
        for (text, ipip, crossed, by_source) in SERVICES {
            let kind = if ipip { DsrService::ipip() } else { DsrService::l2() };
            b.service(text, kind.by_source(by_source), &[]);
            model.add(text.parse().unwrap(), ipip, crossed, by_source);
        }
        Self { b, model, reasons: BTreeMap::new() }
    }

    /// Changes one service's list in the balancer and in the model.
    pub(crate) fn change(&mut self, random: &mut Rng) {
        let (b, model) = (&self.b, &mut self.model);
        let at = random.usize(..model.services.len());
        let (service, crossed): (ServiceAddr, _) = (model.services[at].address, model.services[at].crossed);
        let family6 = service.address.is_ipv6();
        if random.u8(..5) == 0 {
            let number = *random.choice(&BACKENDS[..]).unwrap();
            let listed = b.balancer.backends(service).unwrap();
            let is_there = listed.iter().any(|entry| {
                entry.address == address(crossed, family6, number) && entry.state != xdpkit::BackendState::Killed
            });
            if is_there {
                while b.balancer.kill(service, address(crossed, family6, number)).is_ok() {}
                model.kill(at, number, name(crossed, family6));
            }
            return;
        }
        let mut list: Vec<(Backend, u32)> = Vec::new();
        for number in BACKENDS {
            if random.u8(..3) > 0 {
                list.push((number, random.u32(1..4)));
            }
        }
        let addresses: Vec<_> =
            list.iter().map(|(number, weight)| (address(crossed, family6, *number), *weight)).collect();
        b.host.ns.run(|| b.balancer.set_backends(service, addresses)).unwrap();
        model.set(at, &list, name(crossed, family6));
    }

    /// Runs frames through both, and compares actions and bytes. `seed` tells how to do it again.
    pub(crate) fn compare(&mut self, generated: &[Generated], seed: &str) {
        let frames: Vec<_> = generated.iter().map(|g| g.frame.clone()).collect();
        for (number, (g, (action, out))) in generated.iter().zip(self.b.run_all(&frames)).enumerate() {
            let mut verdict = match g.frame[..6] == self.b.host.mac {
                true => self.model.judge(g.source, g.destination, g.identification, g.what),
                false => self.model.judge_of_others(g.destination, g.what),
            };
            let wanted = expected(self.b.host, &self.model, g, &mut verdict);
            *self.reasons.entry((verdict.reason, verdict.action)).or_default() += 1;
            let about = || format!("{seed}, frame {number}: {:?}\n{verdict:?}\n{:02x?}", g.what, g.frame);
            assert_eq!(action, verdict.action, "{}", about());
            if action == Action::Drop {
                continue;
            }
            assert_eq!(out, wanted, "{}", about());
        }
    }

    /// Compares the counters with what the model has said so far, and answers that.
    pub(crate) fn compare_counters(&self, seed: &str) -> &BTreeMap<(Reason, Action), u64> {
        let stats = self.b.balancer.stats().unwrap();
        let counted: BTreeMap<_, _> =
            stats.reasons.iter().map(|line| ((line.reason, line.action), line.count.packets)).collect();
        assert_eq!(counted, self.reasons, "{seed}: every packet under the reason that the model gives");
        &self.reasons
    }
}

fn name(crossed: bool, family6: bool) -> impl Fn(Backend) -> Vec<u8> {
    move |number| match address(crossed, family6, number) {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn address(crossed: bool, family6: bool, number: Backend) -> IpAddr {
    if family6 != crossed { neighbour6(number) } else { neighbour4(number) }
}
