//! Events as a pcapng capture, which Wireshark and tshark open: feature `pcapng`.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt, io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pcap_file::{
    DataLink, PcapError,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};

use crate::{Interface, PacketEvent, sys};

/// Timestamps in units of 10^-9 s (`if_tsresol`).
const NANOSECONDS: u8 = 9;

/// Writes packets of events into a capture (IETF draft-ietf-opsawg-pcapng): each with the beginning of its frame,
/// its time, its interface, and a comment with the action, the reason and what the caller adds.
///
/// ```no_run
/// use xdpkit::{Firewall, FirewallConfig, PcapngWriter};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let firewall = Firewall::load(&FirewallConfig::default().sample(100))?;
/// let mut events = firewall.events()?;
/// let mut capture = PcapngWriter::new(std::fs::File::create("drops.pcapng")?)?;
/// while let Some(event) = events.next_within(std::time::Duration::from_secs(1))? {
///     // Comment: `drop: denied, by rule 203.0.113.0/24`
///     match event.rule {
///         Some(rule) => capture.write(&event.packet, format_args!("by rule {rule}"))?,
///         None => capture.write(&event.packet, "by no rule")?,
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct PcapngWriter<W: io::Write> {
    writer: PcapNgWriter<W>,
    /// The number in the capture of each interface, by index.
    interfaces: HashMap<u32, u32>,
    /// From `CLOCK_MONOTONIC` to the time of day.
    boot: Duration,
}

impl<W: io::Write> PcapngWriter<W> {
    /// Begins a capture. Writes go to `out` one by one: give it a buffered writer where there are many.
    ///
    /// # Errors
    /// What writing to `out` answers.
    pub fn new(out: W) -> io::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let boot = now.saturating_sub(sys::monotonic());
        Ok(Self { writer: PcapNgWriter::new(out).map_err(error)?, interfaces: HashMap::new(), boot })
    }

    /// Adds a packet.
    ///
    /// # Errors
    /// What writing answers.
    pub fn write(&mut self, packet: &PacketEvent, comment: impl fmt::Display) -> io::Result<()> {
        let interface_id = self.interface(packet.interface)?;
        let mut text = format!("{}: {}", packet.action, packet.reason);
        let comment = comment.to_string();
        if !comment.is_empty() {
            text = format!("{text}, {comment}");
        }
        let block = EnhancedPacketBlock {
            interface_id,
            timestamp: self.boot + packet.timestamp,
            original_len: packet.bytes,
            data: Cow::Borrowed(&packet.frame),
            options: vec![EnhancedPacketOption::Comment(text.into())],
        };
        self.writer.write_pcapng_block(block).map_err(error)?;
        Ok(())
    }

    /// Ends the capture, and gives the writer back.
    pub fn into_inner(self) -> W {
        self.writer.into_inner()
    }

    /// The number of an interface in the capture, which describes it when it is new.
    fn interface(&mut self, index: u32) -> io::Result<u32> {
        if let Some(number) = self.interfaces.get(&index) {
            return Ok(*number);
        }
        // It may be gone by now, or in another network namespace.
        let name = Interface::by_index(index).map_or_else(|_| format!("interface {index}"), |i| i.name().to_owned());
        let block = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(name.into()),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        };
        self.writer.write_pcapng_block(block).map_err(error)?;
        let number = self.interfaces.len() as u32;
        self.interfaces.insert(index, number);
        Ok(number)
    }
}

impl<W: io::Write> fmt::Debug for PcapngWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PcapngWriter").field("interfaces", &self.interfaces).finish_non_exhaustive()
    }
}

fn error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
