//! How far the start of the guest is: told by the thread that starts it, asked by the one that answers meanwhile.

use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Longer than a disk may take to appear.
const PATIENCE: Duration = Duration::from_secs(25);

/// How far it is, and what went wrong.
#[derive(Debug, Default)]
pub(crate) struct Start {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    root: Root,
    /// The thread that answers is to end.
    over: bool,
    problems: Vec<String>,
}

/// The root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Root {
    #[default]
    Awaited,
    Entered,
    /// There will be none.
    Missing,
}

impl Start {
    /// Something went wrong.
    pub(crate) fn note(&self, problem: String) {
        self.lock().problems.push(problem);
    }

    /// What went wrong so far.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.lock().problems.clone()
    }

    /// The root file system is entered.
    pub(crate) fn enter(&self) {
        self.set(Root::Entered);
    }

    /// The guest cannot be started.
    pub(crate) fn fail(&self) {
        self.set(Root::Missing);
    }

    /// Whether the root file system is entered.
    pub(crate) fn has_root(&self) -> bool {
        self.lock().root == Root::Entered
    }

    /// The answering thread is to end.
    pub(crate) fn end(&self) {
        self.lock().over = true;
    }

    /// Whether it is.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Waits until the root file system is entered.
    pub(crate) fn wait_for_root(&self) -> io::Result<()> {
        let awaited = |state: &mut State| state.root == Root::Awaited;
        let waited = self.changed.wait_timeout_while(self.lock(), PATIENCE, awaited);
        match waited.unwrap_or_else(PoisonError::into_inner).0.root {
            Root::Entered => Ok(()),
            Root::Awaited => Err(io::Error::other("the guest's disks are not there yet")),
            Root::Missing => Err(io::Error::other("the guest was not started")),
        }
    }

    fn set(&self, root: Root) {
        self.lock().root = root;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[test]
    fn whoever_needs_the_root_waits_for_it_and_no_longer_than_it_may_come() {
        for (entered, outcome) in [(true, None), (false, Some("the guest was not started"))] {
            let start = Arc::new(Start::default());
            let waiting = thread::spawn({
                let start = start.clone();
                move || start.wait_for_root().map_err(|error| error.to_string())
            });
            if entered {
                start.enter()
            } else {
                start.fail()
            }
            assert_eq!(waiting.join().unwrap().err().as_deref(), outcome);
        }
    }

    #[test]
    fn problems_are_kept_in_their_order() {
        let start = Start::default();
        start.note("first".into());
        start.note("second".into());
        assert_eq!(start.problems(), ["first", "second"]);
        assert!(!start.is_over());
        start.end();
        assert!(start.is_over());
    }
}
