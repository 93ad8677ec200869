//! Checksums as every program updates them (RFC 1624) against sums over whole messages. Traps L1 and L2: a UDP checksum of
//! zero, and the end-around carry.

mod common;

use fastrand::Rng;
use xdpkit_lab::{
    bench::{ChecksumAnswer, ChecksumCase, ChecksumProbe},
    frame::checksum,
};

/// Words at the edges of one's complement arithmetic.
const EDGES: [u16; 10] = [0, 1, 0x00ff, 0x0100, 0x7fff, 0x8000, 0xfeff, 0xff00, 0xfffe, 0xffff];

/// A message of 16 bytes that change, and two that do not: never all zeroes, as no packet with a header is.
fn message(bytes: &[u8; 16], rest: u16) -> Vec<u8> {
    [&bytes[..], &rest.to_be_bytes()].concat()
}

/// The first bytes of one, the others of the other.
fn spliced(after: &[u8; 16], count: usize, before: &[u8; 16]) -> [u8; 16] {
    let mut bytes = *before;
    bytes[..count].copy_from_slice(&after[..count]);
    bytes
}

struct Case {
    asked: ChecksumCase,
    rest: u16,
}

impl Case {
    fn new(before: [u8; 16], after: [u8; 16], rest: u16, header: [u8; 20]) -> Self {
        let rest = rest.max(1);
        let check = checksum(&message(&before, rest)).to_be_bytes();
        Self { asked: ChecksumCase { before, after, check, header }, rest }
    }

    fn random(random: &mut Rng) -> Self {
        let mut words = || -> [u8; 16] {
            let word = |_| if random.bool() { random.u16(..) } else { *random.choice(&EDGES[..]).unwrap() };
            let words: [u16; 8] = std::array::from_fn(word);
            let mut bytes = [0; 16];
            bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = words[at / 2].to_be_bytes()[at % 2]);
            bytes
        };
        let (before, after) = (words(), words());
        // For every second one, the word that makes its checksum 0 or nearly so, before or after.
        let rest = match random.u8(..4) {
            0 => checksum(&before).wrapping_add(random.u16(..3)).wrapping_sub(1),
            1 => checksum(&spliced(&after, *random.choice(&[2, 4, 10, 16][..]).unwrap(), &before)),
            _ => random.u16(..),
        };
        let mut header: [u8; 20] = std::array::from_fn(|_| random.u8(..));
        header[0] = 0x45;
        header[8] = random.u8(2..);
        if random.bool() {
            // The identification that makes its checksum one of the edges.
            header[4..6].fill(0);
            header[10..12].fill(0);
            let wanted = !random.choice(&EDGES[..]).unwrap();
            let identification = !checksum(&[checksum(&header), wanted].map(u16::to_be_bytes).concat());
            header[4..6].copy_from_slice(&identification.to_be_bytes());
        }
        header[10..12].fill(0);
        let right = checksum(&header).to_be_bytes();
        header[10..12].copy_from_slice(&right);
        Self::new(before, after, rest, header)
    }

    /// The answer by sums over the whole.
    fn right(&self) -> ChecksumAnswer {
        let ChecksumCase { before, after, check, header } = self.asked;
        let changed = |count| checksum(&message(&spliced(&after, count, &before), self.rest)).to_be_bytes();
        let udp = match (check, changed(10)) {
            ([0, 0], _) => [0, 0],
            (_, [0, 0]) => [0xff, 0xff],
            (_, sum) => sum,
        };
        let mut next = header;
        next[8] -= 1;
        next[10..12].fill(0);
        let sum = checksum(&next).to_be_bytes();
        next[10..12].copy_from_slice(&sum);
        ChecksumAnswer {
            changed2: changed(2),
            changed4: changed(4),
            changed16: changed(16),
            udp,
            of_header: [header[10], header[11]],
            header: next,
        }
    }
}

fn compare(probe: &ChecksumProbe, cases: &[Case]) {
    let asked: Vec<_> = cases.iter().map(|case| case.asked).collect();
    for (case, answer) in cases.iter().zip(probe.answers(&asked).unwrap()) {
        assert_eq!(answer, case.right(), "{:02x?}, and {:04x}", case.asked, case.rest);
    }
}

const HEADER: [u8; 20] = [0x45, 0, 0, 20, 0, 0, 0, 0, 2, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];

#[test]
fn l2_updated_checksums_are_those_of_the_whole_message() {
    let probe = ChecksumProbe::load().unwrap();
    let mut random = Rng::with_seed(1624);
    let (mut left, mut zeroes, mut minus_zeroes) = (common::times(100_000, 10_000_000, 8_000), 0, 0);
    while left > 0 {
        let cases: Vec<_> = (0..left.min(1 << 14)).map(|_| Case::random(&mut random)).collect();
        compare(&probe, &cases);
        left -= cases.len();
        zeroes += cases.iter().filter(|case| case.right().changed16 == [0, 0]).count();
        minus_zeroes += cases.iter().filter(|case| case.right().udp == [0xff, 0xff]).count();
    }
    assert!(zeroes > 100 && minus_zeroes > 100, "the edges were met {zeroes} and {minus_zeroes} times");
}

#[test]
fn l2_every_pair_of_edges_and_every_word_beside_them_is_right() {
    let probe = ChecksumProbe::load().unwrap();
    let step = common::times(7, 1, 1009);
    let word = |word: u16| -> [u8; 16] { std::array::from_fn(|at| word.to_be_bytes()[at % 2]) };
    for edge in EDGES {
        let cases: Vec<_> = (0..=u16::MAX)
            .step_by(step)
            .chain(EDGES)
            .flat_map(|other| {
                let rest = checksum(&word(edge));
                [Case::new(word(edge), word(other), rest, HEADER), Case::new(word(other), word(edge), 0xffff, HEADER)]
            })
            .collect();
        // The header's own checksum is 0 here, and the program does not believe it.
        let asked: Vec<_> = cases.iter().map(|case| case.asked).collect();
        let of_header = checksum(&HEADER).to_be_bytes();
        for (case, answer) in cases.iter().zip(probe.answers(&asked).unwrap()) {
            let right = case.right();
            assert_eq!(
                (answer.changed2, answer.changed4, answer.changed16, answer.udp, answer.of_header),
                (right.changed2, right.changed4, right.changed16, right.udp, of_header),
                "{:02x?}, and {:04x}",
                case.asked,
                case.rest
            );
        }
    }
}

#[test]
fn l1_no_udp_checksum_stays_none_and_a_computed_zero_is_sent_as_ones() {
    let probe = ChecksumProbe::load().unwrap();
    let mut random = Rng::with_seed(768);
    let mut cases: Vec<_> = (0..20_000).map(|_| Case::random(&mut random)).collect();
    for case in &mut cases {
        case.asked.check = [0, 0];
    }
    let asked: Vec<_> = cases.iter().map(|case| case.asked).collect();
    assert!(probe.answers(&asked).unwrap().iter().all(|answer| answer.udp == [0, 0]));
    // What the sender has computed as zero has come as ones; whatever it becomes, it is never "none".
    for case in &mut cases {
        case.rest = checksum(&case.asked.before).max(1);
        case.asked.check = [0xff, 0xff];
        // Every second one becomes zero again.
        if random.bool() {
            case.asked.after = case.asked.before;
            case.asked.after[..8].rotate_left(4);
        }
    }
    cases.retain(|case| checksum(&message(&case.asked.before, case.rest)) == 0);
    assert!(cases.len() > 19_000);
    let asked: Vec<_> = cases.iter().map(|case| case.asked).collect();
    for (case, answer) in cases.iter().zip(probe.answers(&asked).unwrap()) {
        assert_ne!(answer.udp, [0, 0]);
        assert_eq!(answer.udp, case.right().udp, "{:02x?}, and {:04x}", case.asked, case.rest);
    }
}

#[test]
fn l3_what_was_wrong_before_is_as_wrong_after() {
    // A sum that nobody has finished yet, or a broken one: its distance from the right one is kept, for the receiver to see.
    let probe = ChecksumProbe::load().unwrap();
    let mut random = Rng::with_seed(3);
    let mut cases: Vec<_> = (0..common::times(30_000, 1_000_000, 4_000)).map(|_| Case::random(&mut random)).collect();
    for case in &mut cases {
        case.asked.check = random.u16(..).to_be_bytes();
    }
    let asked: Vec<_> = cases.iter().map(|case| case.asked).collect();
    // In one's complement, 0 and 0xffff are the same distance.
    let distance = |one: [u8; 2], other: [u8; 2]| {
        (u32::from(u16::from_be_bytes(one)) + 0xffff - u32::from(u16::from_be_bytes(other))) % 0xffff
    };
    for (case, answer) in cases.iter().zip(probe.answers(&asked).unwrap()) {
        let right = checksum(&message(&case.asked.before, case.rest)).to_be_bytes();
        assert_eq!(
            distance(answer.changed16, case.right().changed16),
            distance(case.asked.check, right),
            "{:02x?}, and {:04x}",
            case.asked,
            case.rest
        );
    }
}
