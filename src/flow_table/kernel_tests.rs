//! The programs against a model and against the mirror, and two CPUs at the same entries. These need root.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use fastrand::Rng;
use xdpkit_lab::{
    bench::{FlowOperation, FlowProbe, FlowRank},
    counts::times,
};

use super::{
    FlowTable, Inserted, KEEP, Shape,
    tests::{nothing, secret},
};

/// `enum flow_answer`.
const TAKEN: u32 = 0;
const EXISTS: u32 = 1;
const FULL: u32 = 2;

fn probe(capacity: u32, seed: u64) -> (FlowProbe, FlowTable<impl AsRef<[std::sync::atomic::AtomicU64]>>) {
    let shape = Shape::of_capacity(capacity);
    let probe = FlowProbe::load(shape.total(), 1).unwrap();
    let [lines, header] = probe.memory().unwrap();
    (probe, FlowTable::create(lines, header, shape, secret(seed)))
}

#[test]
fn the_kernel_makes_the_same_keys() {
    let (probe, table) = probe(64, 1);
    let mut random = Rng::with_seed(2);
    let pairs: Vec<[u64; 2]> = (0..1000).map(|_| [random.u64(..1 << 63), random.u64(..)]).collect();
    let asked: Vec<_> = pairs.iter().map(|[number, other]| (*number, FlowOperation::Hash(*other))).collect();
    for ([a, b], hashed) in pairs.iter().zip(probe.answers(FlowRank::Keep, &asked).unwrap()) {
        let words = [*a as u32, (a >> 32) as u32, *b as u32, (b >> 32) as u32];
        assert_eq!(hashed.key, table.secret().hash(&words));
    }
    let asked: Vec<_> = pairs.iter().map(|[number, _]| (*number, FlowOperation::Find)).collect();
    for ([number, _], found) in pairs.iter().zip(probe.answers(FlowRank::Keep, &asked).unwrap()) {
        assert_eq!((found.key, found.answer), (table.secret().key(*number), 0));
    }
}

#[test]
fn every_answer_is_the_models() {
    // From a table that never fills to one that always overflows.
    for (capacity, numbers) in [(4096, 2000), (256, 200), (256, 400), (64, 1000)] {
        for rank in [FlowRank::Keep, FlowRank::Lowest, FlowRank::Stale(500)] {
            let (probe, table) = probe(capacity, u64::from(capacity) + numbers);
            let mut random = Rng::with_seed(numbers);
            let mut model: HashMap<u64, u64> = HashMap::new();
            let (mut refused, mut victims) = (0, 0);
            for _ in 0..times(4, 40, 1) {
                let operations: Vec<_> = (0..20_000)
                    .map(|_| {
                        let value = random.u64(..1000);
                        let operation = match random.u8(..8) {
                            0..3 => FlowOperation::Insert(value),
                            3..5 => FlowOperation::Find,
                            5..7 => FlowOperation::Update(value),
                            _ => FlowOperation::Remove,
                        };
                        (random.u64(..numbers), operation)
                    })
                    .collect();
                for ((number, operation), answer) in operations.iter().zip(probe.answers(rank, &operations).unwrap()) {
                    let known = model.get(number).copied();
                    let found = (known.is_some().into(), known.unwrap_or(0));
                    match operation {
                        FlowOperation::Find => assert_eq!((answer.answer, answer.value), found),
                        FlowOperation::Update(value) => {
                            assert_eq!(answer.answer, found.0);
                            model.entry(*number).and_modify(|known| *known = *value);
                        }
                        FlowOperation::Remove => {
                            assert_eq!((answer.answer, answer.value), found);
                            model.remove(number);
                        }
                        FlowOperation::Insert(value) => {
                            let wanted = if known.is_some() { EXISTS } else { TAKEN };
                            if answer.answer == FULL && wanted == TAKEN {
                                refused += 1;
                                continue;
                            }
                            assert_eq!(answer.answer, wanted);
                            if let Some((key, value)) = answer.victim {
                                let gone = table.secret().number(key).unwrap();
                                assert_eq!(model.remove(&gone), Some(value), "what goes was there, whole");
                                assert!(rank != FlowRank::Keep);
                                assert!(!matches!(rank, FlowRank::Stale(below) if value >= below));
                                victims += 1;
                            }
                            if wanted == TAKEN {
                                model.insert(*number, *value);
                            }
                        }
                        FlowOperation::Hash(_) => unreachable!("not asked"),
                    }
                }
                let mirrored: HashMap<u64, u64> =
                    table.iter().map(|entry| (table.secret().number(entry.key).unwrap(), entry.value())).collect();
                assert_eq!(mirrored, model);
                assert_eq!(table.len(), model.len());
                for (number, value) in &model {
                    assert_eq!(table.get(table.secret().key(*number)).map(|entry| entry.value()), Some(*value));
                }
            }
            let half_empty = numbers <= u64::from(capacity / 2);
            assert!(
                !half_empty || refused == 0 && (victims == 0 || rank == FlowRank::Stale(500)),
                "{refused}, {victims}"
            );
            assert!(rank != FlowRank::Lowest || refused == 0, "something may always go");
            let overflows = numbers > 2 * u64::from(capacity) && rank == FlowRank::Keep;
            assert!(!overflows || refused > 0, "{} there", model.len());
        }
    }
}

/// Trap H2, as the program sees it.
#[test]
fn h2_the_program_refuses_nothing_up_to_half_of_the_capacity() {
    for (capacity, seeds) in [(64, 20), (4096, 8), (1 << 18, times(1, 20, 0) as u64), (1 << 22, times(0, 2, 0) as u64)]
    {
        for seed in 0..seeds {
            let (probe, table) = probe(capacity, seed);
            let operations: Vec<_> =
                (0..u64::from(capacity / 2)).map(|number| (number, FlowOperation::Insert(number))).collect();
            let answers = probe.answers(FlowRank::Lowest, &operations).unwrap();
            assert!(answers.iter().all(|answer| answer.answer == TAKEN && answer.victim.is_none()));
            assert_eq!(table.len(), operations.len());
        }
    }
}

/// Two CPUs add to, insert, evict and remove the same entries: every addition is there in the end, or went with an
/// entry whose value was told.
#[test]
fn two_cpus_lose_no_update_and_see_no_torn_entry() {
    let operations = times(1_000_000, 50_000_000, 100_000) as u64;
    for (capacity, keys, rank, remove) in [
        // All there; a handful of entries; entries that come and go; a table that overflows, in both ways.
        (4096, 2000, FlowRank::Keep, 0),
        (64, 3, FlowRank::Keep, 0),
        (64, 30, FlowRank::Keep, 4),
        (64, 1000, FlowRank::Lowest, 50),
        (64, 1000, FlowRank::Stale(20), 0),
        (1 << 16, 1 << 20, FlowRank::Lowest, 0),
    ] {
        let (probe, table) = probe(capacity, keys);
        let did = probe.stress(rank, keys, remove, 2, operations / 6 + 1).unwrap();
        println!("{capacity} flows, {keys} keys, {rank:?}: {did:?}");
        assert_eq!(did.operations, 2 * (operations / 6 + 1));
        assert_eq!(did.torn, 0);
        let mut seen = HashSet::new();
        let mut live = 0;
        for entry in table.iter() {
            assert!(seen.insert(entry.key), "{:?} is there twice", table.secret().number(entry.key));
            assert_eq!(entry.value() >> 40, entry.key & 0xfffff, "the state belongs to the key");
            live += entry.value() & 0xff_ffff_ffff;
        }
        assert_eq!(live + did.removed, did.added);
        assert!(did.given_up * 1000 <= did.operations, "who loses a race wins the next");
        assert!(keys > u64::from(capacity / 2) || did.full + did.evictions == 0);
    }
}

/// The same with this process in it.
#[test]
fn the_mirror_changes_entries_while_programs_do() {
    let (probe, table) = probe(64, 5);
    const KEYS: u64 = 200;
    let done = AtomicBool::new(false);
    let (mut added, mut removed) = (0, 0);
    let did = thread::scope(|scope| {
        let (done, probe) = (&done, &probe);
        let kernel = scope.spawn(move || {
            let did = probe.stress(FlowRank::Lowest, KEYS, 20, 1, times(1_000_000, 20_000_000, 50_000) as u64);
            done.store(true, Ordering::Relaxed);
            did
        });
        let mut random = Rng::with_seed(6);
        let count = |value: u64| value & 0xff_ffff_ffff;
        while !done.load(Ordering::Relaxed) {
            let key = table.secret().key(random.u64(..KEYS));
            let own = (key & 0xfffff) << 40;
            match table.get(key) {
                Some(entry) => {
                    assert_eq!(entry.value() >> 40, key & 0xfffff, "torn");
                    match random.u8(..4) {
                        0 if table.remove(&entry) => removed += count(entry.value()),
                        0 => {}
                        _ => added += u64::from(table.update(&entry, entry.value() + 1)),
                    }
                }
                None => {
                    let rank = |value| ((1 << 60) - count(value)) << 2;
                    match table.insert(key, own | 1, rank, |_, value| removed += count(value), nothing) {
                        Inserted::New => {}
                        // Somebody was faster, and what it had counted is gone.
                        Inserted::Changed(before) => removed += count(before),
                        Inserted::Full => panic!("something may always go"),
                    }
                    added += 1;
                }
            }
        }
        kernel.join().unwrap().unwrap()
    });
    assert_eq!((did.torn, did.full), (0, 0));
    let live: u64 = table.iter().map(|entry| entry.value() & 0xff_ffff_ffff).sum();
    assert_eq!(live + removed + did.removed, added + did.added);
    assert!(added > 0 && KEEP == 0);
}
