//! Counters as the user sees them: totals by action, and every reason.

use std::ops::{Add, AddAssign};

use crate::{Action, Reason, abi::reason::Counters};

/// Packets and bytes. Bytes are those of whole frames: Ethernet header and padding included, FCS not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Count {
    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self { packets: self.packets.saturating_sub(earlier.packets), bytes: self.bytes.saturating_sub(earlier.bytes) }
    }
}

impl Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { packets: self.packets + other.packets, bytes: self.bytes + other.bytes }
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// One line of [`Stats::reasons`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReasonCount {
    /// Why.
    pub reason: Reason,
    /// What became of the packets.
    pub action: Action,
    /// How many.
    pub count: Count,
}

/// What a stage did with its packets since its maps were created: the sum over CPUs, and over all
/// interfaces and chains that the value guards. Every packet stands in exactly one line of `reasons`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Each reason and action that was counted at least once, by rising code.
    pub reasons: Vec<ReasonCount>,
}

impl Stats {
    pub(crate) fn from_counters(per_cpu: &[Counters]) -> Self {
        let mut reasons = Vec::new();
        for &reason in Reason::ALL {
            for action in Action::ALL {
                let count = per_cpu.iter().map(|cpu| cpu.count[reason as usize][action as usize]);
                let count = count.fold(Count::default(), |sum, c| sum + c.into());
                if count.packets > 0 {
                    reasons.push(ReasonCount { reason, action, count });
                }
            }
        }
        Self { reasons }
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |line: &ReasonCount| {
            earlier.reasons.iter().find(|old| (old.reason, old.action) == (line.reason, line.action))
        };
        let reasons = self.reasons.iter().map(|line| match before(line) {
            Some(old) => ReasonCount { count: line.count.since(&old.count), ..*line },
            None => *line,
        });
        Self { reasons: reasons.filter(|line| line.count.packets > 0).collect() }
    }

    /// All packets.
    #[must_use]
    pub fn total(&self) -> Count {
        self.sum(|_| true)
    }

    /// Packets that went on: to the next stage or the host's stack.
    #[must_use]
    pub fn passed(&self) -> Count {
        self.action(Action::Pass)
    }

    /// Packets that ended here: `Drop` and `Aborted`.
    #[must_use]
    pub fn dropped(&self) -> Count {
        self.sum(|line| matches!(line.action, Action::Drop | Action::Aborted))
    }

    /// Packets with this action.
    #[must_use]
    pub fn action(&self, action: Action) -> Count {
        self.sum(|line| line.action == action)
    }

    /// Packets with this reason, whatever the action.
    #[must_use]
    pub fn reason(&self, reason: Reason) -> Count {
        self.sum(|line| line.reason == reason)
    }

    fn sum(&self, wanted: impl Fn(&ReasonCount) -> bool) -> Count {
        self.reasons.iter().filter(|line| wanted(line)).fold(Count::default(), |sum, line| sum + line.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(reason: Reason, action: Action, packets: u64) -> ReasonCount {
        ReasonCount { reason, action, count: Count { packets, bytes: packets * 60 } }
    }

    #[test]
    fn since_subtracts_line_by_line_and_leaves_out_what_stood_still() {
        let earlier =
            Stats { reasons: vec![line(Reason::Denied, Action::Drop, 5), line(Reason::Arp, Action::Pass, 2)] };
        let later = Stats {
            reasons: vec![
                line(Reason::Allowed, Action::Pass, 1),
                line(Reason::Denied, Action::Drop, 9),
                line(Reason::Arp, Action::Pass, 2),
            ],
        };
        let between = later.since(&earlier);
        assert_eq!(between.reasons, [line(Reason::Allowed, Action::Pass, 1), line(Reason::Denied, Action::Drop, 4)]);
        assert_eq!(between.total(), Count { packets: 5, bytes: 300 });
        assert_eq!(between.dropped().packets, 4);
        assert_eq!(between.passed().packets, 1);
        assert_eq!(between.reason(Reason::Denied).packets, 4);
    }
}
