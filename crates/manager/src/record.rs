//! What is kept on disk of a clan that this computer is in.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use clan_store::SecretFile;
use clan_types::{
    ByteSize, ClanId, ClanName, ControlMode, ImageId, MachineName, PersonId, PersonName, ServiceName, Timestamp,
};
use data_encoding::{BASE64, HEXLOWER};
use ed25519_dalek::SigningKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    disk::{self, DiskError},
    paths::{ClanPaths, Paths},
};

const STAGING: &str = ".new-";
const GONE: &str = ".gone-";

/// How far a clan has come here. Each phase is on disk before its work begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// Being founded. Resumed after a restart.
    Creating,
    /// Being joined. Resumed after a restart.
    Joining,
    /// In it.
    Ready,
    /// Being left: the ledger may say so already. Finished after a restart.
    Leaving,
    /// Being removed from this computer. Finished after a restart.
    Removing,
}

/// What the clan's machine is on this computer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Flavour {
    /// A VM.
    #[default]
    Vm,
    /// A container.
    Container,
    /// The computer itself.
    Integrated {
        /// Where its controller is found.
        socket: PathBuf,
    },
}

/// What is on a data disk on which no guest has run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fresh {
    /// Nothing.
    Empty,
    /// What was on the disk of a guest when the template of this name was made of it.
    Template(String),
}

/// UDP ports of the base OS that lead to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ports {
    pub(crate) quic: u16,
    pub(crate) wireguard: u16,
}

/// What a VM goes back to if it is not well with its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trial {
    /// The image that it had before.
    pub(crate) previous: ImageId,
    /// Whether it reached other machines then.
    pub(crate) met: bool,
    /// What it offered in good health then.
    pub(crate) services: BTreeSet<ServiceName>,
}

/// A clan on this computer: `clan.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClanRecord {
    pub(crate) id: ClanId,
    pub(crate) name: ClanName,
    pub(crate) person: PersonName,
    /// Whose further device this computer is; absent where the person came in, or founded the clan, from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) owner: Option<PersonId>,
    pub(crate) machine: MachineName,
    pub(crate) phase: Phase,
    /// A record of an earlier version has none: it is a VM's.
    #[serde(default)]
    pub(crate) flavour: Flavour,
    /// Whether the VM's data disk, and every copy of it, is encrypted. Never changes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) encrypted: bool,
    /// Whether the VM shall run.
    pub(crate) wanted: bool,
    /// Whether the VM shall run again after what it was stopped for, also if the manager is killed meanwhile.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) held: bool,
    /// Whether the VM shall hold still while it runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) paused: bool,
    /// Whether the data disk was put back to an earlier state, and the machine has not yet found out what it signed since.
    /// INVARIANT: on disk before the disk is put back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) restored: bool,
    /// INVARIANT: absent on disk before a guest runs on the data disk: a saved state fits its disk once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fresh: Option<Fresh>,
    pub(crate) image: Option<ImageId>,
    /// Present while it is not sure that the VM is well with its image, which is new to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) trial: Option<Trial>,
    /// The image that the VM was well with before it had its present one: what a change of it is taken back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) previous: Option<ImageId>,
    pub(crate) memory: ByteSize,
    pub(crate) disk: ByteSize,
    pub(crate) cpus: u8,
    pub(crate) ports: Ports,
    pub(crate) made: Timestamp,
    /// Who may steer the machine, as its user said last.
    #[serde(default)]
    pub(crate) control: ControlMode,
}

impl ClanRecord {
    pub(crate) fn is_integrated(&self) -> bool {
        matches!(self.flavour, Flavour::Integrated { .. })
    }

    pub(crate) fn is_container(&self) -> bool {
        self.flavour == Flavour::Container
    }

    /// What it is called in sentences.
    pub(crate) fn what(&self) -> &'static str {
        match self.flavour {
            Flavour::Vm => "VM",
            Flavour::Container => "container",
            Flavour::Integrated { .. } => "machine",
        }
    }

    pub(crate) fn load(paths: &ClanPaths) -> Result<Self, DiskError> {
        let path = paths.record();
        disk::read_json(&path)?.ok_or_else(|| disk::missing(&path))
    }

    pub(crate) fn save(&self, paths: &ClanPaths) -> Result<(), DiskError> {
        disk::write_json(&paths.record(), self)
    }
}

/// A clan's directory while it is put together, under a name that no clan has: a killed manager leaves nothing that
/// counts.
pub(crate) struct Staging {
    paths: ClanPaths,
    /// The person's key, new and on disk.
    pub(crate) key: SigningKey,
}

impl Staging {
    /// Begins with the person's key.
    pub(crate) fn begin(paths: &Paths) -> Result<Self, DiskError> {
        let dir = paths.clans().join(format!("{STAGING}{}", HEXLOWER.encode(&random::<8>(&paths.clans())?)));
        disk::create_dir(&dir)?;
        let staging = ClanPaths::at(dir);
        let secret = SecretFile::load_or_create(&staging.key())?;
        Ok(Self { key: SigningKey::from_bytes(secret.expose()), paths: staging })
    }

    /// Puts the clan in its place with everything that its phase needs to be resumed: whole, or not at all.
    pub(crate) fn commit(
        self,
        paths: &Paths,
        record: &ClanRecord,
        log: &PersonLog,
        link: Option<&str>,
    ) -> Result<(), DiskError> {
        log.save(&self.paths.log())?;
        if let Some(link) = link {
            disk::write_secret(&self.paths.link(), link.as_bytes())?;
        }
        record.save(&self.paths)?;
        disk::rename_dir(&self.paths.dir, &paths.clan(&record.id).dir)
    }
}

/// Random bytes; `path` is what they are for.
pub(crate) fn random<const N: usize>(path: &Path) -> Result<[u8; N], DiskError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| DiskError::NoRandomness { path: path.to_owned() })?;
    Ok(bytes)
}

/// What is in a data directory.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// The clans.
    pub(crate) records: Vec<ClanRecord>,
    /// Directories that cannot be read, and why.
    pub(crate) bad: Vec<(PathBuf, DiskError)>,
}

/// All clans of a data directory. Leftovers of killed managers go.
pub(crate) fn load_all(paths: &Paths) -> Loaded {
    let Loaded { mut records, mut bad } = Loaded::default();
    for dir in disk::list(&paths.clans()) {
        let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        if name.starts_with(STAGING) || name.starts_with(GONE) {
            if let Err(error) = disk::remove_dir(&dir) {
                bad.push((dir, error));
            }
            continue;
        }
        let clan = ClanPaths::at(dir.clone());
        match ClanRecord::load(&clan) {
            Ok(record) if record.id.to_string() == name => records.push(record),
            Ok(record) => bad.push((dir, DiskError::ForeignClan { path: clan.record(), found: record.id })),
            Err(error) => bad.push((dir, error)),
        }
    }
    Loaded { records, bad }
}

/// Removes a clan's directory: from here on it is gone, even if removing its files is interrupted.
pub(crate) fn remove(paths: &Paths, id: &ClanId) -> Result<(), DiskError> {
    let (dir, gone) = (paths.clan(id).dir, paths.clans().join(format!("{GONE}{id}")));
    disk::remove_dir(&gone)?;
    if dir.exists() {
        disk::rename_dir(&dir, &gone)?;
    }
    disk::remove_dir(&gone)
}

/// The person's key in a clan.
pub(crate) fn load_key(paths: &ClanPaths) -> Result<SigningKey, DiskError> {
    let path = paths.key();
    let secret = SecretFile::load(&path)?.ok_or_else(|| disk::missing(&path))?;
    Ok(SigningKey::from_bytes(secret.expose()))
}

/// What the person signed in a clan, in order: `person.log`. A person who signs two entries for one place is an
/// equivocator to everybody; this file is why a guest that lies about the ledger cannot make them one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct PersonLog {
    entries: Vec<Encoded>,
}

/// An encoded entry, base64 in JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Encoded(Vec<u8>);

impl Serialize for Encoded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Encoded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BASE64.decode(String::deserialize(deserializer)?.as_bytes()).map(Self).map_err(D::Error::custom)
    }
}

impl PersonLog {
    pub(crate) fn load(paths: &ClanPaths) -> Result<Self, DiskError> {
        let path = paths.log();
        // Fails closed: an empty log in place of a lost one would be signed over.
        disk::read_json(&path)?.ok_or_else(|| disk::missing(&path))
    }

    /// Writes it, durably, before anyone else sees the newest entry.
    pub(crate) fn save(&self, path: &Path) -> Result<(), DiskError> {
        disk::write_json(path, self)
    }

    pub(crate) fn push(&mut self, entry: Vec<u8>) {
        self.entries.push(Encoded(entry));
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &[u8]> {
        self.entries.iter().map(|e| e.0.as_slice())
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    pub(crate) fn record(id: u8, phase: Phase) -> ClanRecord {
        ClanRecord {
            id: ClanId::from_bytes([id; 32]),
            name: "family".parse().unwrap(),
            person: "anna".parse().unwrap(),
            owner: None,
            machine: "laptop".parse().unwrap(),
            phase,
            flavour: Flavour::Vm,
            encrypted: false,
            wanted: false,
            held: false,
            paused: false,
            restored: false,
            fresh: None,
            image: None,
            trial: None,
            previous: None,
            memory: ByteSize::from_mib(512),
            disk: ByteSize::from_mib(2048),
            cpus: 2,
            ports: Ports { quic: 1, wireguard: 2 },
            made: Timestamp::from_millis(7),
            control: ControlMode::Shared,
        }
    }

    /// A clan on disk.
    pub(crate) fn put(paths: &Paths, record: &ClanRecord, link: Option<&str>) -> (SigningKey, PersonLog) {
        let staging = Staging::begin(paths).unwrap();
        let key = staging.key.clone();
        let mut log = PersonLog::default();
        log.push(vec![1, 2, 3]);
        staging.commit(paths, record, &log, link).unwrap();
        (key, log)
    }

    #[test]
    fn a_clan_is_there_after_a_restart_with_key_and_log() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let made = record(1, Phase::Joining);
        let (key, log) = put(&paths, &made, Some("clan://join/x"));
        let Loaded { records: found, bad } = load_all(&paths);
        assert!(bad.is_empty(), "{bad:?}");
        assert_eq!(found, std::slice::from_ref(&made));
        let clan = paths.clan(&made.id);
        assert_eq!(load_key(&clan).unwrap().to_bytes(), key.to_bytes());
        assert_eq!(PersonLog::load(&clan).unwrap(), log);
        for secret in [clan.key(), clan.link(), clan.log()] {
            assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600, "{}", secret.display());
        }
        assert_eq!(std::fs::metadata(&clan.dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_a_killed_manager_left_half_made_is_gone_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        drop(Staging::begin(&paths).unwrap());
        std::fs::create_dir_all(paths.clans().join(".gone-abc").join("vm")).unwrap();
        let Loaded { records: found, bad } = load_all(&paths);
        assert!(found.is_empty() && bad.is_empty());
        assert_eq!(std::fs::read_dir(paths.clans()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_record_is_reported_and_its_key_stays() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        put(&paths, &record(1, Phase::Ready), None);
        let clan = paths.clan(&ClanId::from_bytes([1; 32]));
        std::fs::write(clan.record(), b"{\"version\":1,").unwrap();
        for _ in 0..2 {
            let Loaded { records: found, bad } = load_all(&paths);
            assert!(found.is_empty());
            assert_eq!(bad.len(), 1, "reported at every start");
        }
        assert!(load_key(&clan).is_ok());
    }

    #[test]
    fn a_lost_log_is_not_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        put(&paths, &record(1, Phase::Ready), None);
        let clan = paths.clan(&ClanId::from_bytes([1; 32]));
        std::fs::remove_file(clan.log()).unwrap();
        assert!(PersonLog::load(&clan).is_err());
    }

    #[test]
    fn a_record_of_an_earlier_version_is_a_vms() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        put(&paths, &record(1, Phase::Ready), None);
        let clan = paths.clan(&ClanId::from_bytes([1; 32]));
        let text = std::fs::read_to_string(clan.record()).unwrap();
        let older = text.replace("  \"flavour\": \"vm\",\n", "");
        assert_ne!(older, text);
        std::fs::write(clan.record(), older).unwrap();
        assert_eq!(ClanRecord::load(&clan).unwrap(), record(1, Phase::Ready));
    }

    #[test]
    fn a_removed_clan_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        put(&paths, &record(1, Phase::Ready), None);
        let id = ClanId::from_bytes([1; 32]);
        remove(&paths, &id).unwrap();
        remove(&paths, &id).unwrap();
        assert_eq!(load_all(&paths).records.len(), 0);
    }
}
