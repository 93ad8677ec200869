//! The connections' records in mapped memory, and the flow table that leads to them. `bpf/include/connection.h` has the
//! other side, and says how records change hands.

use std::{
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

use super::config::FRAGMENTS;
use crate::{
    Result,
    abi::{
        nat_balancer::{
            ANSWERED, CLAIMED, CONFIRMED, COUNTED, Connection, FIN_BACKEND, FIN_CLIENT, FLAGS_SHIFT, GENERATION_SHIFT,
            IPV6, KEPT_SOURCE, LIVE, NUMBER_MAX, RST_BACKEND, RST_CLIENT, STATES, Settings, TCP, VALUE_RECORD,
        },
        service::Address,
    },
    balancer::{ServiceProtocol, hash::mix64},
    base::{Records, Sets, Settle, StageCore},
    flow_table::{FlowTable, Secret, Shape},
    sys::{clock::Clock, mmap::LongMapping},
};

const WORDS: usize = size_of::<Connection>() / 8;
/// Words of a load: it has a cache line for itself.
const LOAD_WORDS: usize = 8;

#[derive(Debug)]
pub(super) struct Connections {
    records: LongMapping,
    loads: LongMapping,
    flows: FlowTable<LongMapping>,
    pub(super) settings: Records<Settings>,
    pub(super) clock: Clock,
}

/// What is known of time: now, and how long each state may last in silence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    now: u32,
    timeout: [u32; STATES],
}

pub(super) fn flags_of(word: u64) -> u32 {
    (word >> FLAGS_SHIFT) as u32 & 0xffff
}

/// `enum nat_state`.
pub(super) fn state_of(flags: u32) -> usize {
    let has = |flag| flags & flag != 0;
    match () {
        () if !has(TCP) => usize::from(has(ANSWERED)),
        () if has(RST_CLIENT | RST_BACKEND) => 7,
        () if has(FIN_CLIENT) && has(FIN_BACKEND) => 6,
        () if has(FIN_CLIENT | FIN_BACKEND) => 5,
        () if has(CONFIRMED) => 4,
        () => 2 + usize::from(has(ANSWERED)),
    }
}

impl Judge {
    /// Ticks since the connection's last packet. Stamps are exact to a quarter of a second.
    pub(super) fn idle(&self, word: u64) -> u32 {
        // A program on another CPU may be a tick ahead.
        let idle = self.now.wrapping_sub(word as u32);
        if idle > u32::MAX / 2 { 0 } else { idle }
    }

    pub(super) fn is_live(&self, word: u64) -> bool {
        flags_of(word) & LIVE != 0 && self.idle(word) <= self.timeout[state_of(flags_of(word))]
    }
}

impl Connections {
    /// Over new tables, with secrets that `random` makes.
    pub(super) fn create(
        core: &StageCore,
        clock: Clock,
        settings: &Settings,
        shape: Shape,
        random: impl Fn() -> u64,
    ) -> Result<Self> {
        let table = |name: [&str; 2], shape| -> Result<_> {
            Ok(FlowTable::create(mapping(core, name[0])?, mapping(core, name[1])?, shape, Secret::draw(&random)))
        };
        let flows = table(["flows_lines", "flows_table"], shape)?;
        // Nothing of it is ours to read: programs find it ready.
        table(["fragments_lines", "fragments_table"], Shape::of_capacity(FRAGMENTS))?;
        let settings_of = Records::of(core, "nat")?;
        settings_of.write(0, settings);
        Self::with(core, clock, flows, settings_of)
    }

    /// Over an earlier process's tables; `None` when they are not what they should be.
    pub(super) fn adopt(core: &StageCore, clock: Clock) -> Result<Option<Self>> {
        let Some(flows) = FlowTable::open(mapping(core, "flows_lines")?, mapping(core, "flows_table")?) else {
            return Ok(None);
        };
        flows.heal();
        Self::with(core, clock, flows, Records::of(core, "nat")?).map(Some)
    }

    fn with(
        core: &StageCore,
        clock: Clock,
        flows: FlowTable<LongMapping>,
        settings: Records<Settings>,
    ) -> Result<Self> {
        let (records, loads) = (mapping(core, "connections")?, mapping(core, "loads")?);
        Ok(Self { records, loads, flows, settings, clock })
    }

    pub(super) fn len(&self) -> u32 {
        (self.records.as_ref().len() / WORDS) as u32
    }

    pub(super) fn judge(&self) -> Result<Judge> {
        Ok(Judge { now: self.clock.now()?, timeout: self.settings.read(0).timeout })
    }

    fn word(&self, record: u32) -> &AtomicU64 {
        &self.records.as_ref()[record as usize * WORDS]
    }

    /// A record whose connection lives, whole.
    pub(super) fn read(&self, record: u32, judge: &Judge) -> Option<Connection> {
        // A word that changed may be another connection's.
        for _ in 0..8 {
            let word = self.word(record).load(Ordering::Acquire);
            if !judge.is_live(word) {
                return None;
            }
            let start = record as usize * WORDS;
            let words: [u64; WORDS] =
                std::array::from_fn(|at| self.records.as_ref()[start + at].load(Ordering::Acquire));
            if (self.word(record).load(Ordering::Acquire) ^ word) >> GENERATION_SHIFT == 0 {
                return Some(bytemuck::cast(words));
            }
        }
        None
    }

    /// The connections that live, with the numbers of their records.
    pub(super) fn live<'a>(&'a self, judge: &'a Judge) -> impl Iterator<Item = (u32, Connection)> + 'a {
        (0..self.len()).filter_map(|record| Some((record, self.read(record, judge)?)))
    }

    /// Whether a connection may still lead to this backend.
    pub(super) fn any_of(&self, backend: u16, identity: u32) -> bool {
        self.judge().is_ok_and(|judge| {
            self.live(&judge).any(|(_, connection)| (connection.backend, connection.identity) == (backend, identity))
        })
    }

    /// The record that the flow table has for a client and the number of a service.
    pub(super) fn find(&self, client: SocketAddr, service: u16) -> Option<u32> {
        let entry = self.flows.get(self.key(client, service))?;
        Some((entry.value() & VALUE_RECORD) as u32).filter(|record| *record < self.len())
    }

    /// As `nat_start`.
    pub(super) fn start(&self, protocol: ServiceProtocol, address: IpAddr, port: u16) -> u64 {
        let secret = self.settings.read(0).secret;
        let [high, low] = Address::from(address).0;
        let rest = u64::from(port.to_be()) << 32 | u64::from(protocol as u8);
        let products = [
            high ^ secret[0],
            (low ^ secret[1]).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            (rest ^ secret[2]).wrapping_mul(0xc2b2_ae3d_27d4_eb4f),
        ];
        mix64(products.into_iter().fold(0, u64::wrapping_add))
    }

    /// As `nat_key`.
    fn key(&self, client: SocketAddr, whom: u16) -> u64 {
        let port = client.port().to_be();
        match client {
            SocketAddr::V4(client) => {
                let address = u64::from(u32::from_ne_bytes(client.ip().octets()));
                self.flows.secret().key(address << 31 | u64::from(port) << 15 | u64::from(whom))
            }
            SocketAddr::V6(client) => {
                let [a, b, c, d]: [u32; 4] = bytemuck::cast(client.ip().octets());
                self.flows.secret().hash(&[a, b, c, d, u32::from(whom) << 16 | u32::from(port)])
            }
        }
    }

    /// Ends a connection unless it has changed hands since it was read. A packet that comes by meanwhile only delays it.
    pub(super) fn end(&self, record: u32, seen: &Connection) -> bool {
        loop {
            let word = self.word(record).load(Ordering::Acquire);
            if (word ^ seen.word) >> GENERATION_SHIFT != 0 || flags_of(word) & LIVE == 0 {
                return false;
            }
            if self.take(record, word) {
                return true;
            }
        }
    }

    /// Frees a record that has this word.
    fn take(&self, record: u32, word: u64) -> bool {
        let generation = (word >> GENERATION_SHIFT).wrapping_add(1) << GENERATION_SHIFT;
        let claimed = generation | u64::from(CLAIMED) << FLAGS_SHIFT | word & 0xffff_ffff;
        if self.word(record).compare_exchange(word, claimed, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return false;
        }
        let start = record as usize * WORDS;
        let words: [u64; WORDS] = std::array::from_fn(|at| self.records.as_ref()[start + at].load(Ordering::Acquire));
        let connection: Connection = bytemuck::cast(words);
        let flags = flags_of(word);
        if flags & COUNTED != 0
            && let Some(load) = self.loads.as_ref().get(usize::from(connection.backend) * LOAD_WORDS)
        {
            let _ = load.fetch_update(Ordering::AcqRel, Ordering::Acquire, |active| active.checked_sub(1));
        }
        let family = if flags & IPV6 != 0 { 3 } else { 2 };
        if let Some(address) = connection.client.get(family) {
            let client = SocketAddr::new(address, u16::from_be(connection.client_port));
            self.forget(self.key(client, connection.service), record);
            if flags & KEPT_SOURCE != 0 {
                self.forget(self.key(client, connection.address | (NUMBER_MAX + 1)), record);
            }
        }
        // Unless another process that adopted the tables took us for dead and freed it: then it may be somebody's.
        let _ = self.word(record).compare_exchange(claimed, generation, Ordering::SeqCst, Ordering::SeqCst);
        true
    }

    fn forget(&self, key: u64, record: u32) {
        while let Some(entry) = self.flows.get(key) {
            if (entry.value() & VALUE_RECORD) as u32 != record || self.flows.remove(&entry) {
                return;
            }
        }
    }

    /// Frees the records of connections that have been silent for too long. Answers how many.
    pub(super) fn collect(&self, judge: &Judge) -> usize {
        let dead = |record: &u32| {
            let word = self.word(*record).load(Ordering::Acquire);
            flags_of(word) & LIVE != 0 && !judge.is_live(word) && self.take(*record, word)
        };
        (0..self.len()).filter(dead).count()
    }

    /// Frees what a process that died was ending. Programs do not die.
    pub(super) fn heal(&self) {
        let claimed = |record: &u32| flags_of(self.word(*record).load(Ordering::Acquire)) & CLAIMED != 0;
        let seen: Vec<(u32, u64)> =
            (0..self.len()).filter(claimed).map(|record| (record, self.word(record).load(Ordering::Acquire))).collect();
        if seen.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        for (record, word) in seen {
            let free = word >> GENERATION_SHIFT << GENERATION_SHIFT;
            let _ = self.word(record).compare_exchange(word, free, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Connections that a backend has and that are neither closed nor gone.
    pub(super) fn active(&self, backend: u16) -> u64 {
        self.loads.as_ref().get(usize::from(backend) * LOAD_WORDS).map_or(0, |load| load.load(Ordering::Acquire))
    }

    /// Entries of the flow table.
    pub(super) fn entries(&self) -> usize {
        self.flows.len()
    }
}

/// Brings larger tables to their sizes; `index`: entries of `backend_index`. Connections that the programs of before open and
/// close from now on count for their backends too.
pub(super) fn fit(sets: &Sets<'_>, core: &StageCore, index: u32) -> Result<Vec<Settle>> {
    let settings = Records::<Settings>::of(core, "nat")?;
    settings.set(0, offset_of!(Settings, backend_mask), index - 1);
    let Some(old) = sets.smaller("loads") else { return Ok(Vec::new()) };
    let (old, new) = (LongMapping::new(old)?, mapping(core, "loads")?);
    // What was copied; it may have changed while it was.
    let before: Vec<u64> = new.as_ref().iter().map(|word| word.load(Ordering::Acquire)).collect();
    Ok(vec![Box::new(move |_| {
        for ((old, new), before) in old.as_ref().iter().zip(new.as_ref()).zip(before) {
            new.fetch_add(old.load(Ordering::Acquire).wrapping_sub(before), Ordering::AcqRel);
        }
        Ok(())
    })])
}

fn mapping(core: &StageCore, name: &str) -> Result<LongMapping> {
    LongMapping::new(core.map(name))
}

#[cfg(test)]
mod tests {
    //! These need root.

    use xdpkit_lab::frame::Frame;

    use super::*;
    use crate::{NatBalancer, NatConfig, NatService, Stage as _};

    /// A process that ends a connection is stopped in the middle; the client begins it again, and goes to another place.
    #[test]
    fn a_claimed_record_is_left_to_who_has_claimed_it() {
        let balancer = NatBalancer::load(&NatConfig::default()).expect("needs root");
        let (client, vip) = ("10.0.0.20:4000".parse().unwrap(), "10.0.0.100:80".parse().unwrap());
        let service = "tcp/10.0.0.100:80".parse().unwrap();
        balancer.insert(service, &NatService::new(["192.168.178.11:8080".parse().unwrap()])).unwrap();
        let connections = &balancer.connections;
        let opens = || {
            // It is opened, even where there is no way on.
            balancer.test_run(&Frame::tcp(client, vip).build()).unwrap();
            connections.find(client, 1).unwrap()
        };
        let record = opens();
        let word = connections.word(record).load(Ordering::SeqCst);
        let claimed =
            (word >> GENERATION_SHIFT).wrapping_add(1) << GENERATION_SHIFT | u64::from(CLAIMED) << FLAGS_SHIFT;
        connections.word(record).store(claimed, Ordering::SeqCst);
        assert_ne!(opens(), record);
        assert_eq!(connections.word(record).load(Ordering::SeqCst), claimed);
    }
}
