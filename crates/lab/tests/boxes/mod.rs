//! What the tests of containers share.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
    process::Command,
    time::Duration,
};

use clan_lab::{Account, Lab, LabConfig, LabError, Person, Screen, leftovers, matching, story};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) const HEAL: Duration = Duration::from_secs(60);
pub(crate) const MANAGER: Duration = Duration::from_secs(20);

/// Lays a lab of its own name in which nobody but the founder has an image, runs `tell`, and takes the lab down again. The test fails when `tell`
/// does, and when anything is left behind.
pub(crate) fn with_boxes(name: &str, stranger: bool, tell: impl FnOnce(&mut Lab, &Screen) -> Result<(), LabError>) {
    assert!(
        rustix::process::geteuid().is_root(),
        "the lab needs network namespaces: run it as root, as `make test` does"
    );
    let screen = Screen::stdout();
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let own = std::env::current_exe().unwrap();
    let mut config = LabConfig::new(own.parent().and_then(Path::parent).unwrap());
    let account = Account::for_lab(None).unwrap_or_else(|error| panic!("{}", error.chain()));
    config.prefix = format!("clan{name}");
    config.state = Some(account.state_root().with_file_name(format!("clan-lab-{name}")));
    config.any_ports = true;
    config.fresh_second = true;
    config.stranger = stranger;
    let mut lab = Lab::up(&config, &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let record = lab.record().clone();
    share_packages(&account.state_root().with_file_name("clan-lab-test"), lab.person("founder"), &account).unwrap();
    let told = tell(&mut lab, &screen);
    if let Err(error) = &told {
        screen.failed(&error.chain());
        story::post_mortem(&mut lab);
    }
    lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    told.unwrap_or_else(|error| panic!("{}; the logs are in {}", error.chain(), record.logs().display()));
    let left = leftovers(&record);
    assert!(left.is_empty(), "{left:?}");
}

/// What the story has downloaded need not be downloaded again.
fn share_packages(story: &Path, person: &Person, account: &Account) -> std::io::Result<()> {
    let cache = person.data().join("cache");
    for folder in [person.data(), cache.clone()] {
        if !folder.is_dir() {
            DirBuilder::new().mode(0o700).create(&folder)?;
            chown(&folder, Some(account.uid), Some(account.gid))?;
        }
    }
    for root in fs::read_dir(story.join("founder/data/cache")).into_iter().flatten().flatten() {
        let place = cache.join(root.file_name());
        if root.file_name().to_string_lossy().starts_with("root-") && !place.exists() {
            Command::new("cp").arg("-a").args([root.path(), place]).status()?;
        }
    }
    Ok(())
}

pub(crate) fn running(person: &Person) -> Result<u32, LabError> {
    story::until(HEAL, "the container running", || online(person))
}

/// The container's first process, once its controller answers.
pub(crate) fn online(person: &Person) -> Result<Option<u32>, LabError> {
    let status = person.clan_json(&["status"])?;
    let pid = status["vms"][0]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    Ok(pid.filter(|_| status["clans"][0]["online"] == true && status["vms"][0]["state"] == "running"))
}

pub(crate) fn pinged(person: &Person, machine: &str) -> Result<(), LabError> {
    story::until(HEAL, "an echo", || {
        let finished = person.clan_quietly(&["ping", machine, "--count", "1"])?;
        Ok(finished.status.success().then_some(()))
    })
}

/// A process and all that descend from it.
pub(crate) fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        found.extend(matching(|path| {
            let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
            let fields = stat.rsplit_once(')').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            fields.split_whitespace().nth(1).and_then(|p| p.parse().ok()) == Some(parent)
        }));
    }
    found
}

pub(crate) fn name(pid: u32) -> String {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.replace("passt", "pasta")
}

pub(crate) fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Kills processes without warning.
pub(crate) fn kill_all(pids: &[u32]) {
    for pid in pids {
        // One that went with another is gone.
        let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
    }
}

pub(crate) fn promise(kept: bool, what: impl FnOnce() -> String) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(what())) }
}
