//! A clan's ledger in a `redb` file.

use std::{
    collections::HashSet,
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use clan_ledger::{Entry, EntryError, Ledger};
use clan_types::{ClanId, EntryId};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use zeroize::Zeroizing;

use crate::{StoreError, medium::FileMedium, medium::Medium};

/// Entry id to encoded entry.
const ENTRIES: TableDefinition<&[u8; 32], &[u8]> = TableDefinition::new("entries");
/// Entry id to what shows that this machine has verified the entry: see [`SealKey`].
const SEALS: TableDefinition<&[u8; 32], &[u8; SEAL]> = TableDefinition::new("seals");
const SEAL: usize = 16;
/// See [`VERSION`], [`CLAN`] and [`COUNT`].
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const VERSION: &str = "version";
const CLAN: &str = "clan";
/// How many entries there are: an older state of the file would not add up.
const COUNT: &str = "count";
const CURRENT: u8 = 1;
/// The ledger is held in memory besides; the file needs little.
const CACHE: usize = 8 << 20;

/// With it a machine marks the entries that it has verified, so that it need not verify them again when it starts. Only
/// what the holder of the key wrote bears a seal that fits; anything else in the file is verified in full.
#[derive(Clone)]
pub struct SealKey(Zeroizing<[u8; 32]>);

impl SealKey {
    /// From a secret of this machine, such as its private key.
    pub fn derive(secret: &[u8; 32]) -> Self {
        Self(Zeroizing::new(blake3::derive_key("clan 2026-11 ledger file seal v1", secret)))
    }

    fn seal(&self, id: &[u8; 32]) -> [u8; SEAL] {
        let mut seal = [0; SEAL];
        seal.copy_from_slice(&blake3::keyed_hash(&self.0, id).as_bytes()[..SEAL]);
        seal
    }
}

/// A clan's ledger on disk. One process has it open at a time.
pub struct LedgerStore {
    medium: Box<dyn Medium>,
    clan: ClanId,
    key: Option<SealKey>,
    /// `None` after a failed write, until the file was opened again.
    database: Mutex<Option<Database>>,
}

impl LedgerStore {
    /// Opens a clan's file, or creates it. A damaged file is kept aside under another name and reported as
    /// [`StoreError::Corrupt`]; opening again then begins an empty one, which peers fill.
    pub fn open(path: impl AsRef<Path>, clan: &ClanId) -> Result<Self, StoreError> {
        Self::open_with(Box::new(FileMedium::new(path.as_ref())), clan, None)
    }

    /// The same, and seals what it writes, so that loading it is quick.
    pub fn open_sealed(path: impl AsRef<Path>, clan: &ClanId, key: SealKey) -> Result<Self, StoreError> {
        Self::open_with(Box::new(FileMedium::new(path.as_ref())), clan, Some(key))
    }

    /// As [`LedgerStore::open`], on anything that can hold a file.
    pub fn open_on(medium: Box<dyn Medium>, clan: &ClanId) -> Result<Self, StoreError> {
        Self::open_with(medium, clan, None)
    }

    fn open_with(medium: Box<dyn Medium>, clan: &ClanId, key: Option<SealKey>) -> Result<Self, StoreError> {
        match medium.length() {
            Ok(Some(_)) => {}
            Ok(None) => create(&*medium, clan)?,
            Err(error) => return Err(StoreError::io("open", medium.path())(error)),
        }
        let store = Self { clan: *clan, key, database: Mutex::new(None), medium };
        store.with(|_| Ok(()))?;
        Ok(store)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.medium.path()
    }

    /// Adds an entry. It is on disk on return; adding it again does nothing.
    pub fn append(&self, entry: &Entry) -> Result<(), StoreError> {
        self.append_all([entry])
    }

    /// Adds entries, all or none. They are on disk on return.
    pub fn append_all<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> Result<(), StoreError> {
        let entries: Vec<_> = entries.into_iter().collect();
        if entries.is_empty() {
            return Ok(());
        }
        self.with(|database| {
            let write = database.begin_write()?;
            {
                let mut table = write.open_table(ENTRIES)?;
                let mut seals = write.open_table(SEALS)?;
                for entry in &entries {
                    table.insert(entry.id().as_bytes(), entry.as_bytes())?;
                    // INVARIANT: an `Entry` has been verified; only such a one is ever sealed.
                    if let Some(key) = &self.key {
                        seals.insert(entry.id().as_bytes(), &key.seal(entry.id().as_bytes()))?;
                    }
                }
                let count = table.len()?;
                write.open_table(META)?.insert(COUNT, count.to_le_bytes().as_slice())?;
            }
            write.commit()?;
            Ok(())
        })
    }

    /// Reads all entries back and checks each: that it is the one that was sealed, or else its signature.
    pub fn load(&self) -> Result<Ledger, StoreError> {
        let mut entries = self.with(|database| {
            let read = database.begin_read()?;
            let sealed = match (&self.key, read.open_table(SEALS)) {
                (None, _) | (_, Err(redb::TableError::TableDoesNotExist(_))) => HashSet::new(),
                (Some(key), table) => sealed(key, &table?)?,
            };
            let table = read.open_table(ENTRIES)?;
            let mut entries = Vec::with_capacity(usize::try_from(table.len()?).unwrap_or(0));
            for row in table.iter()? {
                let (id, bytes) = row?;
                // `check` has compared content and id when the file was opened, and nobody else has it open since.
                let entry = if sealed.contains(id.value()) {
                    Entry::decode_vouched(bytes.value(), EntryId::from_bytes(*id.value()))
                } else {
                    Entry::decode(bytes.value())
                };
                match entry {
                    Ok(entry) => entries.push(entry),
                    Err(EntryError::NewerVersion(found)) => return Err(Failure::Newer(found)),
                    Err(error) => return Err(Failure::Damaged(error.to_string())),
                }
            }
            Ok(entries)
        })?;
        entries.sort_by_key(|entry| (entry.author(), entry.seq()));
        let mut ledger = Ledger::open(self.clan);
        // Refused are only entries of a branch that lost: they were stored when they arrived and have no effect.
        ledger.insert_all(entries);
        Ok(ledger)
    }

    /// Runs something on the open file. After an I/O error the file is opened afresh next time, because a database that
    /// failed once (a full disk) refuses all further work.
    fn with<T>(&self, run: impl FnOnce(&Database) -> Result<T, Failure>) -> Result<T, StoreError> {
        let mut guard = self.lock();
        // The database asserts what it expects of its file: a damaged one can end in a panic.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let database = match guard.take() {
                Some(database) => database,
                None => open(&*self.medium, &self.clan)?,
            };
            run(&database).map(|value| (value, database))
        }));
        match result.unwrap_or_else(|_| Err(Failure::Damaged("its structure is broken".to_owned()))) {
            Ok((value, database)) => {
                *guard = Some(database);
                Ok(value)
            }
            Err(failure) => Err(failure.report(&*self.medium)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Database>> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LedgerStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LedgerStore({})", self.path().display())
    }
}

impl Drop for LedgerStore {
    fn drop(&mut self) {
        // Closing writes, and can stumble over damage. Everything acknowledged is on disk already; the next opening
        // reports what is wrong.
        let database = self.lock().take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
    }
}

/// The ids whose seal fits.
fn sealed(
    key: &SealKey,
    table: &impl ReadableTable<&'static [u8; 32], &'static [u8; SEAL]>,
) -> Result<HashSet<[u8; 32]>, Failure> {
    let mut ids = HashSet::new();
    for row in table.iter()? {
        let (id, seal) = row?;
        if key.seal(id.value()) == *seal.value() {
            ids.insert(*id.value());
        }
    }
    Ok(ids)
}

fn builder() -> redb::Builder {
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE);
    builder
}

fn create(medium: &dyn Medium, clan: &ClanId) -> Result<(), StoreError> {
    let make = || -> Result<(), Failure> {
        let database = medium.begin(&mut builder())?;
        let write = database.begin_write()?;
        {
            write.open_table(ENTRIES)?;
            let mut meta = write.open_table(META)?;
            meta.insert(VERSION, [CURRENT].as_slice())?;
            meta.insert(CLAN, clan.as_bytes().as_slice())?;
            meta.insert(COUNT, 0u64.to_le_bytes().as_slice())?;
        }
        write.commit()?;
        Ok(())
    };
    // The database asserts what it expects of its file, and a disk that fails in the middle can defy that.
    let made = catch_unwind(AssertUnwindSafe(make))
        .unwrap_or_else(|_| Err(Failure::Io(io::Error::other("the database gave up while it was made"))));
    let finished = match made {
        Ok(()) => medium.finish(),
        Err(Failure::Io(error)) => Err(StoreError::io("create", medium.path())(error)),
        // There is nothing yet that could be damaged: the disk does not do what it is told.
        Err(Failure::Damaged(why)) => Err(StoreError::io("create", medium.path())(io::Error::other(why))),
        Err(failure) => Err(failure.report(medium)),
    };
    medium.abandon();
    finished
}

fn open(medium: &dyn Medium, clan: &ClanId) -> Result<Database, Failure> {
    // The database would take an empty file for a new one.
    if medium.length()?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))? == 0 {
        return Err(Failure::Damaged("it is empty".to_owned()));
    }
    let mut database = medium.open(&mut builder())?;
    // Covers what the entries do not: the database's own pages, on which a later write would stumble.
    if !database.check_integrity()? {
        return Err(Failure::Damaged("its checksums do not fit".to_owned()));
    }
    check(&database, clan)?;
    Ok(database)
}

/// Reads everything once: damage shows now, not when it hurts.
fn check(database: &Database, clan: &ClanId) -> Result<(), Failure> {
    let read = database.begin_read()?;
    let meta = read.open_table(META)?;
    let missing = |what: &str| Failure::Damaged(format!("its {what} is missing"));
    let version = meta.get(VERSION)?.ok_or_else(|| missing(VERSION))?;
    match version.value() {
        [CURRENT] => {}
        [newer] if *newer > CURRENT => return Err(Failure::Newer(*newer)),
        _ => return Err(missing(VERSION)),
    }
    let found = meta.get(CLAN)?.ok_or_else(|| missing(CLAN))?;
    let found = ClanId::from_bytes(<[u8; 32]>::try_from(found.value()).map_err(|_| missing(CLAN))?);
    if found != *clan {
        return Err(Failure::Foreign(found));
    }
    let count = meta.get(COUNT)?.ok_or_else(|| missing(COUNT))?;
    let count = u64::from_le_bytes(<[u8; 8]>::try_from(count.value()).map_err(|_| missing(COUNT))?);
    let mut seen = 0;
    for row in read.open_table(ENTRIES)?.iter()? {
        let (id, bytes) = row?;
        if blake3::hash(bytes.value()).as_bytes() != id.value() {
            return Err(Failure::Damaged("an entry is damaged".to_owned()));
        }
        seen += 1;
    }
    if seen != count {
        return Err(Failure::Damaged(format!("it has {seen} of {count} entries")));
    }
    Ok(())
}

/// What went wrong inside, before it is known what becomes of the file.
enum Failure {
    Io(io::Error),
    InUse,
    Newer(u8),
    Foreign(ClanId),
    Damaged(String),
}

impl Failure {
    fn report(self, medium: &dyn Medium) -> StoreError {
        let path = medium.path();
        let path_buf = path.to_owned();
        match self {
            Self::Io(error) => StoreError::io("read or write", path)(error),
            Self::InUse => StoreError::InUse { path: path_buf },
            Self::Newer(found) => StoreError::NewerVersion { path: path_buf, found: found.into() },
            Self::Foreign(found) => StoreError::ForeignClan { path: path_buf, found },
            Self::Damaged(why) => medium.keep_aside(why),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // Only a file that is shorter than it says reads like this.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

impl From<redb::Error> for Failure {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(error) => error.into(),
            redb::Error::DatabaseAlreadyOpen => Self::InUse,
            redb::Error::UpgradeRequired(_) => Self::Io(io::Error::new(io::ErrorKind::Unsupported, error.to_string())),
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => Self::Io(io::Error::other(error.to_string())),
            error => Self::Damaged(error.to_string()),
        }
    }
}

macro_rules! through_redb_error {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Failure {
            fn from(error: $kind) -> Self {
                redb::Error::from(error).into()
            }
        }
    )*};
}

through_redb_error!(DatabaseError, redb::StorageError, redb::TableError, redb::TransactionError, redb::CommitError);
