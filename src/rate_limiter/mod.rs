//! [`RateLimiter`]: how much each source may send.

mod ban;
mod book;
mod config;
mod event;
mod grow;
mod rate;
mod scope;
mod source;
mod stats;
mod tables;
#[cfg(test)]
mod tests;
mod text;

use std::{
    mem::offset_of,
    path::Path,
    sync::{Arc, MutexGuard, atomic::Ordering},
    time::Duration,
};

pub use ban::{Ban, Bans};
use book::Book;
pub use config::{BanPolicy, RateLimiterConfig, TableFull};
pub use event::RateEvent;
pub use rate::{Limit, Meter, Rate};
pub use scope::Scope;
pub use source::Bucket;
pub use stats::{RateLimiterCounts, ScopeStats};
pub use tables::{Limits, Tier, Tiers, TiersReplaced};

#[allow(unused_imports, reason = "for links in the documentation")]
use crate::Error;
use crate::{
    Events, PacketEvent, Result, Stage,
    abi::{
        event::Event,
        rate_limiter::{CLASSES, DETAIL_BAN, DETAIL_METER_SHIFT, DETAIL_SCOPE_SHIFT, Policy, SCOPES},
    },
    base::{self, COPIED, Carry, Edit, Growth, Sets, StageCore, StageKind, State},
    flow_table::{FlowTable, Shape},
    stage::sealed::Sealed,
    sys::{self, mmap::LongMapping, object::Plan},
};

static KIND: StageKind = StageKind {
    name: "rate_limiter",
    abi: crate::abi::fingerprint(env!("XDPKIT_ABI_RATE_LIMITER")),
    sized_by: &[
        ("sources", &["buckets_lines", "bucket_addresses"]),
        ("bans", &["bans_lines", "ban_addresses"]),
        ("tiers", &["tiers", "lpm_lines"]),
        ("ring_bytes", &["events"]),
    ],
    carried: &[&[
        ("policies", COPIED),
        ("limits", COPIED),
        ("shared", COPIED),
        ("records", COPIED),
        ("tiers", Carry::Banks(2)),
        ("lpm_lines", Carry::Rebuilt),
        ("bans_lines", Carry::RebuiltWith("bans_lines")),
        ("bans_table", Carry::RebuiltWith("bans_lines")),
        ("ban_addresses", Carry::RebuiltWith("bans_lines")),
    ]],
    load: |plan: &Plan<'_>| {
        let mut storage = std::mem::MaybeUninit::uninit();
        let builder = sys::skel::rate_limiter::RateLimiterSkelBuilder::default();
        sys::object::load(builder, &mut storage, "rate_limiter", plan)
    },
};

/// Lets each source send so much of each kind of traffic, and drops the rest.
///
/// A source is an address, or the prefix of the configured length: /32 and /64 by default. Limits are exact over any time and
/// over all CPUs together: at most the rate and one burst (plus one tick of the kernel's clock where the burst is
/// large enough for that clock). A packet is checked against every [`Scope`] that it is in, and charged to all of them or,
/// when one refuses it, to none. A [`Tier`] gives the sources in a prefix a limit of their own, in the place of each
/// scope's, or exempts or blocks them.
///
/// A source keeps its place in the table while it has not been idle, and for some time after it was seen a second time:
/// a flood from spoofed addresses takes places from its own kind only. Packets of sources that find no place go by
/// [`TableFull`]. Bans have a table of their own.
///
/// ```no_run
/// use xdpkit::{AttachOptions, BanPolicy, Limit, Rate, RateLimiter, RateLimiterConfig, Scope, Stage as _, Tier};
///
/// # fn main() -> xdpkit::Result<()> {
/// let config = RateLimiterConfig::default()
///     .limit(Scope::All, Rate::per_second(1000))
///     .limit(Scope::TcpSyn, "20/s:50".parse::<Rate>()?)
///     .ban(BanPolicy::of(std::time::Duration::from_secs(60)));
/// let limiter = RateLimiter::load(&config)?;
/// limiter.tiers().insert("198.51.100.0/24".parse().unwrap(), Limit::packets(Rate::per_second(50_000)).into())?;
/// limiter.tiers().insert("192.0.2.1/32".parse().unwrap(), Tier::Exempt)?;
/// let _attachment = limiter.attach(&AttachOptions::new("eth0"))?;
/// for bucket in limiter.top(10)? {
///     println!("{}: {:.0} % of its {} burst", bucket.source, bucket.level * 100.0, bucket.scope);
/// }
/// # Ok(())
/// # }
/// ```
///
/// Malformed packets are dropped, each under its own [`Reason`](crate::Reason).
///
/// Needs Linux 5.18 or newer (tested from 6.1 on), `CAP_BPF`, `CAP_PERFMON` and `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct RateLimiter {
    core: StageCore,
    state: Arc<State<Book>>,
    buckets: FlowTable<LongMapping>,
    bucket_addresses: LongMapping,
    bans: FlowTable<LongMapping>,
    ban_addresses: LongMapping,
    shared: LongMapping,
}

impl Sealed for RateLimiter {
    fn core(&self) -> &StageCore {
        &self.core
    }
}

impl Stage for RateLimiter {}

/// What sources without a place share.
fn share_of(config: &RateLimiterConfig) -> Rate {
    match config.full {
        TableFull::Share(rate) => rate,
        TableFull::Drop | TableFull::Pass => Rate::per_second(1),
    }
}

impl RateLimiter {
    /// Loads the program and creates its tables.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::MissingCapability`], [`Error::Forbidden`], [`Error::KernelTooOld`],
    /// [`Error::NoMemory`], [`Error::Verifier`], [`Error::Load`].
    pub fn load(config: &RateLimiterConfig) -> Result<Self> {
        let sizes = config.sizes()?;
        let core = StageCore::load(&KIND, &config.name, &sizes.maps)?;
        let buckets = core.create_flow_table("buckets", sizes.buckets)?;
        let bans = core.create_flow_table("bans", sizes.bans)?;
        let book = Book::create(&core, &sizes, &config.limits, share_of(config), config.events)?;
        Self::of(core, book, buckets, bans)
    }

    /// Takes over the tables (limits, tiers, buckets, bans, counters) that an earlier process pinned under this name, as they
    /// are. To take over its attachments too, attach with the same [`AttachOptions::pin`](crate::AttachOptions::pin).
    ///
    /// # Errors
    /// [`Error::PinMissing`]; [`Error::PinMismatch`] when this build cannot understand the tables; [`Error::PinsLocked`].
    pub fn adopt(directory: impl AsRef<Path>, name: &str) -> Result<Self> {
        Self::take_over(directory.as_ref(), name, None)
    }

    fn take_over(directory: &Path, name: &str, growth: Option<&Growth<'_>>) -> Result<Self> {
        let (core, (book, buckets, bans)) = StageCore::adopt(&KIND, directory, name, growth, |core| {
            let (buckets, bans) = (core.adopt_flow_table("buckets")?, core.adopt_flow_table("bans")?);
            Ok((Book::adopt(core)?, buckets, bans))
        })?;
        Self::of(core, book, buckets, bans)
    }

    /// Adopts what is pinned there under the configuration's name, else loads: what a process does at its start when
    /// it wants to go on where the last one ended. An adopted limiter keeps its tiers, buckets and bans, and follows the
    /// configuration as by [`RateLimiter::configure`].
    ///
    /// A configuration with more tiers or bans makes larger tables with the same in them. They
    /// are put into every pinned chain at the first attachment, or by [`Stage::ready`]; from then on the earlier process is superseded.
    ///
    /// # Errors
    /// As [`RateLimiter::load`], [`RateLimiter::adopt`] and [`RateLimiter::configure`].
    pub fn load_or_adopt(directory: impl AsRef<Path>, config: &RateLimiterConfig) -> Result<Self> {
        base::load_or_adopt(
            directory.as_ref(),
            &config.name,
            |directory, name| {
                let sizes = config.sizes()?;
                let fit = |sets: &Sets<'_>, core: &StageCore| grow::fit(sets, core, &sizes);
                Self::take_over(directory, name, Some(&Growth { wanted: &sizes.maps, fit: &fit }))
            },
            || Self::load(config),
            |adopted| adopted.configure(config),
        )
    }

    /// From now on, follows this configuration, whose name is passed over. Its limits take the place of those that there
    /// are; a configuration without any leaves them as they are. Consumed credit carries over.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::PinnedSetting`] for another value of what cannot change while the tables live:
    /// `prefix_v4`, `prefix_v6`, `sources`, `bans` and `tiers` (of these, an adoption makes more), `ring_bytes`;
    /// [`Error::Superseded`]. Nothing was changed then.
    pub fn configure(&self, config: &RateLimiterConfig) -> Result<()> {
        let (core, sizes) = (&self.core, config.sizes()?);
        let mut book = self.edit()?;
        let found = book.plan.policy;
        let bits = |mask: &[u8]| mask.iter().map(|octet| octet.count_ones()).sum::<u32>();
        let flows = |map: &str| Shape::capacity_of(core.entries(map));
        core.is_fixed("prefix_v4", bits(&found.mask4), config.prefix_v4.into())?;
        core.is_fixed("prefix_v6", bits(&found.mask6), config.prefix_v6.into())?;
        core.is_fixed("sources", flows("buckets_lines"), sizes.buckets.capacity())?;
        core.is_fixed("bans", flows("bans_lines"), sizes.bans.capacity())?;
        core.is_fixed("tiers", core.entries("tiers") / 2, config.tiers)?;
        core.is_fixed("ring_bytes", core.entries("events"), config.ring_bytes)?;
        let shared = (share_of(config), config.events);
        book.configure(core, &sizes.policy, &config.limits, shared, |slot| self.forget_scope(slot))
    }

    fn of(core: StageCore, book: Book, buckets: FlowTable<LongMapping>, bans: FlowTable<LongMapping>) -> Result<Self> {
        let map = |name| LongMapping::new(core.map(name));
        let (bucket_addresses, ban_addresses) = (map("bucket_addresses")?, map("ban_addresses")?);
        let shared = map("shared")?;
        let state = Arc::new(State::new(book, Book::adopt));
        Ok(Self { core, state, buckets, bucket_addresses, bans, ban_addresses, shared })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.state.look()
    }

    fn edit(&self) -> Result<Edit<'_, Book>> {
        self.state.edit(&self.core)
    }

    /// The limits by scope, for sources that no tier is about.
    #[must_use]
    pub fn limits(&self) -> Limits<'_> {
        Limits::of(self)
    }

    /// The prefixes whose sources have a tier.
    #[must_use]
    pub fn tiers(&self) -> Tiers<'_> {
        Tiers::of(self)
    }

    /// The sources that are banned.
    #[must_use]
    pub fn bans(&self) -> Bans<'_> {
        Bans::of(self)
    }

    /// From now on, nothing is dropped by a limit, a tier or a ban (true), or what they say (false). While it only counts, it
    /// charges and bans all the same: the bans that it has set by then are obeyed when it does not any more.
    ///
    /// # Errors
    /// [`Error::Superseded`].
    pub fn set_count_only(&self, only: bool) -> Result<()> {
        self.edit()?.set(offset_of!(Policy, count_only), only.into());
        Ok(())
    }

    /// From now on, cuts sources off that exceed their limit by so much; `None`: none. Bans in force stay.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::Map`].
    pub fn set_ban(&self, policy: Option<BanPolicy>) -> Result<()> {
        let sizes = RateLimiterConfig::default().ban(policy).sizes()?;
        self.edit()?.set_ban(&self.core, sizes.policy.ban_factor, sizes.policy.ban)
    }

    /// What becomes of packets whose source finds no place.
    #[must_use]
    pub fn table_full(&self) -> TableFull {
        self.book().plan.full()
    }

    /// The reader of events: who has exceeded a limit, and who was banned.
    ///
    /// # Errors
    /// [`Error::EventsTaken`] while another reader of these events lives in this process.
    pub fn events(&self) -> Result<Events<RateEvent>> {
        let state = Arc::clone(&self.state);
        let decode = move |record: &[u8]| {
            let event = bytemuck::try_pod_read_unaligned::<Event>(record).ok()?;
            let detail = event.detail;
            let slot = (detail >> DETAIL_SCOPE_SHIFT) as usize % SCOPES;
            let plan = state.look().plan.clone();
            Some(RateEvent {
                packet: PacketEvent::decode(event)?,
                scope: plan.scopes[slot].map(|(scope, _)| scope),
                meter: Meter::ALL[(detail >> DETAIL_METER_SHIFT) as usize & 1],
                limit: plan.limit(detail as usize % CLASSES, slot),
                banned: detail & DETAIL_BAN != 0,
            })
        };
        Events::open(self.name(), self.core.map("events"), Box::new(decode))
    }

    fn policy(&self) -> Policy {
        self.book().plan.policy
    }

    /// Raises the time until which the program looks for bans.
    fn announce_ban(&self, until: Duration) {
        let nanoseconds = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.shared.as_ref()[BANNED_UNTIL].fetch_max(nanoseconds, Ordering::SeqCst);
    }
}

/// Where `banned_until` stands, in 64-bit words.
const BANNED_UNTIL: usize = offset_of!(crate::abi::rate_limiter::Shared, banned_until) / 8;
