//! Which pieces are missing, and who is fetching which.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use clan_wire::pieces::Pieces;
use tokio::sync::watch;

use crate::part::{Part, Wanted};

/// So many machines may be asked for the same piece.
const CLAIMS: u8 = 2;

/// The pieces of all files.
pub(crate) struct Pool {
    state: Mutex<State>,
    /// Held by the one who finds out what is here of a file.
    opening: Mutex<()>,
    /// Counts changes, so that whoever has nothing to do hears of them.
    changes: watch::Sender<u64>,
}

struct State {
    files: Vec<PoolFile>,
    /// Bytes that are here.
    here: u64,
    /// Pieces that each machine gave.
    taken: BTreeMap<String, u64>,
    /// Whether it has been told what is here of the files.
    told: bool,
}

struct PoolFile {
    wanted: Wanted,
    part: Option<Arc<Part>>,
    pieces: Vec<Piece>,
    /// Before this one nothing is untouched, if nothing is given back.
    next: usize,
    missing: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Piece {
    Here,
    /// Asked of so many.
    Missing(u8),
}

/// The right to fetch a piece; dropping it gives it back.
pub(crate) struct Claim {
    pool: Arc<Pool>,
    pub(crate) part: Arc<Part>,
    pub(crate) file: usize,
    pub(crate) index: usize,
}

impl State {
    fn progress(&self) -> (u64, u64) {
        (self.here, self.files.iter().map(|f| f.wanted.size).fold(0, u64::saturating_add))
    }
}

impl Pool {
    pub(crate) fn new(wanted: Vec<Wanted>) -> Self {
        let file = |wanted| PoolFile { wanted, part: None, pieces: Vec::new(), next: 0, missing: 0 };
        let files = wanted.into_iter().map(file).collect();
        Self {
            state: Mutex::new(State { files, here: 0, taken: BTreeMap::new(), told: false }),
            opening: Mutex::new(()),
            changes: watch::Sender::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Files of which it is not known yet what is here.
    pub(crate) fn unopened(&self) -> Vec<(usize, Wanted)> {
        let state = self.state();
        let unopened = state.files.iter().enumerate().filter(|(_, f)| f.part.is_none());
        unopened.map(|(i, f)| (i, f.wanted.clone())).collect()
    }

    /// Finds out what is here of a file, unless another has. Blocks on the disk.
    pub(crate) fn open(&self, file: usize, pieces: Pieces) -> io::Result<()> {
        let _one = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, wanted)) = self.unopened().into_iter().find(|(number, _)| *number == file) else { return Ok(()) };
        let (part, here) = Part::open(&wanted, pieces)?;
        {
            let mut state = self.state();
            let State { files, here: bytes, .. } = &mut *state;
            let Some(file) = files.get_mut(file) else { return Ok(()) };
            let found = here.iter().enumerate().filter(|(_, here)| **here);
            *bytes += found.map(|(index, _)| part.len_of(index) as u64).sum::<u64>();
            file.part = Some(Arc::new(part));
            file.pieces = here.iter().map(|here| if *here { Piece::Here } else { Piece::Missing(0) }).collect();
            file.missing = here.iter().filter(|here| !**here).count();
        }
        self.changed();
        Ok(())
    }

    /// Bytes that an earlier attempt left, and bytes of all files: for the first who asks when every file is open.
    pub(crate) fn found(&self) -> Option<(u64, u64)> {
        let mut state = self.state();
        let first = !std::mem::replace(&mut state.told, true);
        first.then(|| state.progress())
    }

    /// A piece that nobody has been asked for. If there is none and `double`, one that another has been asked for.
    pub(crate) fn claim(self: &Arc<Self>, mine: &[(usize, usize)], double: bool) -> Option<Claim> {
        let mut state = self.state();
        for (number, file) in state.files.iter_mut().enumerate() {
            let Some(part) = file.part.clone() else { continue };
            if let Some(index) = (file.next..file.pieces.len()).find(|i| file.pieces[*i] == Piece::Missing(0)) {
                (file.next, file.pieces[index]) = (index + 1, Piece::Missing(1));
                return Some(Claim { pool: self.clone(), part, file: number, index });
            }
            file.next = file.pieces.len();
        }
        if !double {
            return None;
        }
        for (number, file) in state.files.iter_mut().enumerate() {
            let Some(part) = file.part.clone() else { continue };
            for (index, piece) in file.pieces.iter_mut().enumerate() {
                if let Piece::Missing(claims) = *piece
                    && claims < CLAIMS
                    && !mine.contains(&(number, index))
                {
                    *piece = Piece::Missing(claims + 1);
                    return Some(Claim { pool: self.clone(), part, file: number, index });
                }
            }
        }
        None
    }

    /// A piece is on disk, given by `by`.
    pub(crate) fn fulfil(&self, claim: &Claim, by: &str) {
        {
            let mut state = self.state();
            let State { files, here, taken, .. } = &mut *state;
            let Some(file) = files.get_mut(claim.file) else { return };
            match file.pieces.get_mut(claim.index) {
                // Two were asked, and both gave it.
                None | Some(Piece::Here) => return,
                Some(piece) => *piece = Piece::Here,
            }
            file.missing -= 1;
            *here += claim.part.len_of(claim.index) as u64;
            *taken.entry(by.to_owned()).or_default() += 1;
        }
        self.changed();
    }

    fn give_back(&self, file: usize, index: usize) {
        {
            let mut state = self.state();
            let Some(file) = state.files.get_mut(file) else { return };
            if let Some(Piece::Missing(claims)) = file.pieces.get_mut(index) {
                *claims = claims.saturating_sub(1);
                if *claims == 0 {
                    file.next = file.next.min(index);
                }
            }
        }
        self.changed();
    }

    /// Whether everything is here.
    pub(crate) fn is_done(&self) -> bool {
        self.state().files.iter().all(|f| f.part.is_some() && f.missing == 0)
    }

    /// Bytes that are here, and bytes of all files.
    pub(crate) fn progress(&self) -> (u64, u64) {
        self.state().progress()
    }

    /// What is here of all files.
    pub(crate) fn parts(&self) -> Vec<Arc<Part>> {
        self.state().files.iter().filter_map(|f| f.part.clone()).collect()
    }

    /// Pieces that each machine gave, by its name.
    pub(crate) fn taken(&self) -> BTreeMap<String, u64> {
        self.state().taken.clone()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.pool.give_back(self.file, self.index);
    }
}
