//! The ordinary user that the managers run as.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::LabError;

/// The account that `make deps` creates where root itself starts the lab.
pub(crate) const DEFAULT: &str = "clan-lab";

/// A user account of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Login name.
    pub name: String,
    /// User id; never 0.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: PathBuf,
}

impl Account {
    /// Whom the managers run as: `chosen`, else whoever called sudo, else the account `clan-lab`.
    ///
    /// # Errors
    /// When there is no such account, it is root, or it has no subordinate ids.
    pub fn for_lab(chosen: Option<&str>) -> Result<Self, LabError> {
        let caller = std::env::var("SUDO_UID").ok().filter(|uid| uid != "0");
        let account = Self::look_up(chosen.or(caller.as_deref()).unwrap_or(DEFAULT))?;
        let subuid = fs::read_to_string("/etc/subuid").unwrap_or_default();
        if !has_subordinate_ids(&subuid, &account) {
            return Err(LabError::NoSubordinateIds(account.name));
        }
        Ok(account)
    }

    /// Looks an account up by name or number, wherever this machine keeps its accounts.
    ///
    /// # Errors
    /// When there is none, or it is root.
    pub fn look_up(name: &str) -> Result<Self, LabError> {
        let missing = || LabError::NoAccount(name.to_owned());
        let passwd = text(Command::new("getent").args(["passwd", "--", name])).ok_or_else(missing)?;
        let mut account = parse_passwd(passwd.trim()).ok_or_else(missing)?;
        if account.uid == 0 {
            return Err(missing());
        }
        let groups = text(Command::new("id").args(["-G", "--", &account.name])).ok_or_else(missing)?;
        account.groups = groups.split_whitespace().filter_map(|id| id.parse().ok()).collect();
        Ok(account)
    }

    /// Where a lab of this account keeps data folders and images between runs.
    pub fn state_root(&self) -> PathBuf {
        if self.name == DEFAULT {
            Path::new("/var/lib").join(DEFAULT)
        } else {
            self.home.join(".local/state").join(DEFAULT)
        }
    }
}

fn text(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|o| o.status.success())?;
    String::from_utf8(output.stdout).ok()
}

fn parse_passwd(line: &str) -> Option<Account> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, _] = fields.as_slice() else { return None };
    Some(Account {
        name: (*name).to_owned(),
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: Vec::new(),
        home: home.into(),
    })
}

fn has_subordinate_ids(subuid: &str, account: &Account) -> bool {
    subuid
        .lines()
        .filter_map(|line| line.split(':').next())
        .any(|who| who == account.name || who == account.uid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ann() -> Account {
        parse_passwd("ann:x:1000:1000:Ann,,,:/home/ann:/bin/bash").unwrap()
    }

    #[test]
    fn a_passwd_line_becomes_an_account() {
        assert_eq!((ann().name.as_str(), ann().uid, ann().home.to_str()), ("ann", 1000, Some("/home/ann")));
        assert_eq!(parse_passwd("ann:x:many:1000:::"), None);
    }

    #[test]
    fn subordinate_ids_are_found_by_name_or_number() {
        assert!(has_subordinate_ids("bob:1:2\nann:100000:65536\n", &ann()));
        assert!(has_subordinate_ids("1000:100000:65536\n", &ann()));
        assert!(!has_subordinate_ids("anne:100000:65536\n", &ann()));
    }

    #[test]
    fn root_is_refused_as_the_managers_user() {
        assert!(matches!(Account::look_up("root"), Err(LabError::NoAccount(_))));
    }
}
