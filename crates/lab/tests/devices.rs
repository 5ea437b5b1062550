//! One person with several computers: a second device by link, a friend by four words, and a new computer with nothing but
//! the recovery phrase. Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::Fleet,
    nat::{Nat, SiteSpec},
    story::until,
};
use common::with_fleet;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_person_has_several_devices_and_comes_back_with_a_recovery_phrase() {
    let specs: Vec<SiteSpec> =
        ["laptop", "tablet", "friend", "fresh"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clandevices", &specs, &["controller", "manager"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    screen.heading("Founding tells a recovery phrase, once");
    let created = integrated(fleet, "laptop", &["create", CLAN, "--person", "ada", "--json"], "")?;
    let phrase = text(&created, "recovery_phrase")?;
    if phrase.split(' ').count() != 12 {
        return Err(LabError::Promise("a recovery phrase has twelve words".into()));
    }

    screen.heading("A friend joins, from another network: words do not lead there, the link does");
    let invited = fleet.computer("laptop").clan_json(&["invite"])?;
    let (words, link) = (text(&invited, "words")?, text(&invited, "link")?);
    integrated(fleet, "friend", &["join", "--person", "ben", "--json"], &link)?;
    until(LIMIT, "the friend reaching the laptop", || ping_once(fleet.computer("friend"), "laptop"))?;

    screen.heading("A second computer becomes a device by a link");
    let link = text(&fleet.computer("laptop").clan_json(&["device", "add"])?, "link")?;
    integrated(fleet, "tablet", &["join", "--json"], &link)?;
    until(LIMIT, "the tablet reaching the friend", || ping_once(fleet.computer("tablet"), "friend"))?;
    let again = fleet.computer("fresh").clan_typing(&["join", "--dry-run"], &link)?;
    if again.success().is_ok() {
        return Err(LabError::Promise("a device link works twice".into()));
    }
    until(LIMIT, "the laptop hearing of the tablet", || devices(fleet, "laptop", &["tablet"]))?;
    // Two people: the tablet is a device, and nobody's own.
    until(LIMIT, "the tablet knowing two people", || {
        let members = fleet.computer("tablet").clan_json(&["members"])?;
        Ok((members.as_array().map(Vec::len) == Some(2)).then_some(()))
    })?;

    screen.heading("The first computer is off: the second decides for its person");
    fleet.computer("laptop").stop()?;
    let invite = text(&fleet.computer("tablet").clan_json(&["invite", "--role", "admin"])?, "link")?;

    screen.heading("Both computers are gone: the phrase brings the owner back on a new one");
    let elsewhere = fleet.computer("fresh").clan_typing(&["recover", "--dry-run", "--link", &invite], &phrase)?;
    elsewhere.success()?;
    fleet.computer("tablet").stop()?;
    integrated(fleet, "fresh", &["recover", "--json", "--link", &invite], &phrase)?;
    until(LIMIT, "the new computer reaching the friend", || ping_once(fleet.computer("fresh"), "friend"))?;
    let all = fleet.computer("fresh").clan_json(&["device", "list"])?;
    let first = all.as_array().and_then(|all| all.iter().find(|d| d["name"].is_null())).map(|d| text(d, "id"));
    let first = first.ok_or_else(|| LabError::Promise(format!("no first device: {all}")))??;
    for lost in [first.as_str(), "tablet"] {
        fleet.computer("fresh").clan(&["device", "remove", lost, "--yes"])?.success()?;
    }
    for asked in ["fresh", "friend"] {
        until(LIMIT, "everybody hearing of what was lost", || machines(fleet, asked, &["fresh", "friend"]))?;
    }
    fleet.computer("tablet").start()?;
    // Nobody tells it that it is out, but nobody talks to it either.
    for _ in 0..5 {
        if ping_once(fleet.computer("tablet"), "friend")?.is_some() {
            return Err(LabError::Promise("the lost tablet still reaches the friend".into()));
        }
    }

    screen.heading("The phrase is nowhere");
    let own: Vec<String> = [&phrase, &words].into_iter().cloned().collect();
    for path in files(fleet.world().state()) {
        let bytes = fs::read(&path).unwrap_or_default();
        if own.iter().any(|secret| bytes.windows(secret.len()).any(|w| w == secret.as_bytes())) {
            return Err(LabError::Promise(format!("{} holds words that were to be shown once", path.display())));
        }
    }
    Ok(())
}

/// Runs a command that makes the computer itself a machine of the same name, and gives what it prints.
fn integrated(fleet: &mut Fleet, name: &str, arguments: &[&str], input: &str) -> Result<Value, LabError> {
    let computer = fleet.computer(name);
    let socket = computer.place().socket();
    let socket = socket.to_str().ok_or_else(|| LabError::Promise("the lab's folder has an odd name".into()))?;
    let more = ["--machine", name, "--integrate", "--socket", socket, "--yes"];
    let arguments: Vec<&str> = arguments.iter().copied().chain(more).collect();
    computer.clan_typing(&arguments, input)?.success()?.json()
}

fn text(json: &Value, field: &str) -> Result<String, LabError> {
    json[field].as_str().map(str::to_owned).ok_or_else(|| LabError::Promise(format!("no {field}: {json}")))
}

fn devices(fleet: &mut Fleet, asked: &str, names: &[&str]) -> Result<Option<()>, LabError> {
    let all = fleet.computer(asked).clan_json(&["device", "list"])?;
    let all = all.as_array().cloned().unwrap_or_default();
    Ok(names.iter().all(|name| all.iter().any(|d| d["name"] == *name)).then_some(()))
}

fn machines(fleet: &mut Fleet, asked: &str, names: &[&str]) -> Result<Option<()>, LabError> {
    let all = fleet.computer(asked).clan_json(&["machines"])?;
    let all = all.as_array().cloned().unwrap_or_default();
    let same = all.len() == names.len() && names.iter().all(|name| all.iter().any(|m| m["name"] == *name));
    Ok(same.then_some(()))
}

/// Every plain file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => found.extend(files(&path)),
            Ok(meta) if meta.is_file() => found.push(path),
            _ => {}
        }
    }
    found
}
