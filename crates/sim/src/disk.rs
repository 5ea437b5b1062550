//! A disk in memory that does to a database what real ones do: it forgets what was not forced out when the power fails,
//! tears what was on its way, fills up, and rots.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use clan_store::{LedgerStore, Medium, StoreError};
use clan_types::ClanId;
use redb::{Builder, Database, DatabaseError, StorageBackend};

use crate::dice::Dice;

/// What is written at once, whatever happens.
const SECTOR: usize = 512;

/// One machine's disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Mutex<Platter>>);

#[derive(Debug)]
struct Platter {
    path: PathBuf,
    named: Option<File>,
    unnamed: Option<File>,
    /// Damaged files that were put aside.
    aside: usize,
    /// Counts power cycles: who opened a file before the last one cannot use it any more.
    cycle: u64,
    powered: bool,
    /// The power fails at the so-manieth write from now.
    fails_in: Option<u64>,
    /// The same for the room on it.
    fills_in: Option<u64>,
    full: bool,
    /// It says that it has forced out what it has not.
    lies: bool,
    writes: u64,
    dice: Dice,
}

/// What was on a disk.
#[derive(Debug, Clone)]
pub struct Image(Option<Vec<u8>>);

#[derive(Debug, Clone, Default)]
struct File {
    /// As it would be found after a power failure now.
    durable: Vec<u8>,
    /// As it is read now.
    current: Vec<u8>,
    /// Since the last time that it was forced out.
    pending: Vec<Write>,
}

#[derive(Debug, Clone)]
enum Write {
    Bytes { offset: usize, bytes: Vec<u8> },
    Length(usize),
}

impl File {
    fn apply(content: &mut Vec<u8>, write: &Write) {
        match write {
            Write::Length(length) => content.resize(*length, 0),
            Write::Bytes { offset, bytes } => {
                let end = offset + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(bytes);
            }
        }
    }

    fn write(&mut self, write: Write) {
        Self::apply(&mut self.current, &write);
        self.pending.push(write);
    }

    fn force_out(&mut self) {
        for write in self.pending.drain(..) {
            Self::apply(&mut self.durable, &write);
        }
    }

    /// Of what was not forced out, any part may have got there: whole writes, or sectors of one.
    fn lose_power(&mut self, dice: &mut Dice) {
        for write in std::mem::take(&mut self.pending) {
            match write {
                write if dice.permille(400) => Self::apply(&mut self.durable, &write),
                Write::Bytes { offset, bytes } if dice.permille(500) => {
                    for (number, sector) in bytes.chunks(SECTOR).enumerate() {
                        if dice.permille(500) {
                            let write = Write::Bytes { offset: offset + number * SECTOR, bytes: sector.to_vec() };
                            Self::apply(&mut self.durable, &write);
                        }
                    }
                }
                _ => {}
            }
        }
        self.current.clone_from(&self.durable);
    }
}

impl Disk {
    /// An empty one.
    pub fn new(name: &str, seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Platter {
            path: PathBuf::from(name),
            named: None,
            unnamed: None,
            aside: 0,
            cycle: 0,
            powered: true,
            fails_in: None,
            fills_in: None,
            full: false,
            lies: false,
            writes: 0,
            dice: Dice::new(seed),
        })))
    }

    /// Opens the ledger on it, or makes one: the product's code on this disk.
    pub fn open(&self, clan: &ClanId) -> Result<LedgerStore, StoreError> {
        LedgerStore::open_on(Box::new(self.clone()), clan)
    }

    /// Lets the power fail at the so-manieth write or flush from now.
    pub fn fail_power_in(&self, writes: u64) {
        self.lock().fails_in = Some(writes);
    }

    /// Whether the power has failed.
    pub fn is_dead(&self) -> bool {
        !self.lock().powered
    }

    /// Cuts the power, if it is not cut yet.
    pub fn cut_power(&self) {
        self.lock().cut_power();
    }

    /// Gives power again.
    pub fn power_on(&self) {
        let mut platter = self.lock();
        platter.powered = true;
        platter.fails_in = None;
    }

    /// No room for anything new, or room again.
    pub fn set_full(&self, full: bool) {
        let mut platter = self.lock();
        platter.full = full;
        platter.fills_in = None;
    }

    /// Lets the room end at the so-manieth write or flush from now.
    pub fn fill_in(&self, writes: u64) {
        self.lock().fills_in = Some(writes);
    }

    /// From now on flushes do nothing: a broken disk, to see that its loss is noticed.
    pub fn lie(&self) {
        self.lock().lies = true;
    }

    /// Damages one sector that was forced out long ago.
    pub fn rot(&self) {
        let mut platter = self.lock();
        let mut dice = platter.dice.clone();
        if let Some(file) = platter.named.as_mut().filter(|file| file.durable.len() > SECTOR) {
            let sectors = file.durable.len() / SECTOR;
            let at = usize::try_from(dice.word() % sectors as u64).unwrap_or(0) * SECTOR;
            file.durable[at..at + SECTOR].fill(0xa5);
            file.current.clone_from(&file.durable);
        }
        platter.dice = dice;
    }

    /// What would be found on it after a power failure now.
    pub fn image(&self) -> Image {
        Image(self.lock().named.as_ref().map(|file| file.durable.clone()))
    }

    /// Replaces what is on it.
    pub fn put_back(&self, image: Image) {
        let mut platter = self.lock();
        platter.unnamed = None;
        platter.named = image.0.map(|content| File { current: content.clone(), durable: content, pending: Vec::new() });
    }

    /// Writes and flushes so far.
    pub fn writes(&self) -> u64 {
        self.lock().writes
    }

    /// Damaged files that were put aside so far.
    pub fn put_aside(&self) -> usize {
        self.lock().aside
    }

    /// Bytes of the ledger's file.
    pub fn size(&self) -> usize {
        self.lock().named.as_ref().map_or(0, |file| file.current.len())
    }

    fn lock(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn backend(&self, named: bool) -> Backend {
        Backend { disk: self.clone(), cycle: self.lock().cycle, named }
    }
}

impl Platter {
    fn cut_power(&mut self) {
        if !std::mem::replace(&mut self.powered, false) {
            return;
        }
        self.cycle += 1;
        for file in [self.named.as_mut(), self.unnamed.as_mut()].into_iter().flatten() {
            file.lose_power(&mut self.dice);
        }
    }

    /// Counts a write, which may be the last.
    fn step(&mut self) -> io::Result<()> {
        self.writes += 1;
        if let Some(left) = self.fills_in.as_mut() {
            *left = left.saturating_sub(1);
            self.full |= *left == 0;
        }
        if let Some(left) = self.fails_in.as_mut() {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.cut_power();
                return Err(io::Error::other("the power has failed"));
            }
        }
        Ok(())
    }
}

impl Medium for Disk {
    fn path(&self) -> &Path {
        Path::new("the simulated disk")
    }

    fn length(&self) -> io::Result<Option<u64>> {
        let platter = self.lock();
        if !platter.powered {
            return Err(io::Error::other("no power"));
        }
        Ok(platter.named.as_ref().map(|file| file.current.len() as u64))
    }

    fn open(&self, builder: &mut Builder) -> Result<Database, DatabaseError> {
        builder.create_with_backend(self.backend(true))
    }

    fn begin(&self, builder: &mut Builder) -> Result<Database, DatabaseError> {
        self.lock().unnamed = Some(File::default());
        builder.create_with_backend(self.backend(false))
    }

    fn finish(&self) -> Result<(), StoreError> {
        let refused = |source| StoreError::Io { action: "create", path: self.lock().path.clone(), source };
        let stepped = self.lock().step();
        stepped.map_err(refused)?;
        let mut platter = self.lock();
        // Naming is atomic and, on return, durable; what the file holds is only what was forced out of it.
        if platter.powered && platter.named.is_none() {
            platter.named = platter.unnamed.take();
        }
        Ok(())
    }

    fn abandon(&self) {
        self.lock().unnamed = None;
    }

    fn keep_aside(&self, why: String) -> StoreError {
        let mut platter = self.lock();
        platter.named = None;
        platter.aside += 1;
        let path = platter.path.clone();
        StoreError::Corrupt { kept: path.with_extension("corrupt"), path, why: clan_store::Damage::new(why) }
    }
}

/// An open file.
#[derive(Debug)]
struct Backend {
    disk: Disk,
    cycle: u64,
    named: bool,
}

impl Backend {
    fn with<T>(&self, run: impl FnOnce(&mut Platter, bool) -> io::Result<T>) -> io::Result<T> {
        let mut platter = self.disk.lock();
        if platter.cycle != self.cycle || !platter.powered {
            return Err(io::Error::other("the power has failed"));
        }
        run(&mut platter, self.named)
    }
}

impl Platter {
    fn file(&mut self, named: bool) -> io::Result<&mut File> {
        let file = if named { self.named.as_mut() } else { self.unnamed.as_mut() };
        file.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.with(|platter, named| Ok(platter.file(named)?.current.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(|platter, named| {
            let content = &platter.file(named)?.current;
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let found = content.get(start..start.saturating_add(out.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(found);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|platter, named| {
            platter.step()?;
            let (full, len) = (platter.full, usize::try_from(len).unwrap_or(usize::MAX));
            let file = platter.file(named)?;
            if full && len > file.current.len() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            file.write(Write::Length(len));
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|platter, named| {
            platter.step()?;
            if !platter.lies {
                platter.file(named)?.force_out();
            }
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|platter, named| {
            platter.step()?;
            // As on a file system that has to find room for every page that changes.
            if platter.full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            platter.file(named)?.write(Write::Bytes { offset, bytes: data.to_vec() });
            Ok(())
        })
    }
}
