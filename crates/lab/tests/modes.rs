//! Who steers a machine: its user, the clan's admins, or both; tried from every side, with real controllers. Needs root, for
//! network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::Fleet,
    nat::{Nat, SiteSpec},
    story::until,
};
use clan_types::ImageId;
use common::{running::Running, with_fleet};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
/// Whoever is put out steers nothing any more within this time of it.
const CUT_OFF: Duration = Duration::from_secs(3);
/// So long sleeps what an admin leaves running: a number that nothing else has.
const SLEEP: &str = "86017";

#[test]
fn machines_are_steered_by_whom_their_users_let() {
    let specs: Vec<SiteSpec> = ["ada", "eve", "ben"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clanmodes", &specs, &["controller", "manager"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    fleet.computer("ada").found(CLAN)?;
    fleet.computer("ada").clan(&["machine", "suggest", "shared"])?.success()?;
    let invite = fleet.computer("ada").invite("member")?;
    let seen = fleet.computer("ben").clan_typing(&["join", "--dry-run", "--integrate"], &invite)?.success()?.stdout;
    demand(seen.contains("shared: you and the clan's admins steer it"), "the suggestion is not shown")?;
    let own = ["join", "--dry-run", "--integrate", "--control", "local"];
    let seen = fleet.computer("ben").clan_typing(&own, &invite)?.success()?.stdout;
    demand(seen.contains("local: only you steer it"), "what the person said is not shown")?;
    fleet.computer("ada").clan(&["machine", "suggest", "local"])?.success()?;
    for (name, role) in [("eve", "admin"), ("ben", "member")] {
        let link = fleet.computer("ada").invite(role)?;
        let seen = fleet.computer(name).clan_typing(&["join", "--dry-run", "--integrate"], &link)?.success()?.stdout;
        demand(seen.contains("local: only you steer it"), "who will steer it is not shown")?;
        fleet.computer(name).join(&link)?.success()?;
    }
    for (from, to) in [("eve", "ben"), ("ada", "ben"), ("ben", "eve")] {
        until(LIMIT, "everybody reaching each other", || ping_once(fleet.computer(from), to))?;
    }

    screen.heading("Local: nobody but ben steers ben");
    let image = ImageId::from_bytes([7; 32]).to_string();
    let update = ["machine", "update", "ben", "--image", image.as_str(), "--yes"];
    for attempt in [
        &update[..],
        &["machine", "stats", "ben"],
        &["machine", "journal", "ben"],
        &["machine", "set", "ben", "announce=off"],
        &["machine", "terminal", "ben", "--", "true"],
    ] {
        refused(fleet, "eve", attempt, &["only ben steers ben", "control mode is local", "clan vm control shared"])?;
    }
    let own = fleet.computer("ben").clan_json(&["machine", "stats", "ben"])?;
    demand(own["control_mode"] == "local", "ben does not see their own machine")?;

    screen.heading("Shared: both do, and either takes the other's changes back");
    let unasked = fleet.computer("ben").clan_quietly(&["vm", "control", "shared"])?;
    demand(unasked.success().is_err(), "others are let in without a question")?;
    fleet.computer("ben").clan(&["vm", "control", "shared", "--yes"])?.success()?;
    let shown = fleet.computer("ben").clan_quietly(&["status"])?.success()?.stdout;
    demand(shown.contains("control shared"), "status does not show who steers")?;
    until(LIMIT, "eve hearing who steers which machine", || {
        let machines = fleet.computer("eve").clan_json(&["machines"])?;
        let of = |name: &str| machines.as_array()?.iter().find(|m| m["name"] == name)?["control_mode"].as_str();
        let heard = ["ada", "ben", "eve"].map(of) == [Some("local"), Some("shared"), Some("local")];
        Ok(heard.then_some(()))
    })?;
    let table = fleet.computer("eve").clan_quietly(&["machines"])?.success()?.stdout;
    demand(table.contains("CONTROL") && table.contains("shared"), &format!("the table does not show it: {table}"))?;
    refused(fleet, "eve", &update, &["ben runs no image"])?;
    let report = fleet.computer("eve").clan_json(&["machine", "stats", "ben"])?;
    demand(report["stats"]["memory_total"].as_u64() > Some(0), "no statistics")?;
    let changed = fleet.computer("eve").clan_json(&["machine", "set", "ben", "announce=off"])?;
    let number = changed["entry"]["number"].as_u64().unwrap().to_string();
    demand(setting(fleet, "ben")? == "off", "the setting is not changed")?;
    fleet.computer("ben").clan(&["machine", "revert", "ben", &number])?.success()?;
    demand(setting(fleet, "eve")? == "on", "ben's revert does not work")?;
    refused(fleet, "eve", &["machine", "revert", "ben", &number], &["not the last word", "`on` now"])?;
    let bens = fleet.computer("eve").clan_json(&["machine", "journal", "ben"])?;
    let last = bens.as_array().and_then(|all| all.last()).cloned().unwrap();
    demand(last["here"] == true && last["person_name"] == "ben", "the journal does not say that it was ben")?;
    demand(last["reverts"].as_u64().map(|n| n.to_string()) == Some(number), "nor what was taken back")?;
    let again = last["number"].as_u64().unwrap().to_string();
    fleet.computer("eve").clan(&["machine", "revert", "ben", &again])?.success()?;
    demand(setting(fleet, "ben")? == "off", "eve's revert does not work")?;
    refused(fleet, "eve", &["machine", "set", "ben", "memory=1G"], &["ben's to change", "clan vm resize"])?;
    let out = fleet.computer("ben").clan_json(&["machine", "revert", "ben", "1"])?;
    refused(fleet, "eve", &["machine", "stats", "ben"], &["only ben steers ben"])?;
    // What shut others out is not taken back without a question.
    let out = out["entry"]["number"].as_u64().unwrap().to_string();
    refused(fleet, "ben", &["machine", "revert", "ben", &out], &["said anew", "clan vm control shared"])?;
    fleet.computer("ben").clan(&["vm", "control", "shared", "--yes"])?.success()?;

    screen.heading("A terminal on ben: as ben's account, and its exit status comes back");
    let ran = fleet.computer("eve").clan_quietly(&["machine", "terminal", "ben", "--", "sh", "-c", "id -u; exit 7"])?;
    demand(ran.status.code() == Some(7), "another exit status")?;
    demand(ran.stdout.trim() != "0" && !ran.stdout.trim().is_empty(), "the terminal has the controller's rights")?;
    let command = "stty rows 33 cols 99; clan machine terminal ben -- sh -c 'tty; stty size'";
    let mut script = fleet.computer("eve").place().command("script")?;
    let seen = script.args(["-qec", command, "/dev/null"]).env("TERM", "xterm").stdin(Stdio::null()).output().unwrap();
    let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
    demand(seen.contains("/dev/pts/") && seen.contains("33 99"), &format!("no real terminal: {seen}"))?;
    // Both directions are full at once.
    let command = "head -c 4000000 /dev/zero | clan machine terminal ben -- cat | wc -c";
    let mut shell = fleet.computer("eve").place().command("sh")?;
    let through = shell.args(["-c", command]).output().unwrap();
    let through = String::from_utf8_lossy(&through.stdout).into_owned();
    demand(through.trim() == "4000000", &format!("of 4000000 bytes there and back came {through}"))?;

    screen.heading("A member steers nobody else's machine, whatever its mode");
    fleet.computer("eve").clan(&["vm", "control", "shared", "--yes"])?.success()?;
    refused(fleet, "ben", &["machine", "stats", "eve"], &["steered by admins and owners", "you are member"])?;

    screen.heading("Remote: the admins do; ben looks, and takes it back");
    fleet.computer("ben").clan(&["vm", "control", "remote", "--yes"])?.success()?;
    fleet.computer("eve").clan(&["machine", "set", "ben", "announce=on"])?.success()?;
    for attempt in [&["machine", "set", "ben", "announce=off"][..], &["machine", "terminal", "ben", "--", "true"]] {
        refused(fleet, "ben", attempt, &["and not you", "control mode is remote", "clan vm control shared"])?;
    }
    fleet.computer("ben").clan(&["machine", "journal", "ben"])?.success()?;

    screen.heading("It is all still there after a restart");
    let before = fleet.computer("ben").clan_json(&["machine", "journal", "ben"])?;
    fleet.computer("ben").kill_controller();
    fleet.computer("ben").start_controller(&[])?;
    until(LIMIT, "the journal after a restart", || {
        let after = fleet.computer("ben").clan_quietly(&["machine", "journal", "ben", "--json"])?;
        Ok(after.success().and_then(|told| told.json()).is_ok_and(|after: Value| after == before).then_some(()))
    })?;

    screen.heading("Who is put out loses their terminal");
    until(LIMIT, "eve reaching ben again", || ping_once(fleet.computer("eve"), "ben"))?;
    let mut eves = fleet.computer("eve").place().command("clan")?;
    eves.args(["machine", "terminal", "ben", "--", "sleep", SLEEP]);
    eves.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut open = Running(eves.spawn().unwrap());
    until(LIMIT, "what eve runs on ben", || Ok(sleeps().then_some(())))?;
    fleet.computer("ada").clan(&["revoke", "person", "eve", "--yes"])?.success()?;
    let began = Instant::now();
    until(CUT_OFF, "the end of what eve runs on ben", || Ok((!sleeps()).then_some(())))?;
    screen.seen("an admin who was put out has nothing left running", began.elapsed());
    let ended = open.0.wait().unwrap();
    demand(!ended.success(), "eve's terminal ended as if all were well")?;
    let again = fleet.computer("eve").clan_quietly(&["machine", "stats", "ben"])?;
    demand(again.success().is_err(), "eve still steers")?;
    Ok(())
}

/// Runs a command that must be refused with all of these words.
fn refused(fleet: &mut Fleet, on: &str, arguments: &[&str], words: &[&str]) -> Result<(), LabError> {
    let finished = fleet.computer(on).clan_quietly(arguments)?;
    let said = format!("{}{}", finished.stdout, finished.stderr);
    demand(finished.status.code() == Some(1), &format!("{arguments:?} on {on} is not refused: {said}"))?;
    let missing = words.iter().find(|words| !said.contains(**words));
    demand(missing.is_none(), &format!("{arguments:?} on {on} does not say {missing:?}: {said}"))
}

/// Whether ben announces itself, as seen from a computer.
fn setting(fleet: &mut Fleet, from: &str) -> Result<String, LabError> {
    let settings = fleet.computer(from).clan_json(&["machine", "settings", "ben"])?;
    let all = settings.as_array().cloned().unwrap_or_default();
    let found = all.iter().find(|s| s["name"] == "announce").and_then(|s| s["value"].as_str().map(str::to_owned));
    found.ok_or_else(|| LabError::Promise(format!("no such setting: {settings}")))
}

/// Whether what eve left running runs: processes are seen from everywhere in the lab.
fn sleeps() -> bool {
    let commands = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
    let wanted = format!("sleep\0{SLEEP}\0");
    commands.filter_map(|path| fs::read(path).ok()).any(|command| command == wanted.as_bytes())
}

fn demand(kept: bool, otherwise: &str) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(otherwise.into())) }
}
