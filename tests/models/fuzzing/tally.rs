//! What the counters must say of some frames, and whether they do.

use std::collections::BTreeMap;

use xdpkit::{Action, Reason, Stage, Stats};

/// What one frame should become, and why.
pub(crate) type Verdict = (Action, Reason);

/// Packets and bytes by reason and action.
#[derive(Debug, Default)]
pub(crate) struct Tally(BTreeMap<(Reason, Action), (u64, u64)>);

impl Tally {
    pub(crate) fn add(&mut self, (action, reason): Verdict, frame: &[u8]) {
        let count = self.0.entry((reason, action)).or_default();
        *count = (count.0 + 1, count.1 + frame.len() as u64);
    }

    /// Each frame was counted once, under the reason that the model gives. Goes on from nothing, with the sum in `all`.
    pub(crate) fn compare(&mut self, stage: &dyn Stage, before: &Stats, all: &mut Tally, about: &str) {
        let counted = stage.stats().unwrap().since(before);
        let counted: BTreeMap<_, _> =
            counted.reasons.iter().map(|l| ((l.reason, l.action), (l.count.packets, l.count.bytes))).collect();
        assert_eq!(counted, self.0, "{about}");
        for (line, (packets, bytes)) in std::mem::take(&mut self.0) {
            let sum = all.0.entry(line).or_default();
            *sum = (sum.0 + packets, sum.1 + bytes);
        }
    }

    /// Frames that were compared elsewhere.
    pub(crate) fn add_sum(&mut self, (action, reason): Verdict, packets: u64) {
        self.0.entry((reason, action)).or_default().0 += packets;
    }

    /// Frames that became this, for this reason.
    pub(crate) fn packets(&self, (action, reason): Verdict) -> u64 {
        self.0.get(&(reason, action)).map_or(0, |(packets, _)| *packets)
    }

    /// Says how many frames were compared, and what they became.
    pub(crate) fn print(&self, stage: &str) {
        let lines: Vec<_> =
            self.0.iter().map(|((reason, action), (packets, _))| format!("{reason} {action} {packets}")).collect();
        let sum: u64 = self.0.values().map(|(packets, _)| packets).sum();
        println!("{stage}: {sum} frames as the model says: {}", lines.join(", "));
    }
}
