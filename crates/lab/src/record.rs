//! What a lab is about to make, written before it makes it: so that `stop` finds everything after a kill -9.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::{LabError, net::Namespace, process::ProcessId};

const DIR: &str = "/run/clan-lab";
const VERSION: u32 = 1;

/// One lab of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// In front of the names of namespaces.
    pub prefix: String,
    /// The process that runs the lab.
    pub(crate) owner: ProcessId,
    /// Data folders, programs, logs.
    pub state_root: PathBuf,
    /// Names of the lab's people.
    pub people: Vec<String>,
    /// Further namespaces: routers, and computers without people.
    #[serde(default)]
    pub(crate) networks: Vec<String>,
}

impl Record {
    pub(crate) fn new(prefix: &str, owner: ProcessId, state_root: &Path, people: &[&str]) -> Self {
        let people = people.iter().map(|name| (*name).to_owned()).collect();
        let (prefix, state_root) = (prefix.to_owned(), state_root.to_owned());
        Self { version: VERSION, prefix, owner, state_root, people, networks: Vec::new() }
    }

    /// The same with further namespaces to look after.
    pub(crate) fn with_networks(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.networks.extend(names);
        self
    }

    fn path(prefix: &str) -> PathBuf {
        Path::new(DIR).join(format!("{prefix}.json"))
    }

    /// The record of the lab `prefix`, if there is or was one that was not taken down.
    ///
    /// # Errors
    /// When it cannot be read: it is kept, since it alone says what there is to remove.
    pub fn load(prefix: &str) -> Result<Option<Self>, LabError> {
        let path = Self::path(prefix);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(LabError::io(format!("read {}", path.display())))?,
        };
        let unreadable = |why: String| {
            LabError::Promise(format!("{} is not a lab's record ({why}): look at it, then remove it", path.display()))
        };
        let record: Self = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        if record.version != VERSION || record.prefix != prefix {
            return Err(unreadable("another version or another lab".into()));
        }
        Ok(Some(record))
    }

    /// Writes it. Must come before anything that it names is made.
    pub(crate) fn save(&self) -> Result<(), LabError> {
        let path = Self::path(&self.prefix);
        let complain = || LabError::io(format!("write {}", path.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(DIR).map_err(complain())?;
        let draft = path.with_extension("new");
        let mut file =
            File::options().create(true).truncate(true).write(true).mode(0o600).open(&draft).map_err(complain())?;
        file.write_all(&serde_json::to_vec_pretty(self).map_err(|error| complain()(error.into()))?)
            .map_err(complain())?;
        file.sync_all().map_err(complain())?;
        fs::rename(&draft, &path).map_err(complain())
    }

    pub(crate) fn remove(&self) -> Result<(), LabError> {
        let path = Self::path(&self.prefix);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(LabError::io(format!("remove {}", path.display()))(error))
            }
            _ => {
                // Other labs may have theirs in it.
                let _ = fs::remove_dir(DIR);
                Ok(())
            }
        }
    }

    /// Whether the process that runs the lab still does.
    pub fn is_running(&self) -> bool {
        self.owner.alive()
    }

    /// The process that runs the lab.
    pub fn pid(&self) -> u32 {
        self.owner.pid
    }

    /// Sends the process that runs the lab a signal, and waits until it is gone.
    pub fn ask_to_end(&self, signal: Signal, limit: Duration) {
        let began = Instant::now();
        self.owner.signal(signal);
        while self.owner.alive() && began.elapsed() < limit {
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn internet(&self) -> Namespace {
        Namespace::named(format!("{}-internet", self.prefix))
    }

    pub(crate) fn computer(&self, person: &str) -> Namespace {
        Namespace::named(format!("{}-{person}", self.prefix))
    }

    pub(crate) fn namespaces(&self) -> Vec<Namespace> {
        let people = self.people.iter().map(|person| self.computer(person));
        let further = self.networks.iter().map(Namespace::named);
        people.chain(further).chain([self.internet()]).collect()
    }

    /// What belongs to one person: home, data folder.
    pub(crate) fn folder(&self, person: &str) -> PathBuf {
        self.state_root.join(person)
    }

    /// A person's data folder, as `clan --data` takes it.
    pub fn data(&self, person: &str) -> PathBuf {
        self.folder(person).join("data")
    }

    /// The copied programs.
    pub fn programs(&self) -> PathBuf {
        self.state_root.join("bin")
    }

    /// Logs of the last run.
    pub fn logs(&self) -> PathBuf {
        self.state_root.join("logs")
    }
}
