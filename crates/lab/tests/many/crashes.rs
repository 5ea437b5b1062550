//! The manager, QEMU or both are killed in the middle of an image switch, the manager in the middle of a snapshot. What is told
//! afterwards is so: the one state or the other, and nothing of the attempt is left.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clan_lab::{Lab, LabError, Person, Screen, story};
use serde_json::Value;

use crate::{Beside, MANAGER, emulators, kill, people::promise, text, vms, with_manager};

const CLAN: &str = "crash";
/// For a boot under emulation, and whatever is tried before it.
const HEAL: Duration = Duration::from_secs(120);
/// How often it is looked whether the moment has come.
const MOMENT: Duration = Duration::from_micros(500);
/// Some moments are as short as a write, and on a busy computer nobody looks in time.
const ATTEMPTS: usize = 4;

#[test]
fn whatever_is_killed_in_the_middle_a_machine_is_the_one_or_the_other() {
    with_manager("clancrash", &[], tell);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victims {
    Manager,
    Qemu,
    Both,
}

/// A state on disk in which somebody is killed.
type Moment = fn(&Place) -> bool;

/// The clan's folder.
struct Place(PathBuf);

impl Place {
    fn of(person: &Person) -> Result<Self, LabError> {
        let clans = fs::read_dir(person.data().join("clans")).into_iter().flatten().flatten();
        let found = clans.map(|clan| clan.path()).find(|path| path.join("clan.json").exists());
        found.map(Self).ok_or_else(|| LabError::Promise("there is no clan on disk".into()))
    }

    fn record(&self) -> Value {
        let text = fs::read(self.0.join("clan.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Whether its QEMU runs.
    fn has_emulator(&self) -> bool {
        let text = fs::read(self.0.join("vm/pid.json")).unwrap_or_default();
        let pid = serde_json::from_slice::<Value>(&text).unwrap_or_default()["pid"].as_u64().unwrap_or_default();
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        program.to_string_lossy().contains("qemu")
    }
}

pub(crate) fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// It is being stopped for another image, which is not chosen yet.
fn stops(place: &Place) -> bool {
    let record = place.record();
    record["held"] == true && record["wanted"] == false && record["trial"].is_null()
}

/// The other image is chosen, and the machine not started.
fn chosen(place: &Place) -> bool {
    let record = place.record();
    record["held"] == true && record["trial"].is_object()
}

/// The machine starts with the other image, which is not judged yet.
fn starts(place: &Place) -> bool {
    let record = place.record();
    record["wanted"] == true && record["held"].is_null() && record["trial"].is_object() && place.has_emulator()
}

fn copies(place: &Place) -> bool {
    names(&place.0.join("snapshots")).iter().any(|name| name.starts_with(".new-"))
}

fn tell(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    let began = Instant::now();
    let made = ["create", CLAN, "--person", "founder", "--machine", "box", "--memory", "256M", "--cpus", "1"];
    lab.person("founder").clan(&made)?.success()?;
    let first = image(lab.person("founder"))?;
    // This one: an image of an earlier run holds an earlier program, which need not understand what the present one wrote.
    let other = lab.build_another("founder")?;
    promise(other != first, || format!("another build gives the same image, {first}"))?;
    write(lab.person("founder"), "kept")?;
    screen.seen("a machine with a choice of two images", began.elapsed());

    let rounds: [(&str, Moment, Victims); 5] = [
        ("the manager, while it stops the machine", stops, Victims::Manager),
        ("both, when the other image is chosen", chosen, Victims::Both),
        ("QEMU, while it starts", starts, Victims::Qemu),
        ("both, while it starts", starts, Victims::Both),
        ("both, while the machine is stopped", stops, Victims::Both),
    ];
    for (what, moment, victims) in rounds {
        let began = Instant::now();
        let (present, target, told) = attempts(what, || {
            let present = image(lab.person("founder"))?;
            let target = if present == first { &other } else { &first };
            let told = interrupted(lab, &["vm", "update", "--image", target.as_str(), "--yes"], moment, victims)?;
            Ok(told.map(|told| (present, target, told)))
        })?;
        let now = image(lab.person("founder"))?;
        promise([&present, target].contains(&&now), || format!("the machine has the image {now}"))?;
        promise(told != Some(true) || now == *target, || "an image that was said to be there is not".into())?;
        // Its QEMU uses the image that is said to be the machine's.
        let line = fs::read(format!("/proc/{}/cmdline", emulators(lab.person("founder"))[0])).unwrap_or_default();
        promise(String::from_utf8_lossy(&line).contains(&format!("/{now}/")), || {
            format!("QEMU has another than {now}")
        })?;
        reads(lab.person("founder"), &["kept"])?;
        screen.seen(&format!("an image switch survives a kill of {what}"), began.elapsed());
    }
    copied(lab, screen)?;
    crate::sealed::tell(lab, screen)?;
    // The folder is kept from run to run, and what is left there is kept, too.
    lab.person("founder").clan(&["image", "gc", "--yes"])?.success().map(drop)
}

/// Where QEMU is killed as well, what comes next is as after an image switch.
fn copied(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    let began = Instant::now();
    attempts("the manager, while it copies", || {
        let cut = interrupted(lab, &["vm", "snapshot", "--name", "cut"], copies, Victims::Manager)?;
        if cut.is_none() {
            lab.person("founder").clan(&["vm", "discard", "cut", "--yes"])?.success()?;
        }
        Ok(cut)
    })?;
    let snapshots = lab.person("founder").clan_json(&["vm", "snapshots"])?;
    let listed: Vec<&str> = snapshots.as_array().into_iter().flatten().map(|s| text(s, "name")).collect();
    promise(["cut"].starts_with(&listed), || format!("these snapshots are there: {listed:?}"))?;
    reads(lab.person("founder"), &["kept"])?;
    screen.seen("a snapshot is whole or not there after a kill of the manager", began.elapsed());
    Ok(())
}

/// Does something until it was caught in the middle.
fn attempts<T>(what: &str, mut once: impl FnMut() -> Result<Option<T>, LabError>) -> Result<T, LabError> {
    for _ in 0..ATTEMPTS {
        if let Some(done) = once()? {
            return Ok(done);
        }
    }
    Err(LabError::Promise(format!("the moment to kill {what} did not come in {ATTEMPTS} attempts")))
}

/// Runs a command, and kills when the moment has come; nothing, if the command came to its end before that was seen. Returns
/// whether the command said that it was done, if it could say; then the machine runs again, alone, and nothing of the attempt
/// is left.
fn interrupted(
    lab: &mut Lab,
    arguments: &[&str],
    moment: Moment,
    victims: Victims,
) -> Result<Option<Option<bool>>, LabError> {
    let place = Place::of(lab.person("founder"))?;
    let mut command = Beside::start(lab, arguments)?;
    if !caught(&mut command, || moment(&place))? {
        return Ok(None);
    }
    let founder = lab.person("founder");
    if victims != Victims::Qemu {
        founder.kill_manager()?;
    }
    if victims != Victims::Manager {
        emulators(founder).into_iter().for_each(kill);
    }
    let told = if victims == Victims::Qemu {
        Some(command.finish(HEAL)?.0.success())
    } else {
        // Nobody is there any more who could tell.
        drop(command);
        founder.start_manager(MANAGER)?;
        None
    };
    story::until(HEAL, "the machine running again", || {
        let settled = place.record()["trial"].is_null() && place.record()["held"].is_null();
        let all = vms(founder)?;
        let status = founder.clan_json(&["status"])?;
        let online = status["clans"][0]["online"] == true;
        Ok((settled && online && all[0]["state"] == "running" && all[0]["task"].is_null()).then_some(()))
    })?;
    promise(emulators(founder).len() == 1, || format!("emulators: {:?}", emulators(founder)))?;
    let known = ["clan.json", "person.key", "person.log", "ledger.redb", "data.ext4", "snapshots", "vm"];
    let odd: Vec<String> = names(&place.0).into_iter().filter(|name| !known.contains(&name.as_str())).collect();
    promise(odd.is_empty(), || format!("this is left in the clan's folder: {odd:?}"))?;
    let drafts = names(&place.0.join("snapshots")).into_iter().filter(|name| name.starts_with('.')).count();
    promise(drafts == 0, || format!("{drafts} half snapshots are left"))?;
    Ok(Some(told))
}

/// Waits for a moment in what a command does; it has not come if the command has ended well.
pub(crate) fn caught(command: &mut Beside, has_come: impl Fn() -> bool) -> Result<bool, LabError> {
    let began = Instant::now();
    while !has_come() {
        match command.ended() {
            Some(status) if status.success() => return Ok(false),
            ended if ended.is_some() || began.elapsed() > HEAL => {
                return Err(LabError::Promise(format!("the moment to kill did not come: {}", command.said())));
            }
            _ => thread::sleep(MOMENT),
        }
    }
    Ok(true)
}

/// The image that the machine is said to have.
fn image(person: &Person) -> Result<String, LabError> {
    Ok(text(&vms(person)?[0], "image").to_owned())
}

fn write(person: &Person, mark: &str) -> Result<(), LabError> {
    person.console(CLAN)?.run(&format!("echo {mark} > /root/mark && sync"), HEAL).map(drop)
}

fn reads(person: &Person, may: &[&str]) -> Result<(), LabError> {
    let (said, _) = person.console(CLAN)?.run("cat /root/mark", HEAL)?;
    promise(said.lines().any(|line| may.contains(&line.trim())), || format!("the disk has {said:?} on it, not {may:?}"))
}
