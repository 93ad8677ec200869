//! The table in plain memory against the model.

use std::sync::atomic::{AtomicU32, Ordering};

use fastrand::Rng;
use ipnet::{Ipv4Net, Ipv6Net};
use xdpkit_lab::counts::times;

use super::{
    Error, LINE_WORDS, ROOT_LINES, Root, Table,
    model::{Family, Model, Spread, bits_of, owner_length, probe, random_bits, random_prefix},
};

type Memory = Vec<AtomicU32>;

fn table(lines: u32) -> Table<Memory> {
    // What was there before must not matter.
    Table::new((0..lines as usize * LINE_WORDS).map(|_| AtomicU32::new(0xdead_beef)).collect())
}

fn agree<P: Family>(table: &Table<Memory>, root: Root<P>, model: &Model, bits: u128) {
    let (found, wanted) = (table.lookup(root, P::address(bits)), model.lookup(bits, P::BITS));
    assert_eq!(found, wanted, "{bits:032x}: /{} instead of /{}", owner_length(found), owner_length(wanted));
}

fn builds_what_inserts_build<P: Family>() {
    let mut random = Rng::with_seed(1);
    for (count, spread) in
        [(0, Spread::Sparse), (1, Spread::Sparse), (10, Spread::Dense), (1000, Spread::Sparse), (3000, Spread::Dense)]
    {
        let mut model = Model::new();
        let prefixes: Vec<P> = (0..count).map(|_| random_prefix(&mut random, spread)).collect();
        let mut table = table(1 << 18);
        let empty = table.lines.free();
        let edited = table.build::<P>(&[]).unwrap();
        for prefix in &prefixes {
            let leaf = model.insert(*prefix);
            table.insert(edited, *prefix, leaf, owner_length).unwrap();
        }
        let built = table.build(&model.sorted::<P>()).unwrap();
        for _ in 0..2_000 {
            let bits = probe(&mut random, &prefixes, spread);
            agree(&table, built, &model, bits);
            agree(&table, edited, &model, bits);
        }
        table.free(built);
        table.free(edited);
        assert_eq!(table.usage().used, 0);
        table.release();
        assert_eq!(table.lines.free(), empty, "{count} {spread:?}");
    }
}

fn survives_edits<P: Family>() {
    let mut random = Rng::with_seed(2);
    for spread in [Spread::Dense, Spread::Sparse] {
        let (mut model, mut table) = (Model::new(), table(1 << 18));
        let root = table.build::<P>(&[]).unwrap();
        let mut prefixes: Vec<P> = Vec::new();
        let edits = times(3_000, 100_000, 2_000);
        for edit in 0..edits {
            // It grows to some thousands of prefixes, shrinks, grows again.
            let growing = (edit * 4 / edits).is_multiple_of(2);
            if prefixes.is_empty() || random.u8(..10) < if growing { 7 } else { 2 } {
                let prefix = random_prefix(&mut random, spread);
                let leaf = model.insert(prefix);
                table.insert(root, prefix, leaf, owner_length).unwrap();
                prefixes.push(prefix);
            } else {
                let prefix = prefixes.swap_remove(random.usize(..prefixes.len()));
                if model.remove(prefix) {
                    table.remove(root, prefix, model.covering(prefix), owner_length).unwrap();
                }
                agree(&table, root, &model, bits_of(prefix));
            }
            for _ in 0..4 {
                agree(&table, root, &model, probe(&mut random, &prefixes, spread));
            }
            if edit % 1000 == 0 {
                let mut adopted = Table::new(Vec::new());
                std::mem::swap(&mut adopted.memory, &mut table.memory);
                adopted.lines = super::Lines::new(table.lines.total(), 0);
                adopted.adopt(root).unwrap();
                table.release();
                assert_eq!(adopted.lines, table.lines);
                table = adopted;
            }
        }
        for prefix in prefixes.drain(..) {
            if model.remove(prefix) {
                table.remove(root, prefix, model.covering(prefix), owner_length).unwrap();
            }
        }
        assert_eq!(table.usage().used, ROOT_LINES, "an empty table is a root");
        for _ in 0..1000 {
            assert_eq!(table.lookup(root, P::address(random_bits(&mut random, spread))), 0);
        }
        table.free(root);
        table.release();
        assert_eq!(table.lines, super::Lines::new(1 << 18, 0));
    }
}

#[test]
fn a_table_built_is_a_table_edited() {
    builds_what_inserts_build::<Ipv4Net>();
    builds_what_inserts_build::<Ipv6Net>();
}

#[test]
fn edits_keep_all_answers_right_and_leak_nothing() {
    survives_edits::<Ipv4Net>();
    survives_edits::<Ipv6Net>();
}

fn ends_and_borders<P: Family>(texts: &[&str], cases: &[(&str, usize)]) {
    let mut prefixes: Vec<P> = texts.iter().map(|text| P::parse(text)).collect();
    prefixes.sort_unstable_by_key(|prefix| (prefix.octets(), prefix.length()));
    let with_leaf = |prefix: &P| (*prefix, 1 + texts.iter().position(|text| P::parse(text) == *prefix).unwrap() as u32);
    let list: Vec<(P, u32)> = prefixes.iter().map(with_leaf).collect();
    let mut table = table(3 * ROOT_LINES);
    let root = table.build(&list).unwrap();
    for (address, wanted) in cases {
        let found = table.lookup(root, P::address(bits_of(P::parse(&format!("{address}/{}", P::BITS)))));
        assert_eq!(found, *wanted as u32, "{address}");
    }
}

#[test]
fn the_longest_prefix_decides_from_the_first_bit_to_the_last() {
    ends_and_borders::<Ipv4Net>(
        &["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "128.0.0.0/1", "255.255.255.255/32"],
        &[
            ("0.0.0.0", 1),
            ("127.255.255.255", 1),
            ("128.0.0.0", 6),
            ("255.255.255.254", 6),
            ("255.255.255.255", 7),
            ("10.0.255.255", 2),
            ("10.1.0.0", 3),
            ("10.1.1.255", 3),
            ("10.1.2.0", 4),
            ("10.1.2.2", 4),
            ("10.1.2.3", 5),
            ("10.1.2.4", 4),
            ("10.1.3.0", 3),
            ("10.2.0.0", 2),
            ("11.0.0.0", 1),
        ],
    );
    ends_and_borders::<Ipv6Net>(
        &["2000::/3", "2001:db8::/32", "2001:db8::/33", "2001:db8:0:1::/64", "2001:db8::1/128", "::1/128"],
        &[
            ("::", 0),
            ("::1", 6),
            ("::2", 0),
            ("2000::", 1),
            ("3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1),
            ("4000::", 0),
            ("2001:db8::", 3),
            ("2001:db8::1", 5),
            ("2001:db8::2", 3),
            ("2001:db8:0:1::1", 4),
            ("2001:db8:8000::", 2),
            ("2001:db9::", 1),
        ],
    );
}

fn host(n: u32) -> Ipv4Net {
    // One a root slot: every host costs two nodes.
    Ipv4Net::new_assert((n << 16 | 0x0101).into(), 32)
}

#[test]
fn a_full_table_is_an_error_that_changes_nothing() {
    let mut table = table(ROOT_LINES + 16);
    let root = table.build::<Ipv4Net>(&[]).unwrap();
    let mut held = 0;
    while table.insert(root, host(held), 32, owner_length).is_ok() {
        held += 1;
    }
    assert_eq!(held, 8, "of 2 lines each");
    let before: Vec<u32> = table.memory.iter().map(|word| word.load(Ordering::Relaxed)).collect();
    let unchanged = |table: &Table<Memory>| {
        let now = table.memory.iter().map(|word| word.load(Ordering::Relaxed));
        assert!(now.zip(&before).all(|(now, before)| now == *before));
        assert_eq!(table.usage(), super::Usage { total: ROOT_LINES + 16, used: ROOT_LINES + 16, quarantined: 0 });
    };
    assert_eq!(table.insert(root, host(99), 32, owner_length), Err(Error::Full));
    unchanged(&table);
    assert_eq!(table.build(&[(host(1), 32)]), Err(Error::Full));
    unchanged(&table);

    // What only gives runs another leaf needs no room, nor does a removal; what cuts through a run does.
    let all: Ipv4Net = "0.0.0.0/0".parse().unwrap();
    table.insert(root, all, 256, owner_length).unwrap();
    assert_eq!(table.lookup(root, host(99).addr()), 256);
    assert_eq!(table.lookup(root, host(1).addr()), 32);
    let half = Ipv4Net::new_assert(host(1).addr(), 25).trunc();
    assert_eq!(table.insert(root, half, 256 + 25, owner_length), Err(Error::Full));
    table.remove(root, all, 0, owner_length).unwrap();
    table.remove(root, host(1), 0, owner_length).unwrap();
    assert_eq!(table.lookup(root, host(1).addr()), 0);
}

#[test]
fn a_build_that_does_not_fit_gives_everything_back() {
    let hosts: Vec<_> = (0..20).map(|n| (host(n), 32)).collect();
    let mut table = table(ROOT_LINES + 16);
    assert_eq!(table.build(&hosts), Err(Error::Full));
    assert_eq!(table.usage().used, 0);
    assert_eq!(table.usage().quarantined, 0);
    table.build(&hosts[..8]).unwrap();
}

#[test]
fn what_packets_may_read_is_not_reused_before_release() {
    let mut table = table(ROOT_LINES + 4);
    let root = table.build(&[(host(0), 32), (host(1), 32)]).unwrap();
    table.remove(root, host(0), 0, owner_length).unwrap();
    assert_eq!(table.usage().quarantined, 2);
    assert_eq!(table.lookup(root, host(0).addr()), 0);
    assert_eq!(table.insert(root, host(2), 32, owner_length), Err(Error::Quarantined));
    table.release();
    table.insert(root, host(2), 32, owner_length).unwrap();
    assert_eq!(table.lookup(root, host(2).addr()), 32);
}

#[test]
fn a_corrupt_table_is_not_adopted() {
    let mut table = table(ROOT_LINES + 64);
    let root = table.build(&[(host(0), 32), (host(1), 32)]).unwrap();
    let adopt = |table: &Table<Memory>| {
        let copy = table.memory.iter().map(|word| AtomicU32::new(word.load(Ordering::Relaxed)));
        Table::new(copy.collect::<Memory>()).adopt(root)
    };
    assert_eq!(adopt(&table), Ok(()));
    let words = table.words();
    let second = words.load(1);
    // Twice the same node, one beyond the memory, the root itself.
    for word in [words.load(0), super::node::NODE | 1 << 20, super::node::NODE] {
        words.store(1, word);
        assert!(matches!(adopt(&table), Err(Error::Corrupt(_))), "{word:x}");
    }
    words.store(1, second);
    assert_eq!(adopt(&table), Ok(()));
}

#[test]
#[should_panic(expected = "sorted")]
fn an_unsorted_list_is_a_mistake() {
    let _ = table(ROOT_LINES + 16).build(&[(host(1), 1), (host(0), 1)]);
}

/// Hosts and networks far from each other, as a list of addresses to block has them.
#[test]
fn sparse_prefixes_cost_few_lines() {
    let mut random = Rng::with_seed(4);
    for (length, most) in [(48, 1.5), (64, 1.5), (128, 2.5)] {
        let net = |_| (<Ipv6Net as Family>::new(random.u128(..) >> 3 | 1 << 125, length), 1);
        let mut list: Vec<(Ipv6Net, u32)> = (0..times(30_000, 100_000, 30_000)).map(net).collect();
        list.sort_unstable();
        list.dedup();
        let mut table = table(1 << 20);
        table.build(&list).unwrap();
        let lines = f64::from(table.usage().used - ROOT_LINES) / list.len() as f64;
        println!("/{length}: {lines:.2} lines a prefix");
        assert!(lines < most);
    }
}
