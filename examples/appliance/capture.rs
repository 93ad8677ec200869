//! Dropped packets as a capture (pcapng), for Wireshark: those that became events, each with its reason, and the rule or
//! limit, as its comment.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
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

/// A capture that is written.
pub(crate) struct Capture {
    path: PathBuf,
    writer: PcapngWriter<File>,
    readers: BTreeMap<String, Reader>,
}

/// Goes on behind what is there: a capture may have several sections.
fn open(path: &Path) -> io::Result<PcapngWriter<File>> {
    PcapngWriter::new(OpenOptions::new().create(true).append(true).open(path)?)
}

impl Capture {
    pub(crate) fn new(path: PathBuf) -> io::Result<Self> {
        Ok(Self { writer: open(&path)?, path, readers: BTreeMap::new() })
    }

    /// Opens the file anew, which may have been moved away, and reads the events of the functions that there are now.
    pub(crate) fn follow(&mut self, appliance: &Appliance) -> Result<(), Box<dyn std::error::Error>> {
        self.writer = open(&self.path)?;
        self.readers.retain(|name, _| appliance.functions.contains_key(name));
        for (name, function) in &appliance.functions {
            if !self.readers.contains_key(name)
                && let Some(reader) = Reader::of(function)?
            {
                self.readers.insert(name.clone(), reader);
            }
        }
        Ok(())
    }

    /// Writes what was dropped since the last time.
    pub(crate) fn write(&mut self) -> io::Result<()> {
        for (name, reader) in &mut self.readers {
            while let Some((packet, comment)) = reader.next(name) {
                if matches!(packet.action, Action::Drop | Action::Aborted) {
                    self.writer.write(&packet, comment)?;
                }
            }
        }
        Ok(())
    }
}
