//! Dropped packets as a capture (pcapng), for Wireshark: those that became events, each with its reason, and the rule or
//! limit, as its comment.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    path::Path,
};

use xdpkit::{Action, Events, FirewallEvent, PacketEvent, PcapngWriter, RateEvent};

use crate::state::{Appliance, Function};

/// The events of a function.
enum Reader {
    Monitor(Events<PacketEvent>),
    Firewall(Events<FirewallEvent>),
    RateLimiter(Events<RateEvent>),
}

impl Reader {
    /// `None` for functions that report no packets.
    fn of(function: &Function) -> xdpkit::Result<Option<Self>> {
        Ok(match function {
            Function::Monitor(monitor) => Some(Self::Monitor(monitor.events()?)),
            Function::Firewall(firewall) => Some(Self::Firewall(firewall.events()?)),
            Function::RateLimiter(limiter) => Some(Self::RateLimiter(limiter.events()?)),
            Function::DsrBalancer(_) | Function::NatBalancer(_) => None,
        })
    }

    /// The next packet, and what there is to say of it.
    fn next(&mut self, name: &str) -> Option<(PacketEvent, String)> {
        match self {
            Self::Monitor(events) => events.try_next().map(|packet| (packet, name.to_owned())),
            Self::Firewall(events) => events.try_next().map(|event| {
                let rule = event.rule.map_or_else(|| "by no rule".into(), |rule| format!("by rule {rule}"));
                (event.packet, format!("{name} {rule}"))
            }),
            Self::RateLimiter(events) => events.try_next().map(|event| {
                let mut comment = name.to_owned();
                if let (Some(scope), Some(limit)) = (event.scope, event.limit) {
                    comment += &format!(", more than {limit} of {scope}");
                }
                if event.banned {
                    comment += ", source banned";
                }
                (event.packet, comment)
            }),
        }
    }
}

/// Events of one function that are written at a time: more of them than can be written must not keep us from all else.
const BATCH: usize = 4096;

/// A capture that is written.
pub(crate) struct Capture {
    writer: PcapngWriter<File>,
    readers: BTreeMap<String, Reader>,
}

impl Capture {
    /// Reads the events of the functions that there are now. Goes on behind what is in the file: a capture may have
    /// several sections.
    pub(crate) fn open(path: &Path, appliance: &Appliance) -> Result<Self, Box<dyn std::error::Error>> {
        let writer = PcapngWriter::new(OpenOptions::new().create(true).append(true).open(path)?)?;
        let mut readers = BTreeMap::new();
        for (name, function) in &appliance.functions {
            if let Some(reader) = Reader::of(function)? {
                readers.insert(name.clone(), reader);
            }
        }
        Ok(Self { writer, readers })
    }

    /// Writes what was dropped since the last time.
    pub(crate) fn write(&mut self) -> io::Result<()> {
        for (name, reader) in &mut self.readers {
            for (packet, comment) in std::iter::from_fn(|| reader.next(name)).take(BATCH) {
                if matches!(packet.action, Action::Drop | Action::Aborted) {
                    self.writer.write(&packet, comment)?;
                }
            }
        }
        Ok(())
    }
}
