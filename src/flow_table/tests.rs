//! The mirror by itself, in plain memory: keys, sizes, and what a full table does.

use std::{collections::HashMap, sync::atomic::AtomicU64};

use fastrand::Rng;
use xdpkit_lab::counts::times;

use super::{FlowTable, HEADER_WORDS, Inserted, KEEP, KEY_MIN, LINE_WORDS, STALE, Secret, Shape};

pub(super) type Plain = FlowTable<Vec<AtomicU64>>;

pub(super) fn secret(seed: u64) -> Secret {
    let mut random = Rng::with_seed(seed);
    Secret::draw(|| random.u64(..))
}

fn words(count: usize) -> Vec<AtomicU64> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

pub(super) fn plain(capacity: u32, seed: u64) -> Plain {
    let shape = Shape::of_capacity(capacity);
    FlowTable::create(words(shape.total() as usize * LINE_WORDS), words(HEADER_WORDS), shape, secret(seed))
}

/// For tables that nothing is kept beside.
pub(super) fn nothing(_: u32) {}

/// For insertions for which nothing may go.
fn nobody(key: u64, value: u64) {
    panic!("{key} went, with {value}")
}

#[test]
fn exact_keys_can_be_undone_and_none_is_reserved() {
    let mut random = Rng::with_seed(1);
    for seed in 0..100 {
        let secret = secret(seed);
        for number in (0..1000).map(|at| if at < 100 { at } else { random.u64(..1 << 63) }) {
            let key = secret.key(number);
            assert!(key >= KEY_MIN);
            assert_eq!(secret.number(key), Some(number));
        }
        assert_eq!(Secret::of_words(secret.words()), Some(secret));
    }
    assert_eq!(Secret::of_words([0; super::SECRET_WORDS]), None, "even factors lose bits");
}

/// Trap H1: who finds flows that share a line under one secret has found nothing about the next.
#[test]
fn h1_flows_that_collide_under_one_secret_spread_under_another() {
    const LINES: u32 = 1 << 14;
    let shape = Shape { lines: LINES, stash: 16 };
    let known = secret(1);
    // Addresses in a row, as an attacker with a network has them.
    let aimed: Vec<u64> =
        (0..20_000_000).filter(|number| shape.line_at(known.key(*number), 0) == 7).take(1000).collect();
    assert_eq!(aimed.len(), 1000);
    for seed in 2..12 {
        let other = secret(seed);
        for candidate in 0..2 {
            let mut load = HashMap::new();
            for number in &aimed {
                *load.entry(shape.line_at(other.key(*number), candidate)).or_insert(0) += 1;
            }
            assert!(load.values().max().unwrap() < &8, "{:?} in one line", load.values().max());
        }
    }
}

/// Lines are chosen as evenly as by chance, also for numbers in a row and for those that differ in few bits.
#[test]
fn keys_of_regular_numbers_spread_evenly() {
    const LINES: u32 = 1 << 10;
    let shape = Shape { lines: LINES, stash: 16 };
    let number = |pattern: &str, n: u64| match pattern {
        "in a row" => n,
        "network byte order" => u64::from((n as u32).swap_bytes()),
        "high bits" => n << 40,
        _ => n << 12,
    };
    for pattern in ["in a row", "network byte order", "high bits", "steps of 4096"] {
        for seed in 0..20 {
            let secret = secret(seed);
            for candidate in 0..2 {
                let mut load = vec![0_i64; LINES as usize];
                for n in 0..1 << 16 {
                    load[shape.line_at(secret.key(number(pattern, n)), candidate) as usize] += 1;
                }
                // 64 a line, with a standard deviation of 8: more than 7 of them are no chance.
                let most = load.iter().max().unwrap();
                assert!(*most < 64 + 60, "{pattern}: {most} in one line");
            }
        }
    }
}

/// Trap H2.
#[test]
fn h2_nothing_is_refused_or_evicted_up_to_half_of_the_capacity() {
    let sizes = [(16, 2000), (64, 1000), (1000, 400), (1 << 14, 30), (1 << 18, 3), (1 << 22, 1)];
    for (capacity, tables) in sizes {
        for seed in 0..times(tables / 2 + 1, tables * 20, 1) as u64 {
            let table = plain(capacity, seed);
            let mut stashed = 0;
            for number in 0..u64::from(capacity / 2) {
                let key = table.secret().key(number * 7);
                let inserted = table.insert(key, number, |_| 4, nobody, nothing);
                assert_eq!(inserted, Inserted::New, "{number} of {capacity}");
                stashed += u32::from(table.get(key).unwrap().slot >= table.shape().capacity());
            }
            if capacity <= 1 << 14 {
                assert_eq!(table.len(), capacity as usize / 2);
            }
            assert!(stashed <= 8 + capacity / 4000, "{stashed} of {capacity} in the stash");
        }
    }
}

#[test]
fn half_the_capacity_holds_whoever_has_gone_before() {
    // The table has been full of flows that are stale by now: fresh ones find room all the same.
    for seed in 0..times(10, 200, 1) as u64 {
        let table = plain(4096, seed);
        let rank = |value: u64| if value < 1000 { STALE | (1000 - value) << 2 } else { KEEP };
        for number in 0..8192 {
            table.insert(table.secret().key(number), number % 1000, rank, |_, _| {}, nothing);
        }
        for number in 0..2048_u64 {
            let key = table.secret().key(1 << 40 | number);
            assert!(matches!(table.insert(key, 1000 + number, rank, |_, _| {}, nothing), Inserted::New), "{number}");
        }
        for number in 0..2048_u64 {
            let key = table.secret().key(1 << 40 | number);
            assert_eq!(table.get(key).unwrap().value(), 1000 + number);
        }
    }
}

#[test]
fn a_full_table_refuses_what_must_not_go_and_else_lets_the_highest_rank_go() {
    let table = plain(64, 3);
    let mut refused = 0;
    for number in 0..1000 {
        refused += u32::from(table.insert(table.secret().key(number), 1, |_| KEEP, nobody, nothing) == Inserted::Full);
    }
    assert!(refused > 0 && refused + table.len() as u32 == 1000);
    let all: HashMap<u64, u64> = table.iter().map(|entry| (entry.key, entry.value())).collect();
    // Now they may go.
    let key = (1000..).map(|number| table.secret().key(number)).find(|key| table.get(*key).is_none()).unwrap();
    let mut gone = None;
    assert_eq!(
        table.insert(key, 2, |value| value << 2, |key, value| gone = Some((key, value)), nothing),
        Inserted::New
    );
    let (gone, value) = gone.unwrap();
    assert!(all.contains_key(&gone) && value == 1 && table.get(gone).is_none());
    assert_eq!(table.insert(key, 3, |_| KEEP, nobody, nothing), Inserted::Changed(2));
    let entry = table.get(key).unwrap();
    assert!(table.update(&entry, 4) && !table.update(&entry, 5) && !table.remove(&entry), "only the first knew it");
    let entry = table.get(key).unwrap();
    assert!(entry.value() == 4 && table.remove(&entry) && table.get(key).is_none());
    // The way is free now.
    assert_eq!(table.insert(key, 6, |_| KEEP, nobody, nothing), Inserted::New);
}

#[test]
fn what_a_dead_process_was_writing_is_freed() {
    let table = plain(64, 3);
    let key = table.secret().key(5);
    assert_eq!(table.insert(key, 9, |_| KEEP, nobody, nothing), Inserted::New);
    let entry = table.get(key).unwrap();
    let line = entry.slot as usize / 4 * LINE_WORDS + 4 + entry.slot as usize % 4;
    table.lines[line].store(super::CLAIMED | 3, std::sync::atomic::Ordering::SeqCst);
    assert!(table.get(key).is_none());
    table.heal();
    assert_eq!(table.insert(key, 9, |_| KEEP, nobody, nothing), Inserted::New);
    assert_eq!(table.len(), 1);
}
