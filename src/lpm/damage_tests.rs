//! Memory that something else has written to: two writers at once, or none that we know. Nothing here may panic, recurse
//! without end or change a table that it refuses.

use std::sync::atomic::{AtomicU32, Ordering};

use fastrand::Rng;
use ipnet::{Ipv4Net, Ipv6Net};
use xdpkit_lab::counts::times;

use super::{
    Error, LINE_WORDS, ROOT_LINES, Root, Table,
    model::{Family, Model, Spread, bits_of, owner_length, probe, random_prefix},
    node::{COMPRESSED, LINE_MASK, NODE, PATH},
};

type Memory = Vec<AtomicU32>;

fn memory(lines: u32) -> Memory {
    (0..lines as usize * LINE_WORDS).map(|_| AtomicU32::new(0xdead_beef)).collect()
}

fn copied(memory: &Memory) -> Vec<u32> {
    memory.iter().map(|word| word.load(Ordering::Relaxed)).collect()
}

fn load(table: &Table<Memory>, at: usize) -> u32 {
    table.memory[at].load(Ordering::Relaxed)
}

fn store(table: &Table<Memory>, at: usize, word: u32) {
    table.memory[at].store(word, Ordering::Relaxed);
}

fn first_word(line: u32) -> usize {
    line as usize * LINE_WORDS
}

/// A table with a few prefixes below 10.1.0.0/16, or 2001::/16, and the word of the root that leads to them.
fn small<P: Family>() -> (Table<Memory>, Root<P>, usize) {
    let texts = if P::BITS == 32 {
        ["10.1.0.0/24", "10.1.2.0/25", "10.1.2.3/32", "10.1.4.0/23"]
    } else {
        ["2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/64", "2001:db8:1:2::1/128"]
    };
    let mut prefixes: Vec<P> = texts.into_iter().map(P::parse).collect();
    prefixes.sort_unstable_by_key(|prefix| (prefix.octets(), prefix.length()));
    let list: Vec<_> = prefixes.iter().map(|prefix| (*prefix, 256 + u32::from(prefix.length()))).collect();
    let mut table = Table::new(memory(4 * ROOT_LINES));
    let root = table.build(&list).unwrap();
    let slot = if P::BITS == 32 { 0x0a01 } else { 0x2001 };
    (table, root, first_word(root.line()) + slot)
}

fn root_words<P>(table: &Table<Memory>, root: Root<P>) -> Vec<u32> {
    (first_word(root.line())..first_word(root.line() + ROOT_LINES)).map(|at| load(table, at)).collect()
}

/// All that a caller can do, on a damaged table: what is refused has changed nothing.
fn bear<P: Family>(mut table: Table<Memory>, root: Root<P>, near: &[P], random: &mut Rng) {
    for _ in 0..40 {
        let prefix = match random.choice(near) {
            Some(prefix) if random.bool() => *prefix,
            Some(prefix) => P::new(bits_of(*prefix), random.u8(0..=P::BITS)),
            None => random_prefix(random, Spread::Dense),
        };
        table.lookup(root, P::address(probe(random, near, Spread::Dense)));
        let before = root_words(&table, root);
        let usage = table.usage();
        let done = match random.bool() {
            true => table.insert(root, prefix, 512 + u32::from(prefix.length()), owner_length),
            false => table.remove(root, prefix, 0, owner_length),
        };
        if let Err(error) = done {
            assert!(matches!(error, Error::Corrupt(_) | Error::Quarantined | Error::Full), "{error}");
            assert_eq!(table.usage(), usage, "{error}");
            // New nodes are written where nothing reads: all that a look-up can reach is as it was.
            assert!(root_words(&table, root) == before, "{error}");
        }
        if random.u8(..4) == 0 {
            table.release();
        }
    }
    table.free(root);
    table.release();
    let usage = table.usage();
    assert!(usage.used <= usage.total && usage.quarantined == 0, "{usage:?}");
}

/// Adoption with an account, a list built beside, and the damaged one let go of: what an upgrade does.
fn mend<P: Family>(memory: &[u32], root: Root<P>, list: &[(P, u32)], probes: &[u128], model: &Model) -> usize {
    let copy: Memory = memory.iter().map(|word| AtomicU32::new(*word)).collect();
    let mut table = Table::new(copy);
    let total = table.usage().total;
    let damaged = table.adopt_what_is_whole(root);
    let used = table.usage().used;
    assert!((ROOT_LINES..=total).contains(&used));
    let fresh = match table.build(list) {
        Ok(fresh) => fresh,
        // The garbage led everywhere.
        Err(error) => {
            assert!(damaged > 0, "{error}");
            return damaged;
        }
    };
    let before = &memory[first_word(root.line())..first_word(root.line() + ROOT_LINES)];
    assert!(root_words(&table, root) == before, "packets go on by the damaged one");
    table.free(root);
    table.release();
    for bits in probes {
        assert_eq!(table.lookup(fresh, P::address(*bits)), model.lookup(*bits, P::BITS), "{bits:032x}");
    }
    // What is in use is the new table, to the line.
    let mut alone = Table::new(self::memory(total));
    alone.build(list).unwrap();
    assert_eq!(table.usage().used, alone.usage().used, "{damaged} damaged");
    table.free(fresh);
    table.release();
    assert_eq!(table.usage().used, 0);
    damaged
}

fn stray_words_of(table: &Table<Memory>, root: u32, random: &mut Rng) -> u32 {
    let total = (table.memory.len() / LINE_WORDS) as u32;
    let line = match random.u8(..6) {
        0 => root,
        1 => random.u32(total..total + 40),
        2 => LINE_MASK - random.u32(..3),
        3 => total - 1 - random.u32(..20),
        _ => random.u32(ROOT_LINES..total),
    };
    let kind = *random.choice(&[NODE, NODE | COMPRESSED, NODE | PATH, NODE | PATH | COMPRESSED, 0, 1 << 28]).unwrap();
    match random.u8(..8) {
        0 => u32::MAX,
        1 => random.u32(..),
        2 => random.u32(..64),
        _ => kind | line,
    }
}

fn any_word_may_be_anything<P: Family>() {
    let mut random = Rng::with_seed(6);
    for round in 0..times(12, 5_000, 3) {
        let spread = if random.bool() { Spread::Dense } else { Spread::Sparse };
        let mut model = Model::new();
        let prefixes: Vec<P> = (0..random.usize(1..60)).map(|_| random_prefix(&mut random, spread)).collect();
        prefixes.iter().for_each(|prefix| {
            model.insert(*prefix);
        });
        let list = model.sorted::<P>();
        let mut table = Table::new(memory(3 * ROOT_LINES));
        let root = table.build(&list).unwrap();
        let used = table.usage().used;
        for _ in 0..random.usize(1..8) {
            // Where an address of the list leads, and any word of the nodes.
            let at = match random.bool() {
                true => first_word(root.line()) + (bits_of(*random.choice(&prefixes).unwrap()) >> 112) as usize,
                false => random.usize(first_word(ROOT_LINES)..first_word(used + 2)),
            };
            let word = stray_words_of(&table, root.line(), &mut random);
            store(&table, at, word);
        }
        let damaged = copied(&table.memory);
        let probes: Vec<u128> = (0..50).map(|_| probe(&mut random, &prefixes, spread)).collect();
        let found = mend(&damaged, root, &list, &probes, &model);
        if round % 100 == 0 {
            println!("round {round}: {found} damaged");
        }
        // One that the writer itself had built, damaged behind its back; and one that was adopted so.
        bear(table, root, &prefixes, &mut random);
        let mut table = Table::new(damaged.into_iter().map(AtomicU32::new).collect::<Memory>());
        table.adopt_what_is_whole(root);
        bear(table, root, &prefixes, &mut random);
    }
}

#[test]
fn no_word_of_a_table_makes_an_edit_panic() {
    any_word_may_be_anything::<Ipv4Net>();
    any_word_may_be_anything::<Ipv6Net>();
}

/// What the tables of an upgraded process look like: two writers, each with its own view of what is free.
fn two_writers<P: Family>() {
    let mut random = Rng::with_seed(7);
    for round in 0..times(6, 300, 1) {
        let shared = memory(2 * ROOT_LINES + 2000);
        let mut first = Table::new(shared);
        let root = first.build::<P>(&[]).unwrap();
        let prefixes: Vec<P> = (0..200).map(|_| random_prefix(&mut random, Spread::Dense)).collect();
        for prefix in &prefixes[..50] {
            first.insert(root, *prefix, 256 + u32::from(prefix.length()), owner_length).unwrap();
        }
        // The second takes the tables over, while the first goes on.
        let mut second = Table::new(std::mem::take(&mut first.memory));
        second.adopt(root).unwrap();
        let mut refused = 0;
        for edit in 0..400 {
            let prefix = *random.choice(&prefixes).unwrap();
            let leaf = 256 + u32::from(prefix.length());
            if edit % 2 == 0 {
                std::mem::swap(&mut first.memory, &mut second.memory);
            }
            let writer = if edit % 2 == 0 { &mut first } else { &mut second };
            let done = match random.bool() {
                true => writer.insert(root, prefix, leaf, owner_length),
                false => writer.remove(root, prefix, 0, owner_length),
            };
            refused += usize::from(done.is_err());
            if random.u8(..3) == 0 {
                writer.release();
            }
            if edit % 2 == 0 {
                std::mem::swap(&mut first.memory, &mut second.memory);
            }
        }
        let mut model = Model::new();
        prefixes.iter().for_each(|prefix| {
            model.insert(*prefix);
        });
        let list = model.sorted::<P>();
        let probes: Vec<u128> = (0..200).map(|_| probe(&mut random, &prefixes, Spread::Dense)).collect();
        let damaged = mend(&copied(&second.memory), root, &list, &probes, &model);
        println!("round {round}: {refused} edits of 400 refused, {damaged} damaged");
        first.memory = copied(&second.memory).into_iter().map(AtomicU32::new).collect();
        bear(first, root, &prefixes, &mut random);
        bear(second, root, &prefixes, &mut random);
    }
}

#[test]
fn two_writers_damage_a_table_and_the_next_one_mends_it() {
    two_writers::<Ipv4Net>();
    two_writers::<Ipv6Net>();
}

/// A node that is its own child: without a bound on the depth, an edit that covers it never ends.
fn a_circle<P: Family>() {
    let (mut table, root, at) = small::<P>();
    let node = load(&table, at);
    let start = first_word(node & LINE_MASK);
    // Whatever shape it has, each word of its line leads back to it.
    for kind in [NODE | COMPRESSED, NODE, NODE | PATH] {
        let word = kind | node & LINE_MASK;
        store(&table, at, word);
        if kind == NODE | PATH {
            store(&table, start + 2, 1);
        } else if kind == NODE | COMPRESSED {
            // One run, of all slots.
            (0..8).for_each(|at| store(&table, start + at, u32::from(at == 0)));
            store(&table, start + 8, 0x0101_0100);
        }
        if kind == NODE {
            (0..256).for_each(|at| store(&table, start + at, word));
        }
        store(&table, start + 3, if kind == NODE | COMPRESSED { 0 } else { word });
        store(&table, start + 9, word);
        let all = P::new(0, 0);
        assert!(matches!(table.insert(root, all, 256, owner_length), Err(Error::Corrupt(_))), "{kind:x}");
        assert!(matches!(table.remove(root, all, 0, owner_length), Err(Error::Corrupt(_))), "{kind:x}");
        table.lookup(root, P::address(if P::BITS == 32 { 0x0a01_0203 << 96 } else { 0x2001_0db8 << 96 }));
        let mut adopted = Table::new(copied(&table.memory).into_iter().map(AtomicU32::new).collect::<Memory>());
        assert!(adopted.adopt_what_is_whole(root) > 0, "{kind:x}");
        assert!(matches!(adopted.insert(root, all, 256, owner_length), Err(Error::Corrupt(_))));
        adopted.free(root);
    }
    table.free(root);
    table.release();
}

#[test]
fn a_node_that_leads_to_itself_is_found_out() {
    a_circle::<Ipv4Net>();
    a_circle::<Ipv6Net>();
}

/// Each row: a word behind the root, what is wrong with it.
#[test]
fn each_kind_of_broken_node_is_refused_and_leaves_the_table_as_it_is() {
    let beyond = 4 * ROOT_LINES;
    let rows = [
        (NODE | beyond, "a flat node beyond the memory"),
        (NODE | (beyond - 1), "a flat node that the memory ends in"),
        (NODE | COMPRESSED | (beyond - 1), "a node of lines that nobody took"),
        (NODE | COMPRESSED | beyond, "a compressed node beyond the memory"),
        (NODE | PATH | beyond, "a path beyond the memory"),
        (NODE | PATH | (beyond - 1), "a path nobody wrote"),
        (NODE | LINE_MASK, "the last line that a word can name"),
        (NODE, "the root as its own node"),
    ];
    fn refuse<P: Family>(word: u32, what: &str, inside: P) {
        let (mut table, root, at) = small::<P>();
        store(&table, at, word);
        let before = copied(&table.memory);
        let usage = table.usage();
        for prefix in [inside, P::new(0, 0)] {
            for result in [
                table.insert(root, prefix, 256 + u32::from(prefix.length()), owner_length),
                table.remove(root, prefix, 0, owner_length),
            ] {
                assert!(matches!(result, Err(Error::Corrupt(_))), "{what}: {result:?}");
            }
        }
        assert!(copied(&table.memory) == before, "{what}");
        assert_eq!(table.usage(), usage, "{what}");
        table.lookup(root, P::address(bits_of(inside)));
        // What is beside it still can be changed.
        table.insert(root, P::new(0x7777 << 112, 20), 256 + 20, owner_length).unwrap();
        table.free(root);
        table.release();
    }
    for (word, what) in rows {
        refuse(word, what, "10.1.2.3/32".parse::<Ipv4Net>().unwrap());
        refuse(word, what, "2001:db8:1:2::1/128".parse::<Ipv6Net>().unwrap());
    }
}

#[test]
fn two_slots_that_lead_to_one_node_are_damage() {
    let host = |n: u32| Ipv4Net::new_assert((n << 16 | 0x0101).into(), 32);
    let mut table = Table::new(memory(2 * ROOT_LINES + 64));
    let list: Vec<_> = (0..4).map(|n| (host(n), 256 + 32)).collect();
    let root = table.build(&list).unwrap();
    let used = table.usage().used;
    store(&table, first_word(root.line()) + 2, load(&table, first_word(root.line()) + 1));
    let before = copied(&table.memory);
    // An edit of both would let go of its node twice.
    let both: Ipv4Net = "0.0.0.0/13".parse().unwrap();
    let covering = |table: &mut Table<Memory>| table.remove(root, both, 0, |leaf| if leaf == 288 { 13 } else { 0 });
    assert!(matches!(covering(&mut table), Err(Error::Corrupt(_))));
    assert!(copied(&table.memory) == before);
    assert_eq!(table.usage().used, used);

    let mut adopted = Table::new(before.iter().map(|word| AtomicU32::new(*word)).collect::<Memory>());
    assert_eq!(adopted.adopt_what_is_whole(root), 2, "the node, and the one below it");
    assert_eq!(adopted.usage().used, used - 2, "the lines of the node that nothing leads to are free");
    let fresh = adopted.build(&list).unwrap();
    adopted.free(root);
    adopted.release();
    assert_eq!(adopted.usage().used, used);
    assert!((0..4).all(|n| adopted.lookup(fresh, host(n).addr()) == 256 + 32));
}

#[test]
fn a_root_that_is_nowhere_is_one_damage() {
    let (table, root, _) = small::<Ipv4Net>();
    let whole = copied(&table.memory);
    let open = || Table::new(whole.iter().map(|word| AtomicU32::new(*word)).collect::<Memory>());
    for line in [root.line() + 1, 4 * ROOT_LINES, u32::MAX] {
        let mut table = open();
        let nowhere = Root::<Ipv4Net>::at(line);
        assert!(table.adopt_what_is_whole(nowhere) > 0, "{line}");
        assert_eq!(table.lookup(nowhere, [10, 1, 2, 3].into()), table.lookup(nowhere, [10, 1, 2, 3].into()));
        assert!(table.insert(nowhere, "10.0.0.0/8".parse().unwrap(), 264, owner_length).is_err(), "{line}");
        let fresh = table.build::<Ipv4Net>(&[]).unwrap();
        table.free(nowhere);
        table.release();
        assert_eq!(table.usage().used, ROOT_LINES, "{line}");
        assert_eq!(table.lookup(fresh, [10, 1, 2, 3].into()), 0);
    }
    // Twice the same root, as of two lists.
    let mut table = open();
    assert_eq!((table.adopt_what_is_whole(root), table.adopt_what_is_whole(root) > 0), (0, true));
}

#[test]
fn what_was_not_taken_cannot_be_given_back() {
    let (mut table, root, _) = small::<Ipv4Net>();
    let usage = table.usage();
    // A second root in the middle of the first: another process's idea of it.
    table.free(Root::<Ipv4Net>::at(root.line() + 16));
    table.free(Root::<Ipv6Net>::at(3 * ROOT_LINES));
    assert_eq!(table.usage(), usage);
    assert!(table.lookup(root, [10, 1, 2, 3].into()) != 0);
    // And twice.
    table.free(root);
    table.free(root);
    table.release();
    assert_eq!(table.usage().used, 0);
}
