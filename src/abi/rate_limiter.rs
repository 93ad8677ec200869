//! Mirror of `bpf/abi/rate_limiter.h`.

use bytemuck::{Pod, Zeroable};

use super::{assert_same_layout, reason::Count};

pub(crate) const SCOPES: usize = 8;
pub(crate) const CLASSES: usize = 64;
pub(crate) const METERS: usize = 4;
pub(crate) const EXEMPT: u32 = 62;
pub(crate) const BLOCKED: u32 = 63;

pub(crate) const LIMIT_SHARED: usize = CLASSES * SCOPES * METERS;
pub(crate) const LIMIT_EVENTS: usize = LIMIT_SHARED + 1;
pub(crate) const LIMITS: usize = LIMIT_SHARED + 2;

pub(crate) const RECORD_SCOPES: usize = CLASSES;
pub(crate) const RECORD_SHARED: usize = CLASSES + SCOPES;
pub(crate) const RECORD_EVENTS: usize = RECORD_SHARED + 1;

/// Parts of a bucket.
pub(crate) const TIME_BITS: u32 = 50;
pub(crate) const TIME_MASK: u64 = (1 << TIME_BITS) - 1;
/// No lead comes near that.
pub(crate) const LEAD_END: u64 = (1 << 48) + (1 << 40);
pub(crate) const UNIT_SHIFT: u32 = 50;
pub(crate) const IPV6: u64 = 1 << 54;
pub(crate) const TAG_SHIFT: u32 = 55;

pub(crate) const COST_SHIFT: u32 = 12;
pub(crate) const JIFFIES: u32 = 1;
pub(crate) const NANOSECONDS: u32 = 2;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Limit {
    pub(crate) cost: u64,
    pub(crate) depth: u64,
    pub(crate) most: u64,
    pub(crate) clock: u32,
    pub(crate) unit: u32,
    pub(crate) left: u32,
    pub(crate) right: u32,
    pub(crate) reserved: [u64; 3],
}
assert_same_layout!(
    Limit,
    crate::sys::skel::rate_limiter::types::rate_limit,
    cost,
    depth,
    most,
    clock,
    unit,
    left,
    right
);

/// What a packet is, and what a scope asks for.
pub(crate) const IS_IP: u8 = 1;
pub(crate) const IS_TCP: u8 = 2;
pub(crate) const IS_UDP: u8 = 4;
pub(crate) const IS_SYN: u8 = 8;
pub(crate) const IS_ECHO: u8 = 16;
pub(crate) const HAS_PORT: u8 = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Scope {
    pub(crate) needs: u8,
    pub(crate) reserved: u8,
    pub(crate) port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Policy {
    pub(crate) scopes: u32,
    pub(crate) meters: u32,
    pub(crate) scope: [Scope; SCOPES],
    pub(crate) tiers: u32,
    pub(crate) roots: [u32; 2],
    pub(crate) count_only: u32,
    pub(crate) unsupported: u32,
    pub(crate) neighbours: u32,
    pub(crate) full: u32,
    pub(crate) events: u32,
    pub(crate) mask4: [u8; 4],
    pub(crate) wide6: u32,
    pub(crate) mask6: [u8; 16],
    pub(crate) protect: u64,
    pub(crate) ban: u64,
    pub(crate) tick: u64,
    pub(crate) tier_bank: u32,
    pub(crate) ban_factor: u32,
    pub(crate) single: u32,
    pub(crate) reserved: u32,
    pub(crate) only: Limit,
}
assert_same_layout!(
    Policy,
    crate::sys::skel::rate_limiter::types::rate_policy,
    scopes,
    meters,
    scope,
    tiers,
    roots,
    count_only,
    unsupported,
    neighbours,
    full,
    events,
    mask4,
    wide6,
    mask6,
    protect,
    ban,
    tick,
    tier_bank,
    ban_factor,
    single,
    reserved,
    only
);

pub(crate) const FULL_DROP: u32 = 0;
pub(crate) const FULL_PASS: u32 = 1;
pub(crate) const FULL_SHARE: u32 = 2;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Shared {
    pub(crate) in_force: u32,
    pub(crate) reserved: u32,
    pub(crate) banned_until: u64,
    pub(crate) jiffies_offset: u64,
    pub(crate) reserved_too: [u64; 5],
    pub(crate) share: u64,
    pub(crate) reserved_three: [u64; 7],
    pub(crate) told: u64,
    pub(crate) reserved_four: [u64; 7],
}
assert_same_layout!(
    Shared,
    crate::sys::skel::rate_limiter::types::rate_shared,
    in_force,
    banned_until,
    jiffies_offset,
    share,
    told
);

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct ScopeCount {
    pub(crate) admitted: Count,
    pub(crate) refused: Count,
}
assert_same_layout!(ScopeCount, crate::sys::skel::rate_limiter::types::rate_count, admitted, refused);

/// The stage's own counts.
pub(crate) const OWN_BANS: usize = 0;
pub(crate) const OWN_BANS_REFUSED: usize = 1;
pub(crate) const OWN_EVENTS_HELD: usize = 2;
pub(crate) const OWN_SCOPES: usize = 16;

pub(crate) const BAN_TIME: u64 = (1 << 59) - 1;
pub(crate) const BAN_IPV6: u64 = 1 << 59;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Record {
    pub(crate) amount: [u64; 2],
    pub(crate) per: [u64; 2],
    pub(crate) burst: [u64; 2],
}
assert_same_layout!(Record, crate::sys::skel::rate_limiter::types::rate_record, amount, per, burst);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Tier {
    pub(crate) address: [u8; 16],
    pub(crate) class: u32,
    pub(crate) length: u8,
    pub(crate) ipv6: u8,
    pub(crate) used: u8,
    pub(crate) reserved: u8,
}
assert_same_layout!(Tier, crate::sys::skel::rate_limiter::types::rate_tier, address, class, length, ipv6, used);

pub(crate) const DETAIL_BAN: u32 = 1 << 31;
pub(crate) const DETAIL_METER_SHIFT: u32 = 16;
pub(crate) const DETAIL_SCOPE_SHIFT: u32 = 8;
pub(crate) const LEAF_LENGTH_SHIFT: u32 = 8;
