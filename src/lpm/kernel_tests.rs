//! The C look-up against the Rust look-up against the model: three readers, one table. These need root.

use std::{
    net::IpAddr,
    sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread,
};

use fastrand::Rng;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use xdpkit_lab::{bench::LpmProbe, counts::times, prefixes::Prefixes};

use super::{
    Error, Root, Table,
    model::{Family, Model, Spread, owner_length, probe, random_prefix},
};

/// A family as the probe's programs know it.
trait Probed: Family + Into<IpNet> + Send
where
    Self::Address: Into<IpAddr>,
{
    fn of(net: IpNet) -> Option<Self>;
}

impl Probed for Ipv4Net {
    fn of(net: IpNet) -> Option<Self> {
        if let IpNet::V4(net) = net { Some(net) } else { None }
    }
}

impl Probed for Ipv6Net {
    fn of(net: IpNet) -> Option<Self> {
        if let IpNet::V6(net) = net { Some(net) } else { None }
    }
}

/// In a full run a real table where one is at hand, whole.
fn prefixes<P: Probed>() -> Vec<P>
where
    P::Address: Into<IpAddr>,
{
    Prefixes::for_tests().unwrap().all().filter_map(P::of).take(times(40_000, usize::MAX, 40_000)).collect()
}

fn three_readers_agree<P: Probed>()
where
    P::Address: Into<IpAddr>,
{
    let mut random = Rng::with_seed(3);
    let mut prefixes: Vec<P> = prefixes();
    let mut model = Model::new();
    for prefix in &prefixes {
        model.insert(*prefix);
    }
    let mut lpm = LpmProbe::load(1 << 19, 1).unwrap();
    let mut table = Table::new(lpm.memory().unwrap());
    let root = table.build(&model.sorted::<P>()).unwrap();
    let roots = [root.line(), root.line()];
    lpm.set_roots(roots[0], roots[1]).unwrap();
    let probes = times(20_000, 1_000_000, 5_000);
    compare(&lpm, &table, root, &model, &prefixes, probes, &mut random);

    for _ in 0..times(1_000, 100_000, 200) {
        if random.bool() {
            let prefix: P = random_prefix(&mut random, Spread::Sparse);
            let leaf = model.insert(prefix);
            retried(&mut table, |table| table.insert(root, prefix, leaf, owner_length));
            prefixes.push(prefix);
        } else {
            let prefix = prefixes.swap_remove(random.usize(..prefixes.len()));
            if model.remove(prefix) {
                let covering = model.covering(prefix);
                retried(&mut table, |table| table.remove(root, prefix, covering, owner_length));
            }
        }
    }
    compare(&lpm, &table, root, &model, &prefixes, probes, &mut random);
}

/// Nobody reads the table meanwhile: no grace period is needed.
fn retried<M>(table: &mut Table<M>, change: impl Fn(&mut Table<M>) -> Result<(), Error>)
where
    M: AsRef<[AtomicU32]>,
{
    let changed = change(table).or_else(|error| match error {
        Error::Quarantined => {
            table.release();
            change(table)
        }
        other => Err(other),
    });
    changed.unwrap();
}

fn compare<P: Probed>(
    lpm: &LpmProbe,
    table: &Table<impl AsRef<[AtomicU32]>>,
    root: Root<P>,
    model: &Model,
    prefixes: &[P],
    probes: usize,
    random: &mut Rng,
) where
    P::Address: Into<IpAddr>,
{
    let bits: Vec<u128> = (0..probes).map(|_| probe(random, prefixes, Spread::Sparse)).collect();
    let addresses: Vec<IpAddr> = bits.iter().map(|bits| P::address(*bits).into()).collect();
    let answers = lpm.answers(&addresses).unwrap();
    let mut hits = 0;
    for ((bits, address), answer) in bits.iter().zip(&addresses).zip(&answers) {
        let wanted = model.lookup(*bits, P::BITS);
        assert_eq!(*answer, wanted, "{address} in C");
        assert_eq!(table.lookup(root, P::address(*bits)), wanted, "{address} in Rust");
        hits += usize::from(wanted != 0);
    }
    assert!(answers.len() == probes && hits > probes / 4);
    println!("{probes} probes, {hits} hits, {:?}", table.usage());
}

/// Tells the readers to end.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Prefixes come and go while two readers, one of them in the kernel, look up: each answer is one that was right
/// at some time, and lines are reused meanwhile.
fn changes_are_seen_whole<P: Probed>()
where
    P::Address: Into<IpAddr>,
{
    let mut random = Rng::with_seed(5);
    let mut kept = Model::new();
    let still: Vec<P> = (0..2000).map(|_| random_prefix(&mut random, Spread::Dense)).collect();
    for prefix in &still {
        kept.insert(*prefix);
    }
    let mut both = Model::continuing(&kept);
    let moving: Vec<P> = (0..500).map(|_| random_prefix(&mut random, Spread::Dense)).collect();
    let moving: Vec<(P, u32)> = moving.iter().map(|prefix| (*prefix, both.insert(*prefix))).collect();
    // Of the same prefix twice, the later leaf is the one that counts.
    let moving: Vec<(P, u32)> = moving
        .into_iter()
        .filter(|(prefix, leaf)| both.get(*prefix) == Some(*leaf) && kept.get(*prefix).is_none())
        .collect();

    let prefixes: Vec<P> = moving.iter().map(|(prefix, _)| *prefix).collect();
    let bits: Vec<u128> = (0..4096).map(|_| probe(&mut random, &prefixes, Spread::Dense)).collect();
    let addresses: Vec<IpAddr> = bits.iter().map(|bits| P::address(*bits).into()).collect();
    let allowed: Vec<Vec<u32>> = bits.iter().map(|bits| both.all_from(*bits, kept.lookup(*bits, P::BITS))).collect();
    let check = |reader: &str, answers: &mut dyn Iterator<Item = u32>| {
        for ((answer, allowed), address) in answers.zip(&allowed).zip(&addresses) {
            assert!(allowed.contains(&answer), "{address} in {reader}: {answer:x}, not one of {allowed:x?}");
        }
    };

    // Little room, so that lines are reused soon.
    let mut full = Table::new((0..1 << 20).map(|_| AtomicU32::new(0)).collect::<Vec<_>>());
    full.build(&both.sorted::<P>()).unwrap();
    let mut lpm = LpmProbe::load(full.usage().used + 256, 1).unwrap();
    let mut table = Table::new(lpm.memory().unwrap());
    let root = table.build(&kept.sorted::<P>()).unwrap();
    lpm.set_roots(root.line(), root.line()).unwrap();
    // A grace period is when every reader has let go once.
    let reading = RwLock::new(());
    let done = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (lpm, check, reading, done, rounds) = (&lpm, &check, &reading, &done, &rounds);
        let (addresses, bits) = (&addresses, &bits);
        // Even when this thread panics, which waits for the others first.
        let stop = Stop(done);
        let kernel = scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let guard = reading.read().unwrap();
                check("C", &mut lpm.answers(addresses).unwrap().into_iter());
                drop(guard);
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let view = Table::new(lpm.memory().unwrap());
        let rust = scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let guard = reading.read().unwrap();
                check("Rust", &mut bits.iter().map(|bits| view.lookup(root, P::address(*bits))));
                drop(guard);
            }
        });
        let mut model = kept;
        let mut periods = 0;
        while periods < 3 || rounds.load(Ordering::Relaxed) < times(20, 500, 2) {
            let (prefix, leaf) = *random.choice(&moving).unwrap();
            let present = model.get(prefix).is_some();
            let covering = model.covering(prefix);
            let change = |table: &mut Table<_>| match present {
                true => table.remove(root, prefix, covering, owner_length),
                false => table.insert(root, prefix, leaf, owner_length),
            };
            if let Err(error) = change(&mut table) {
                assert_eq!(error, Error::Quarantined);
                drop(reading.write().unwrap());
                table.release();
                change(&mut table).unwrap();
                periods += 1;
            }
            match present {
                true => assert!(model.remove(prefix)),
                false => model.set(prefix, leaf),
            }
            if kernel.is_finished() || rust.is_finished() {
                break;
            }
        }
        drop(stop);
    });
}

#[test]
fn every_look_up_sees_the_old_answer_or_the_new_one() {
    changes_are_seen_whole::<Ipv4Net>();
    changes_are_seen_whole::<Ipv6Net>();
}

#[test]
fn the_kernel_reads_what_was_written() {
    three_readers_agree::<Ipv4Net>();
    three_readers_agree::<Ipv6Net>();
}
