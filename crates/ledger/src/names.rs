//! Names in use, and the next free one.

use std::{
    collections::HashMap,
    fmt::{Display, Write as _},
    hash::Hash,
    str::FromStr,
};

/// Length of a DNS label (RFC 1035).
const LONGEST: usize = 63;

/// Who bears which name.
pub(crate) struct Names<N, I> {
    holders: HashMap<N, I>,
    /// The last suffix given to a taken name, so that the next is found at once however often it is asked for.
    suffixes: HashMap<N, u32>,
}

impl<N, I> Default for Names<N, I> {
    fn default() -> Self {
        Self { holders: HashMap::new(), suffixes: HashMap::new() }
    }
}

impl<N: Clone + Eq + Hash + FromStr + Display, I: PartialEq> Names<N, I> {
    /// Whether somebody else bears the name.
    pub(crate) fn is_taken_from(&self, holder: &I, name: &N) -> bool {
        self.holders.get(name).is_some_and(|known| known != holder)
    }

    /// Gives the name.
    pub(crate) fn give(&mut self, name: N, holder: I) {
        self.holders.insert(name, holder);
    }

    /// Gives the name, or if it is taken the first free one of `name-2`, `name-3`, and so on.
    pub(crate) fn give_free(&mut self, name: &N, holder: I) -> N {
        let mut free = name.clone();
        while self.holders.contains_key(&free) {
            let suffix = self.suffixes.entry(name.clone()).or_insert(1);
            *suffix += 1;
            free = suffixed(name, *suffix);
        }
        self.holders.insert(free.clone(), holder);
        free
    }

    /// Frees a name if it is still the holder's: it may have passed on since.
    pub(crate) fn free(&mut self, name: &N, holder: &I) {
        if self.holders.get(name) == Some(holder) {
            self.holders.remove(name);
        }
    }
}

fn suffixed<N: Clone + FromStr + Display>(name: &N, number: u32) -> N {
    let (mut text, mut suffix) = (name.to_string(), String::new());
    // Writing to a string does not fail.
    let _ = write!(suffix, "-{number}");
    text.truncate(LONGEST - suffix.len());
    // The name of a name and a number is a name.
    format!("{}{suffix}", text.trim_end_matches('-')).parse().unwrap_or_else(|_| name.clone())
}

#[cfg(test)]
mod tests {
    use clan_types::MachineName;

    use super::*;

    #[test]
    fn a_taken_name_gets_a_number_and_stays_a_name() {
        let mut names = Names::<MachineName, u32>::default();
        let nas: MachineName = "nas".parse().unwrap();
        let given: Vec<_> = (0..3).map(|n| names.give_free(&nas, n).to_string()).collect();
        assert_eq!(given, ["nas", "nas-2", "nas-3"]);
        names.free(&nas, &1);
        assert!(names.is_taken_from(&1, &nas), "it is not theirs to free");
        names.free(&nas, &0);
        assert_eq!(names.give_free(&nas, 9).as_str(), "nas");
        let long: MachineName = format!("{}-{}", "a".repeat(60), "b".repeat(2)).parse().unwrap();
        names.give(long.clone(), 1);
        assert_eq!(names.give_free(&long, 2).to_string(), format!("{}-2", "a".repeat(60)));
        assert_eq!(names.give_free(&long, 3).as_str().len(), 62);
    }
}
