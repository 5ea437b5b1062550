//! What the tests of containers share.

use std::{fs, time::Duration};

use clan_lab::{Lab, LabConfig, LabError, Person, Screen, matching, story};
use rustix::process::{Pid, Signal, kill_process};

use crate::people::with_people;

pub(crate) const HEAL: Duration = Duration::from_secs(60);
pub(crate) const MANAGER: Duration = Duration::from_secs(20);

/// Lays a lab of its own name in which nobody but the founder has an image: see [`with_people`].
pub(crate) fn with_boxes(name: &str, stranger: bool, tell: impl FnOnce(&mut Lab, &Screen) -> Result<(), LabError>) {
    let adapt = |config: &mut LabConfig| {
        config.fresh_second = true;
        config.stranger = stranger;
    };
    with_people(&format!("clan{name}"), &format!("clan-lab-{name}"), adapt, tell);
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
