//! A monitor with random actions, in a chain with a firewall that denies what has to be denied.

use std::path::Path;

use fastrand::Rng;
use xdpkit::{
    Action, AttachOptions, Firewall, FirewallConfig, MonitorConfig, PacketMonitor, Pipeline, Protocol, Result, Stage,
};
use xdpkit_lab::frame::Frame;

use super::{super::rules::packet, Attached, Owned, Place, firewall::fixed_rules};

pub(super) struct Watching {
    monitor: PacketMonitor,
    guard: Firewall,
}

/// Not that of the lockstep stream.
const MOVING: [Protocol; 2] = [Protocol::Tcp, Protocol::Icmp];

impl Watching {
    pub(super) fn start(place: &Place) -> Result<Self> {
        let monitor = PacketMonitor::load_or_adopt(&place.directory, &MonitorConfig::default())?;
        let config = FirewallConfig::default().name("guard").capacity(1000 + place.more.get());
        let guard = Firewall::load_or_adopt(&place.directory, &config)?;
        if guard.is_empty()? {
            guard.insert_many(fixed_rules())?;
        }
        Ok(Self { monitor, guard })
    }
}

impl Owned for Watching {
    fn stage(&self) -> &dyn Stage {
        &self.monitor
    }

    fn attach(&self, place: &Place) -> Result<Vec<Attached>> {
        let mut chain = Pipeline::new(&[&self.monitor, &self.guard])?;
        chain.attach(&AttachOptions::new("eth0").pin(&place.directory))?;
        Ok(vec![Attached::Chain(chain)])
    }

    fn edit(&self, random: &mut Rng) -> Result<()> {
        let protocol = *random.choice(&MOVING).unwrap();
        let action = *random.choice(&[None, Some(Action::Drop), Some(Action::Pass), Some(Action::Tx)]).unwrap();
        match random.u8(..4) {
            0 => self.monitor.set_sample(random.u32(..3)),
            _ => self.monitor.set_action(protocol, action),
        }
    }

    fn list(&self) {
        self.monitor.protocols().unwrap();
    }

    fn agrees(&self, random: &mut Rng, probes: usize) {
        // It has no list but what it has said itself.
        let frames = [
            packet("192.0.2.7", "192.0.2.1", "tcp/80"),
            Frame::echo([192, 0, 2, 7].into(), [192, 0, 2, 1].into(), 1, 1).build(),
        ];
        let mut said = [None; 2];
        for (protocol, action) in MOVING.into_iter().zip(said) {
            self.monitor.set_action(protocol, action).unwrap();
        }
        for _ in 0..probes {
            let at = random.usize(..2);
            if random.bool() {
                said[at] = *random.choice(&[None, Some(Action::Drop), Some(Action::Pass)]).unwrap();
                self.monitor.set_action(MOVING[at], said[at]).unwrap();
            }
            for (at, frame) in frames.iter().enumerate() {
                let action = self.monitor.test_run(frame).unwrap().action;
                assert_eq!(action, said[at].unwrap_or(Action::Pass), "{:?}", MOVING[at]);
            }
        }
    }
}
