//! How much may pass: token buckets, each of which is one moment in time.

use std::time::Duration;

/// So many at once, and then one each `every`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) every: Duration,
    pub(super) burst: u32,
}

impl Rate {
    pub(super) const fn per_second(count: u32, burst: u32) -> Self {
        Self { every: Duration::from_nanos(1_000_000_000 / count as u64), burst }
    }
}

/// What is left of a [`Rate`], as the moment at which it will be full again; in the past when it is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Bucket {
    full_at: Duration,
}

impl Bucket {
    /// Whether `count` may pass now.
    pub(super) fn has(&self, rate: Rate, count: u32, now: Duration) -> bool {
        self.full_at.saturating_sub(now) + rate.every * count <= rate.every * rate.burst
    }

    /// Counts one that passes, if one may.
    pub(super) fn take(&mut self, rate: Rate, now: Duration) -> bool {
        let passes = self.has(rate, 1, now);
        if passes {
            self.full_at = self.full_at.max(now) + rate.every;
        }
        passes
    }

    /// When the next one may pass.
    pub(super) fn next(&self, rate: Rate) -> Duration {
        (self.full_at + rate.every).saturating_sub(rate.every * rate.burst)
    }

    pub(super) fn is_full(&self, now: Duration) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_more_passes_than_the_rate_says(
            count in 1u32..500,
            burst in 1u32..100,
            pauses in prop::collection::vec(0u64..50, 1..300),
        ) {
            let rate = Rate::per_second(count, burst);
            let mut bucket = Bucket::default();
            let (mut now, mut passed) = (Duration::ZERO, 0u32);
            for pause in pauses {
                now += Duration::from_millis(pause);
                passed += u32::from(bucket.take(rate, now));
                let most = burst + (now.as_nanos() / rate.every.as_nanos()) as u32;
                prop_assert!(passed <= most, "{passed} of {most}");
                prop_assert!(bucket.has(rate, 1, now) == (bucket.next(rate) <= now));
            }
            // Whoever waits gets their share.
            prop_assert!(bucket.take(rate, now + rate.every));
        }
    }
}
