//! Choices that nobody can foresee, from the caller's seed.

/// BLAKE3 keyed with the seed, over a counter.
pub(crate) struct Rng {
    seed: [u8; 32],
    counter: u64,
}

impl Rng {
    pub(crate) fn new(seed: [u8; 32]) -> Self {
        Self { seed, counter: 0 }
    }

    /// A number below `end`, which is at least 1.
    fn below(&mut self, end: usize) -> usize {
        self.counter = self.counter.wrapping_add(1);
        let hash = blake3::keyed_hash(&self.seed, &self.counter.to_le_bytes());
        let mut word = [0; 8];
        word.copy_from_slice(&hash.as_bytes()[..8]);
        // The remainder favours small numbers by less than 2^-50: nothing hangs on it.
        usize::try_from(u64::from_le_bytes(word) % (end as u64)).unwrap_or(0)
    }

    /// So many of `all`, or all of them if they are fewer.
    pub(crate) fn choose<T>(&mut self, mut all: Vec<T>, count: usize) -> Vec<T> {
        for place in 0..count.min(all.len().saturating_sub(1)) {
            let other = place + self.below(all.len() - place);
            all.swap(place, other);
        }
        all.truncate(count);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_choice_has_no_duplicates_and_reaches_everybody_in_time() {
        let mut rng = Rng::new([1; 32]);
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            let chosen = rng.choose((0..20).collect(), 4);
            assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), 4);
            seen.extend(chosen);
        }
        assert_eq!(seen.len(), 20);
        assert_eq!(rng.choose(vec![1, 2], 5).len(), 2);
        assert_eq!(rng.choose(Vec::<u8>::new(), 5).len(), 0);
    }
}
