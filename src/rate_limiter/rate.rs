//! Rates and limits in the user's terms, and what the program makes of them.

use std::{fmt, str::FromStr, time::Duration};

use crate::{
    Error, Result,
    abi::rate_limiter::{COST_SHIFT, JIFFIES, Limit as Encoded, NANOSECONDS, Record},
};

/// Leads and bursts stay below a quarter of what a bucket's time can count.
const DEPTH_END: u128 = 1 << 48;
/// The most that clocks of two CPUs may disagree by, ns.
const SKEW: u64 = 1 << 30;
/// Bytes of the smallest packet that precision is for.
const SMALL_PACKET: u128 = 64;
/// The smallest burst in bytes: an Ethernet frame of the usual MTU has to fit in.
const BURST_BYTES_MIN: u64 = 1514;

/// So many in so much time, and so many at once: a token bucket (GCRA, ITU-T I.371). Over any time, at most
/// `amount / per` of it and one burst are admitted.
///
/// As text: `N/UNIT[:BURST]` with the units `s`, `m` and `h`, such as `100/s`, `10/m:3`. Without a burst, it is one second's
/// worth, at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    amount: u64,
    per: Duration,
    burst: Option<u64>,
}

impl Rate {
    /// So many a second.
    #[must_use]
    pub const fn per_second(amount: u64) -> Self {
        Self::new(amount, Duration::from_secs(1))
    }

    /// So many a minute.
    #[must_use]
    pub const fn per_minute(amount: u64) -> Self {
        Self::new(amount, Duration::from_secs(60))
    }

    /// So many an hour.
    #[must_use]
    pub const fn per_hour(amount: u64) -> Self {
        Self::new(amount, Duration::from_secs(3600))
    }

    /// So many in this time. What is possible is checked where a limit is set: from 1 packet in 24 hours or 1 byte in an
    /// hour to 10^9 packets or 10^12 bytes a second.
    #[must_use]
    pub const fn new(amount: u64, per: Duration) -> Self {
        Self { amount, per, burst: None }
    }

    /// With this burst: what a source may send at once after it was idle.
    #[must_use]
    pub const fn burst(mut self, burst: u64) -> Self {
        self.burst = Some(burst);
        self
    }

    /// How many, in [`Rate::period`].
    #[must_use]
    pub fn amount(&self) -> u64 {
        self.amount
    }

    /// The time that [`Rate::amount`] is for.
    #[must_use]
    pub fn period(&self) -> Duration {
        self.per
    }

    /// The burst as it was given, else one second's worth, at least 1.
    #[must_use]
    pub fn burst_size(&self) -> u64 {
        self.burst.unwrap_or_else(|| {
            let nanoseconds = self.per.as_nanos().max(1);
            u64::try_from(u128::from(self.amount) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX).max(1)
        })
    }

    /// This rate times a number, with the burst of one second's worth.
    pub(super) fn times(self, factor: u64) -> Self {
        Self { amount: self.amount.saturating_mul(factor), per: self.per, burst: None }
    }

    pub(super) fn encode(&self, meter: Meter, tick: u64) -> Result<Encoded> {
        let wrong = |what, expected| Error::Invalid { what, value: self.to_string(), expected };
        let per = self.per.as_nanos();
        let hour = Duration::from_secs(3600).as_nanos();
        // What the largest frame costs (by generic XDP, half a megabyte and up to 32,767 packets) has to fit into 64 bits.
        let (longest, most, expected) = match meter {
            Meter::Packets => (24 * hour, 1, "at least 1 packet in 24 hours"),
            Meter::Bytes => (hour, 1000, "at least 1 byte in an hour"),
        };
        if self.amount == 0 || per == 0 || per / u128::from(self.amount) > longest {
            return Err(wrong("rate", expected));
        }
        if u128::from(self.amount) > per * most {
            return Err(wrong("rate", "at most 10^9 packets or 10^12 bytes a second"));
        }
        let burst = self.burst_size();
        if burst == 0 {
            return Err(wrong("burst", "at least 1"));
        }
        // For small packets a cost has some 2^10 units or more, so that rounding it up is a thousandth at most.
        let each = per / u128::from(self.amount) * if meter == Meter::Packets { 1 } else { SMALL_PACKET };
        let unit = [1_u128 << 20, 1 << 14, 1 << 8].iter().filter(|least| each < **least).count() as u32;
        let (left, right) = shifts(unit);
        let scaled = per << (left + COST_SHIFT);
        let mut cost = scaled.div_ceil(u128::from(self.amount) << right);
        if meter == Meter::Packets {
            cost = cost.next_multiple_of(1 << COST_SHIFT);
        }
        let depth = (u128::from(burst) * cost).div_ceil(1 << COST_SHIFT);
        if depth >= DEPTH_END {
            return Err(wrong("burst", "less: it would take too long to be used up"));
        }
        let depth = depth as u64;
        // The coarse clock is one tick late at most: that may not be half of what a burst lasts.
        let lasts = (u128::from(depth) << right) >> left;
        let clock = if lasts >= 2 * u128::from(tick) { JIFFIES } else { NANOSECONDS };
        let most = depth + ((SKEW << left) >> right);
        Ok(Encoded { cost: cost as u64, depth, most, clock, unit, left, right, reserved: [0; 3] })
    }
}

/// By what nanoseconds are shifted to units: first to the left, then to the right.
pub(super) fn shifts(unit: u32) -> (u32, u32) {
    [(0, 10), (0, 4), (2, 0), (8, 0)][unit as usize & 3]
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::Invalid {
            what: "rate",
            value: text.to_owned(),
            expected: "N/UNIT[:BURST] with the units s, m and h, such as 100/s or 10/m:3",
        };
        let (rate, burst) = match text.split_once(':') {
            Some((rate, burst)) => (rate, Some(burst)),
            None => (text, None),
        };
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| digits.parse::<u64>().ok()).flatten().filter(|number| *number > 0).ok_or_else(wrong)
        };
        let (amount, unit) = rate.split_once('/').ok_or_else(wrong)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(wrong()),
        };
        let rate = Self::new(number(amount)?, Duration::from_secs(seconds));
        Ok(match burst {
            Some(burst) => rate.burst(number(burst)?),
            None => rate,
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.per.as_secs(), self.per.subsec_nanos()) {
            (1, 0) => write!(f, "{}/s", self.amount)?,
            (60, 0) => write!(f, "{}/m", self.amount)?,
            (3600, 0) => write!(f, "{}/h", self.amount)?,
            _ => write!(f, "{}/{:?}", self.amount, self.per)?,
        }
        self.burst.map_or(Ok(()), |burst| write!(f, ":{burst}"))
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Meter {
    /// Packets.
    Packets = 0,
    /// Bytes of whole frames.
    Bytes = 1,
}

impl Meter {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Packets, Self::Bytes];
}

/// What a source may send: packets, bytes, or both. A packet has to be within both; one that is not is charged to neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limit {
    rates: [Option<Rate>; 2],
}

impl Limit {
    /// So many packets.
    ///
    /// In generic mode, the stack merges TCP segments (and UDP datagrams, where GRO for them is on) before the program
    /// sees them. An IP packet longer than the interface's MTU, and than 1,500 bytes, is charged as the number of
    /// full packets of that MTU that carry the same: the least that came over the wire. One of more segments than the burst
    /// never passes: in generic mode, with GRO on, bursts of less than 45 packets (64 kB by an MTU of 1,500; BIG TCP: more)
    /// slow TCP down.
    #[must_use]
    pub const fn packets(rate: Rate) -> Self {
        Self { rates: [Some(rate), None] }
    }

    /// So many bytes of whole frames (Ethernet header included, FCS not). The burst has to be at least 1,514; a
    /// frame that is longer than the burst never passes.
    #[must_use]
    pub const fn bytes(rate: Rate) -> Self {
        Self { rates: [None, Some(rate)] }
    }

    /// And so many bytes, as in [`Limit::bytes`].
    #[must_use]
    pub const fn and_bytes(mut self, rate: Rate) -> Self {
        self.rates[1] = Some(rate);
        self
    }

    /// The rate of packets or bytes, if that is limited.
    #[must_use]
    pub fn rate(&self, meter: Meter) -> Option<Rate> {
        self.rates[meter as usize]
    }

    pub(super) fn encode(&self, meter: Meter, tick: u64) -> Result<Option<Encoded>> {
        let Some(rate) = self.rate(meter) else { return Ok(None) };
        if meter == Meter::Bytes && rate.burst_size() < BURST_BYTES_MIN {
            let value = rate.to_string();
            return Err(Error::Invalid { what: "burst of bytes", value, expected: "at least 1514, a whole frame" });
        }
        rate.encode(meter, tick).map(Some)
    }

    /// What refused packets may come to before their source is banned: what it sends beyond its limit, up to `factor` times
    /// the limit for a second.
    pub(super) fn encode_excess(&self, meter: Meter, factor: u32, tick: u64) -> Result<Option<Encoded>> {
        let Some(rate) = self.rate(meter) else { return Ok(None) };
        let mut excess = rate.times(u64::from(factor) - 1);
        if meter == Meter::Bytes {
            excess = excess.burst(excess.burst_size().max(BURST_BYTES_MIN));
        }
        // A fast limit has no excess that could be measured; what it refuses is counted as fast as can be.
        let fastest = if meter == Meter::Packets { 1_000_000_000_u64 } else { 1_000_000_000_000 };
        if u128::from(excess.amount) * 1_000_000_000 > u128::from(fastest) * excess.per.as_nanos() {
            excess = Rate::per_second(fastest);
        }
        excess.encode(meter, tick).map(Some)
    }

    pub(super) fn to_record(self) -> Record {
        let mut record = Record::default();
        for (at, rate) in self.rates.iter().enumerate().filter_map(|(at, rate)| Some((at, (*rate)?))) {
            record.amount[at] = rate.amount;
            record.per[at] = u64::try_from(rate.per.as_nanos()).unwrap_or(u64::MAX);
            record.burst[at] = rate.burst.unwrap_or(0);
        }
        record
    }

    /// `None` for an unused record.
    pub(super) fn of_record(record: &Record) -> Option<Self> {
        let rate = |at: usize| {
            let rate = Rate::new(record.amount[at], Duration::from_nanos(record.per[at]));
            let rate = if record.burst[at] == 0 { rate } else { rate.burst(record.burst[at]) };
            (record.amount[at] != 0).then_some(rate)
        };
        let rates = [rate(0), rate(1)];
        rates.iter().any(Option::is_some).then_some(Self { rates })
    }
}

/// A limit of packets.
impl From<Rate> for Limit {
    fn from(rate: Rate) -> Self {
        Self::packets(rate)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rates {
            [Some(packets), Some(bytes)] => write!(f, "{packets} packets and {bytes} bytes"),
            [Some(packets), None] => write!(f, "{packets} packets"),
            [None, Some(bytes)] => write!(f, "{bytes} bytes"),
            [None, None] => f.write_str("no limit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: u64 = 4_000_000;

    #[test]
    fn text_round_trips_and_mistakes_are_named() {
        for text in ["100/s", "1/h", "10/m:3", "1000000000/s:5"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for text in ["", "5", "5/d", "0/s", "-1/s", "+1/s", "1/s:", "1/s:0", "1/s:x", "/s", "1.5/s"] {
            let error = text.parse::<Rate>().unwrap_err().to_string();
            assert!(error.contains("N/UNIT[:BURST]"), "{error}");
        }
        let burst = |text: &str| text.parse::<Rate>().unwrap().burst_size();
        assert_eq!((burst("100/s"), burst("600/m"), burst("10/m"), burst("1/h"), burst("5/s:2")), (100, 10, 1, 1, 2));
    }

    /// The cost of a packet in ns, and what it is off by.
    fn precision(rate: Rate, meter: Meter, amount: u64) -> f64 {
        let limit = rate.encode(meter, TICK).unwrap();
        let units = (amount * limit.cost).div_ceil(1 << COST_SHIFT);
        let ns = (units as f64) * f64::from(1_u32 << limit.right) / f64::from(1_u32 << limit.left);
        let exact = rate.period().as_nanos() as f64 / rate.amount() as f64 * amount as f64;
        ns / exact - 1.0
    }

    #[test]
    fn costs_are_never_low_and_at_most_a_hundredth_high() {
        for amount in [1, 3, 7, 10, 99, 1000, 30_001, 999_999, 1_000_000, 1_000_001, 77_777_777, 300_000_000] {
            for period in [1, 60, 3600] {
                let rate = Rate::new(amount, Duration::from_secs(period)).burst(1);
                let off = precision(rate, Meter::Packets, 1);
                assert!((0.0..0.01).contains(&off), "{rate}: {off}");
            }
        }
        for rate in [Rate::per_second(1_000_000), Rate::per_second(1_000_000_000), Rate::per_second(100)] {
            assert!(precision(rate, Meter::Packets, 1) < 1e-4, "{rate}");
        }
        for amount in [1, 1000, 1_000_000, 12_500_000, 1_250_000_000, 12_500_000_000, 100_000_000_001] {
            for length in [60, 64, 1514, 9000, 65_000] {
                let off = precision(Rate::per_second(amount).burst(100_000), Meter::Bytes, length);
                assert!((-1e-9..0.01).contains(&off), "{amount} bytes: {length}: {off}");
            }
        }
    }

    #[test]
    fn what_cannot_be_counted_is_refused_by_name() {
        let refused = |rate: Rate| rate.encode(Meter::Packets, TICK).unwrap_err().to_string();
        assert!(refused(Rate::per_second(0)).contains("at least 1 packet in 24 hours"));
        assert!(refused(Rate::new(1, Duration::from_secs(100_000))).contains("24 hours"));
        assert!(refused(Rate::per_second(1_000_000_001)).contains("10^9"));
        assert!(refused(Rate::per_second(1).burst(0)).contains("burst"));
        assert!(refused(Rate::per_hour(1).burst(u64::MAX)).contains("burst"));
        let limit = Limit::bytes(Rate::per_second(1000));
        assert!(limit.encode(Meter::Bytes, TICK).unwrap_err().to_string().contains("1514"));
        let slowest = |per| Limit::bytes(Rate::new(1, per).burst(1514)).encode(Meter::Bytes, TICK);
        let limit = slowest(Duration::from_secs(3600)).unwrap().unwrap();
        assert!(limit.cost.checked_mul(512 * 1024 + 100).is_some(), "what the largest frame costs can be counted");
        assert!(slowest(Duration::from_secs(3601)).unwrap_err().to_string().contains("1 byte in an hour"));
        assert!(Rate::per_hour(1).burst(1000).encode(Meter::Packets, TICK).is_ok());
        let slowest = Rate::new(1, Duration::from_secs(24 * 3600)).burst(1).encode(Meter::Packets, TICK).unwrap();
        assert!(slowest.cost.checked_mul(0x7fff).is_some(), "and so can the most segments");
    }

    #[test]
    fn the_coarse_clock_is_taken_only_where_a_burst_lasts_two_ticks() {
        let clock = |rate: Rate| rate.encode(Meter::Packets, TICK).unwrap().clock;
        assert_eq!(clock(Rate::per_second(1_000_000).burst(8000)), JIFFIES);
        assert_eq!(clock(Rate::per_second(1_000_000).burst(7999)), NANOSECONDS);
        assert_eq!(clock(Rate::per_second(100).burst(1)), JIFFIES, "10 ms");
        assert_eq!(clock(Rate::per_second(200).burst(1)), NANOSECONDS, "5 ms");
    }

    #[test]
    fn records_give_back_what_was_asked_for() {
        for limit in [
            Limit::packets("5/m".parse().unwrap()),
            Limit::bytes(Rate::per_hour(9).burst(2000)),
            Limit::packets(Rate::per_second(1)).and_bytes(Rate::per_second(1_000_000)),
        ] {
            assert_eq!(Limit::of_record(&limit.to_record()), Some(limit));
        }
        assert_eq!(Limit::of_record(&Record::default()), None);
    }
}
