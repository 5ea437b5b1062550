//! Times. Cores never read a clock: they are handed one of these.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(u64);

impl Timestamp {
    /// From milliseconds since the epoch.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the epoch.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// This time and a duration later, saturating.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero if it is not after.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A hybrid logical clock reading (Kulkarni et al., 2014): wall time in milliseconds, then a counter for entries that
/// share it. Greater than every reading that its author had seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hlc {
    /// Wall-clock part.
    pub wall: Timestamp,
    /// Counter among readings of the same `wall`.
    pub counter: u32,
}

impl Hlc {
    /// The next reading at wall time `now` by someone who has seen `self`.
    #[must_use]
    pub fn next(self, now: Timestamp) -> Self {
        if now > self.wall {
            Self { wall: now, counter: 0 }
        } else {
            match self.counter.checked_add(1) {
                Some(counter) => Self { wall: self.wall, counter },
                None => Self { wall: Timestamp(self.wall.0.saturating_add(1)), counter: 0 },
            }
        }
    }
}

impl Default for Hlc {
    fn default() -> Self {
        Self { wall: Timestamp(0), counter: 0 }
    }
}

impl fmt::Debug for Hlc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.wall.0, self.counter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_never_runs_backwards() {
        let seen = Hlc { wall: Timestamp::from_millis(100), counter: 3 };
        assert!(seen.next(Timestamp::from_millis(50)) > seen);
        assert!(seen.next(Timestamp::from_millis(100)) > seen);
        assert_eq!(seen.next(Timestamp::from_millis(101)), Hlc { wall: Timestamp::from_millis(101), counter: 0 });
        let last = Hlc { wall: Timestamp::from_millis(100), counter: u32::MAX };
        assert!(last.next(Timestamp::from_millis(1)) > last);
    }
}
