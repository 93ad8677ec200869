//! The parser against an independent reader: generated and mutated frames, read by the program in the kernel and
//! by `etherparse`, have the same classification; where the two disagree by design, the policy has a name.

pub(crate) mod difference;
pub(crate) mod generate;
pub(crate) mod oracle;

use std::{collections::BTreeMap, fmt::Write as _};

use self::{
    difference::{Difference, explain, whole},
    oracle::{Oracle, Reading},
};
use fastrand::Rng;
use xdpkit::{
    Action, Count, Events, Fragment, MonitorConfig, Network, PacketEvent, PacketMonitor, ProtocolCounts, Reason,
    Stage as _, TestRun,
};

/// Frame number n is made of this seed and n, alone.
const SEED: u64 = 0x0c0f_fee0_0000_0000;

/// No more than what test runs let into the first buffer: a page without headroom and the kernel's own data.
const FIRST_BUFFER: usize = 3_000;

/// A linear part from which on `bpf/include/parse.h` reckons with more buffers behind a whole IP packet.
const LINEAR_OF_JUMBO: usize = 1600;

/// Frames to send through the parser; the full number is one of the acceptance criteria.
fn frames() -> u64 {
    crate::common::times(40_000, 1_000_000, 5_000) as u64
}

#[test]
fn frames_are_read_as_by_etherparse() {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    let mut tally = Tally::default();
    let mut differences = BTreeMap::new();
    let frames = frames();
    for number in 0..frames {
        let frame = generate::small(&mut Rng::with_seed(SEED ^ number));
        let oracle = oracle::read(&frame);
        check(&monitor, &mut events, &frame, None, &oracle.reading, number);
        tally.count(&oracle, frame.len());

        let theirs = whole(&frame);
        match explain(&oracle.reading, &oracle.policies, &theirs) {
            Ok(None) => {}
            Ok(Some(difference)) => *differences.entry(difference).or_insert(0_u64) += 1,
            Err(()) => panic!(
                "{}\netherparse says: {theirs:#?}\nno policy of {:?} explains it\nours: {:#?}",
                describe(&frame, number),
                oracle.policies,
                oracle.reading
            ),
        }
    }
    tally.check(&monitor);
    tally.is_varied(frames);
    println!("{frames} frames; differences from etherparse's own verdict:");
    for (difference, count) in &differences {
        println!("{count:>8}  {difference:?}");
    }
    if frames >= 100_000 {
        let unseen: Vec<_> = Difference::ALL.iter().filter(|known| !differences.contains_key(known)).collect();
        assert!(unseen.is_empty(), "no frame shows {unseen:?}");
    }
}

#[test]
fn frames_in_several_buffers_are_read_as_in_one() {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    let mut tally = Tally::default();
    let (mut split, frames) = (0, frames() / 10);
    for number in 0..frames {
        let mut random = Rng::with_seed(SEED ^ number << 32);
        let frame = generate::jumbo(&mut random);
        let oracle = oracle::read(&frame);
        if oracle.headers_end > FIRST_BUFFER {
            continue; // a mutated length leads the walk over extension headers deep into the payload
        }
        // Left alone, a frame is in several buffers if it is longer than the first may be.
        let linear = linear(&mut random, &frame, &oracle);
        split += u64::from(linear.is_some());
        check(&monitor, &mut events, &frame, linear, &oracle.reading, number);
        tally.count(&oracle, frame.len());
    }
    tally.check(&monitor);
    assert!(split > frames / 2, "{split} frames of {frames} were in several buffers");
}

#[test]
fn frames_longer_than_any_wire_carries_are_read_whole() {
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1)).unwrap();
    let mut events = monitor.events().unwrap();
    let mut tally = Tally::default();
    let (mut longer, frames) = (0, frames() / 50);
    for number in 0..frames {
        let mut random = Rng::with_seed(SEED ^ number << 32 ^ 1 << 31);
        let frame = generate::merged(&mut random);
        let oracle = oracle::read(&frame);
        if oracle.headers_end > FIRST_BUFFER {
            continue;
        }
        let whole = oracle.reading.reason == Reason::None && oracle.network_end.is_some_and(|end| end > 65_535 + 54);
        longer += u64::from(whole);
        check(&monitor, &mut events, &frame, None, &oracle.reading, number);
        tally.count(&oracle, frame.len());
    }
    tally.check(&monitor);
    assert!(longer > frames / 5, "{longer} packets of {frames} were longer than any wire carries");
}

/// How much of the frame to put in the first buffer: what the parser needs, or little more.
fn linear(random: &mut Rng, frame: &[u8], oracle: &Oracle<'_>) -> Option<u32> {
    let more = match random.u8(..4) {
        0 => 0,
        1 => 1,
        2 => random.usize(..64),
        _ => random.usize(..2000),
    };
    let linear = oracle.headers_end + more;
    // `frame_bytes` does not look for trailing bytes alone behind a linear part of ordinary size.
    let trailer_only = oracle.network_end.is_some_and(|end| end <= linear) && (60..LINEAR_OF_JUMBO).contains(&linear);
    (linear < frame.len() && !trailer_only).then_some(linear as u32)
}

/// Runs the program and compares what it reports.
fn check(
    monitor: &PacketMonitor,
    events: &mut Events<PacketEvent>,
    frame: &[u8],
    linear: Option<u32>,
    expected: &Reading,
    number: u64,
) {
    let mut run = TestRun::new(frame);
    if let Some(bytes) = linear {
        run = run.linear(bytes);
    }
    let verdict = monitor.run(&run).unwrap_or_else(|error| panic!("{error}\n{}", describe(frame, number)));
    let event = events.try_next().expect("every packet is sampled");
    assert!(
        Reading::from(&event) == *expected,
        "{}\nthe parser says: {:#?}\nthe oracle says: {expected:#?}\nin the first buffer: {linear:?}",
        describe(frame, number),
        Reading::from(&event),
    );
    let bytes = event.bytes as usize;
    assert!(
        bytes == frame.len(),
        "{bytes} bytes were counted of {}\nin the first buffer: {linear:?}",
        describe(frame, number)
    );
    assert_eq!((verdict.action, event.action), (Action::Pass, Action::Pass));
    assert!(verdict.frame == frame, "the monitor changed {}", describe(frame, number));
}

fn describe(frame: &[u8], number: u64) -> String {
    let mut text = format!("frame {number} of seed {SEED:#x}, {} bytes: ", frame.len());
    for byte in frame {
        write!(text, "{byte:02x}").unwrap();
    }
    text
}

/// What the counters must say in the end.
#[derive(Default)]
struct Tally {
    reasons: BTreeMap<Reason, Count>,
    protocols: ProtocolCounts,
    /// Well-formed packets by their place in a datagram: whole ones, first fragments, later ones.
    fragments: [u64; 3],
    /// Well-formed packets by tags.
    vlans: [u64; 3],
}

impl Tally {
    fn count(&mut self, oracle: &Oracle<'_>, bytes: usize) {
        let one = Count { packets: 1, bytes: bytes as u64 };
        let reading = &oracle.reading;
        *self.reasons.entry(reading.reason).or_default() += one;
        if reading.reason != Reason::None {
            return;
        }
        self.vlans[reading.vlans.len()] += 1;
        let counts = &mut self.protocols;
        let (network, transport) = match reading.network {
            Network::Arp => (&mut counts.arp, None),
            Network::Ip { source, protocol, fragment, .. } => {
                let (v4, v6) = (source.is_ipv4(), source.is_ipv6());
                self.fragments[match fragment {
                    Fragment::No => 0,
                    Fragment::First => 1,
                    Fragment::Later => 2,
                }] += 1;
                let transport = match protocol {
                    6 => &mut counts.tcp,
                    17 => &mut counts.udp,
                    1 if v4 => &mut counts.icmp,
                    58 if v6 => &mut counts.icmpv6,
                    _ => &mut counts.other_transport,
                };
                (if v4 { &mut counts.ipv4 } else { &mut counts.ipv6 }, Some(transport))
            }
            _ => (&mut counts.other, None),
        };
        *network += one;
        if let Some(transport) = transport {
            *transport += one;
        }
    }

    fn check(&self, monitor: &PacketMonitor) {
        let stats = monitor.stats().unwrap();
        assert!(stats.reasons.iter().all(|line| line.action == Action::Pass));
        let counted: BTreeMap<_, _> = stats.reasons.iter().map(|line| (line.reason, line.count)).collect();
        assert_eq!(counted, self.reasons);
        assert_eq!(monitor.protocols().unwrap(), self.protocols);
        assert_eq!(monitor.events_lost().unwrap(), 0);
    }

    /// Holds the generator to its task: everything that the parser can say was said often.
    fn is_varied(&self, frames: u64) {
        let often = frames / 1_000;
        let parsers = Reason::ALL.iter().filter(|reason| {
            // A test run takes no shorter frame, and these frames are in one buffer.
            !matches!(reason, Reason::EthernetTruncated | Reason::HeadersSplit)
                && (**reason == Reason::None || reason.is_malformed() || reason.is_unsupported())
        });
        for reason in parsers {
            let packets = self.reasons.get(reason).map_or(0, |count| count.packets);
            println!("{packets:>8}  {reason}");
            assert!(packets >= often, "{packets} of {frames} frames were {reason}");
        }
        let ProtocolCounts { other, arp, ipv4, ipv6, tcp, udp, icmp, icmpv6, other_transport, .. } = self.protocols;
        let protocols = [other, arp, ipv4, ipv6, tcp, udp, icmp, icmpv6, other_transport];
        assert!(protocols.iter().all(|count| count.packets >= often), "{:?}", self.protocols);
        assert!(self.fragments.iter().all(|packets| *packets >= often), "{:?}", self.fragments);
        assert!(self.vlans.iter().all(|packets| *packets >= often), "{:?}", self.vlans);
    }
}
