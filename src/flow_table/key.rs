//! The secret, and what it makes of a number or of words: mirror of `flow_key` and `flow_hash`.

/// Words that can be hashed.
pub(crate) const HASH_WORDS: usize = 11;
pub(crate) const SECRET_WORDS: usize = 2 * HASH_WORDS + 2;
/// Numbers that exact keys are made of are below.
pub(crate) const NUMBER_END: u64 = 1 << 63;
/// Smaller keys have a meaning of their own.
pub(crate) const KEY_MIN: u64 = 2;

/// What only the table and this process know: without it, nobody can tell which flows share a line.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Secret([u64; SECRET_WORDS]);

impl Secret {
    /// Of random words.
    pub(crate) fn draw(mut random: impl FnMut() -> u64) -> Self {
        loop {
            let mut words: [u64; SECRET_WORDS] = std::array::from_fn(|_| random());
            // Only odd factors can be undone.
            words[1..4].iter_mut().for_each(|word| *word |= 1);
            let secret = Self(words);
            // No number may become a key that means something else.
            if (0..KEY_MIN).all(|key| secret.scrambled_from(key) >= NUMBER_END) {
                return secret;
            }
        }
    }

    /// One that an earlier process has drawn; `None` when the words are no secret.
    pub(crate) fn of_words(words: [u64; SECRET_WORDS]) -> Option<Self> {
        let secret = Self(words);
        let odd = words[1..4].iter().all(|word| word & 1 == 1);
        (odd && (0..KEY_MIN).all(|key| secret.scrambled_from(key) >= NUMBER_END)).then_some(secret)
    }

    pub(crate) fn words(&self) -> [u64; SECRET_WORDS] {
        self.0
    }

    /// The exact key of a number below [`NUMBER_END`].
    pub(crate) fn key(&self, number: u64) -> u64 {
        let mut key = number ^ self.0[0];
        for factor in &self.0[1..4] {
            key = key.wrapping_mul(*factor);
            key ^= key >> 32;
        }
        key
    }

    /// The number that an exact key was made of; `None` when it is a tag, or of none that is allowed.
    pub(crate) fn number(&self, key: u64) -> Option<u64> {
        Some(self.scrambled_from(key)).filter(|number| *number < NUMBER_END)
    }

    /// The 64-bit number that has this key: the inverse of [`Secret::key`].
    pub(crate) fn scrambled_from(&self, key: u64) -> u64 {
        let mut number = key;
        for factor in self.0[1..4].iter().rev() {
            number ^= number >> 32;
            number = number.wrapping_mul(inverse(*factor));
        }
        number ^ self.0[0]
    }

    /// The tag of words, at most [`HASH_WORDS`].
    pub(crate) fn hash(&self, words: &[u32]) -> u64 {
        let mut halves = [self.0[2 * HASH_WORDS], self.0[2 * HASH_WORDS + 1]];
        for (word, factors) in words.iter().zip(self.0.chunks_exact(2)) {
            for (half, factor) in halves.iter_mut().zip(factors) {
                *half = half.wrapping_add(u64::from(*word).wrapping_mul(*factor));
            }
        }
        let tag = halves[0] >> 32 << 32 | halves[1] >> 32;
        if tag < KEY_MIN { tag + KEY_MIN } else { tag }
    }
}

/// Nobody wants it in a log.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Of an odd number, modulo 2^64. Each step doubles the bits that are right, three at first.
fn inverse(odd: u64) -> u64 {
    (0..5).fold(odd, |guess, _| guess.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(guess))))
}
