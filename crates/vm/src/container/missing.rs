//! What a container needs of the base OS, and what to do where it is not there.

use std::{fs, io, path::PathBuf};

use crate::{network, tool};

/// Where `useradd` begins with subordinate ids, and how many it gives (login.defs(5)).
const FIRST: u64 = 100_000;
const RANGE: u64 = 65_536;

/// Something that a container cannot do without.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Missing {
    /// A sentence without its full stop.
    pub why: String,
    /// What the user can do about it: a sentence without its full stop.
    pub remedy: String,
}

/// The programs that make a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tools {
    pub(super) unshare: PathBuf,
    pub(super) bwrap: PathBuf,
    pub(super) pasta: PathBuf,
    pub(super) fsck: PathBuf,
}

/// Whether containers can be run here, as far as can be told without trying.
pub fn check() -> Result<(), Missing> {
    tools().map(drop)
}

/// The programs, where this user can have containers.
pub(super) fn tools() -> Result<Tools, Missing> {
    no_root(rustix::process::geteuid().is_root())?;
    let find = |program: &str, package: &str| {
        tool::find(&[program]).ok_or_else(|| Missing {
            why: format!("`{program}` is not installed"),
            remedy: format!("install the package `{package}` (`sudo apt install {package}`)"),
        })
    };
    let tools = Tools {
        unshare: find("unshare", "util-linux")?,
        bwrap: find("bwrap", "bubblewrap")?,
        fsck: find("fsck.erofs", "erofs-utils")?,
        pasta: {
            find("newuidmap", "uidmap")?;
            find("ip", "iproute2")?;
            network::pasta().map_err(|exposure| Missing {
                why: exposure.why.trim_end_matches('.').to_owned(),
                remedy: exposure.remedy.trim_end_matches('.').to_owned(),
            })?
        },
    };
    user_namespaces()?;
    subordinate_ids()?;
    Ok(tools)
}

/// Root in a container is whoever started it, outside.
fn no_root(root: bool) -> Result<(), Missing> {
    if !root {
        return Ok(());
    }
    Err(Missing {
        why: "the manager is run by root, and root in a container would be this computer's own".to_owned(),
        remedy: "run the manager as an ordinary user, on a server one that is there for it: `sudo useradd --create-home clan`, \
                 `sudo loginctl enable-linger clan`, \
                 `sudo su - clan -c 'XDG_RUNTIME_DIR=/run/user/$(id -u) clan manager --install'`"
            .to_owned(),
    })
}

fn user_namespaces() -> Result<(), Missing> {
    let says = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let forbidden = |switch: &str, value: &str| Missing {
        why: "this computer does not let ordinary users have namespaces".to_owned(),
        remedy: format!("allow it: `sudo sysctl -w {switch}={value}`"),
    };
    if says("/proc/sys/user/max_user_namespaces", "0") {
        return Err(forbidden("user.max_user_namespaces", "15000"));
    }
    if says("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        return Err(forbidden("kernel.unprivileged_userns_clone", "1"));
    }
    if says("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        return Err(forbidden("kernel.apparmor_restrict_unprivileged_userns", "0"));
    }
    Ok(())
}

/// The users in a container beside root are from this range.
fn subordinate_ids() -> Result<(), Missing> {
    let uid = rustix::process::geteuid().as_raw();
    let name = user_name(uid).unwrap_or_default();
    let has = |path: &str| {
        fs::read_to_string(path).is_ok_and(|text| has_range(&text, &name, uid))
            // Ranges may come from elsewhere than this file (nsswitch.conf(5)).
            || fs::read_to_string("/etc/nsswitch.conf").is_ok_and(|text| text.lines().any(|l| l.starts_with("subid:")))
    };
    if has("/etc/subuid") && has("/etc/subgid") {
        return Ok(());
    }
    let user = if name.is_empty() { uid.to_string() } else { name };
    let range = |path: &str| {
        let first = unused(&fs::read_to_string(path).unwrap_or_default());
        format!("{first}-{}", first.saturating_add(RANGE - 1))
    };
    let (users, groups) = (range("/etc/subuid"), range("/etc/subgid"));
    Err(Missing {
        why: format!("the user {user} has no subordinate ids, which the users in a container need"),
        remedy: format!("add a range: `sudo usermod --add-subuids {users} --add-subgids {groups} {user}`"),
    })
}

/// Where a range can begin, behind those that others have: nobody's containers shall own what another's do.
fn unused(text: &str) -> u64 {
    let end = |line: &str| {
        let mut fields = line.split(':').skip(1).map(|field| field.trim().parse::<u64>().ok());
        fields.next()??.checked_add(fields.next()??)
    };
    text.lines().filter_map(end).fold(FIRST, u64::max)
}

/// Lines such as `anna:100000:65536` (subuid(5)).
fn has_range(text: &str, name: &str, uid: u32) -> bool {
    text.lines().any(|line| {
        let mut fields = line.split(':');
        let user = fields.next().unwrap_or_default();
        (user == name || user == uid.to_string())
            && fields.nth(1).is_some_and(|n| n.trim().parse().unwrap_or(0) >= 65_535)
    })
}

fn user_name(uid: u32) -> io::Result<String> {
    let text = fs::read_to_string("/etc/passwd")?;
    let of = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)? == &uid.to_string()).then(|| fields[0].to_owned())
    };
    text.lines().find_map(of).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_found_by_name_or_number_and_has_to_be_large_enough() {
        let text = "root:1:65536\nanna:100000:65536\n1001:165536:65536\nbert:300000:10\n";
        assert!(has_range(text, "anna", 1000));
        assert!(has_range(text, "carl", 1001));
        assert!(!has_range(text, "bert", 1002), "too small");
        assert!(!has_range(text, "ann", 1003));
    }

    #[test]
    fn the_range_that_is_proposed_is_nobodys() {
        assert_eq!(unused(""), FIRST);
        assert_eq!(unused("root:1:65536\n"), FIRST, "below those of ordinary users");
        assert_eq!(unused("bert:231072:65536\nanna:100000:65536\n"), 296_608);
        assert_eq!(unused("anna:many:65536\ncarl:100000\n:18446744073709551615:2\n"), FIRST, "no ranges at all");
    }

    #[test]
    fn root_is_told_to_have_an_ordinary_user_run_the_manager() {
        assert_eq!(no_root(false), Ok(()));
        let missing = no_root(true).unwrap_err();
        assert!(missing.why.contains("run by root"), "{missing}");
        assert!(missing.remedy.contains("enable-linger") && !missing.remedy.ends_with('.'), "{}", missing.remedy);
    }
}
