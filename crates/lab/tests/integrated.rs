//! Controllers on computers themselves: what they change there and put back, several on one, and one without rights. Needs root,
//! for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::{Computer, Fleet},
    nat::{Nat, SiteSpec},
    story::{link_in, until},
};
use common::with_fleet;

const LIMIT: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_secs(15);

#[test]
fn controllers_put_back_what_they_changed_and_share_a_computer() {
    let specs: Vec<SiteSpec> = ["host", "guest"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clanhost", &specs, &["controller", "manager", "work", "paper"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    let step = |what: &str, began: Instant| screen.seen(what, began.elapsed());

    // An address counts as the computer's only after the kernel has asked around for somebody else who has it.
    until(SHORT, "the addresses being the computer's", || {
        let asking = fleet.computer("host").run_as_root("ip", &["-6", "-o", "address", "show", "tentative"], SHORT)?;
        Ok(asking.success()?.stdout.is_empty().then_some(()))
    })?;
    let untouched = traces(fleet.computer("host"))?;
    let began = Instant::now();
    let resolv = fleet.computer("host").place().etc().join("resolv.conf");
    let before = fs::read_to_string(&resolv).unwrap();
    fleet.computer("host").found(CLAN)?;
    demand(
        fs::read_to_string(&resolv).unwrap().contains("nameserver 127."),
        "names are not looked for at the controller",
    )?;
    fleet.computer("host").kill_controller();
    until(LIMIT, "the manager saying that the controller is gone", || {
        let vms = fleet.computer("host").clan_json(&["vm", "list"])?;
        Ok((vms[0]["state"] == "stopped" && vms[0]["reason"].as_str().is_some_and(|why| !why.is_empty())).then_some(()))
    })?;
    fleet.computer("host").start_controller(&[])?;
    until(LIMIT, "its own name", || ping_once(fleet.computer("host"), "host"))?;
    fleet.computer("host").stop_controller()?;
    demand(fs::read_to_string(&resolv).unwrap() == before, "resolv.conf is not as it was")?;
    fleet.computer("host").start_controller(&[])?;
    step("resolv.conf is changed, found again after a kill, and put back", began);

    let began = Instant::now();
    let work = fleet.computer("host").another_controller("work", true, &["--dns", "resolv-conf"])?;
    create(fleet.computer("host"), "work", &work.socket)?;
    until(LIMIT, "both clans running", || {
        let vms = fleet.computer("host").clan_json(&["vm", "list"])?;
        let running = vms.as_array().map_or(0, |all| all.iter().filter(|vm| vm["state"] == "running").count());
        Ok((running == 2).then_some(()))
    })?;
    demand(devices(fleet.computer("host"))? == 2, "there are not two devices")?;
    until(LIMIT, "the second being told that the first has resolv.conf", || {
        let said = fleet.computer("host").clan_quietly(&["status"])?.success()?.stdout;
        Ok(said.contains("name server of another clan").then_some(()))
    })?;
    let link = link_in(&fleet.computer("host").clan(&["invite", "work"])?.success()?.stdout)?;
    fleet.computer("guest").join(&link)?.success()?;
    until(LIMIT, "the other computer reaching the second clan by name", || {
        let finished = fleet.computer("guest").run_as_root("ping", &["-c", "1", "-W", "1", "host.work.clan"], SHORT)?;
        Ok(finished.status.success().then_some(()))
    })?;
    // Each machine's second address is a route of its own: they do not go to whichever clan came first.
    let second = second_address(fleet.computer("guest"))?;
    until(LIMIT, "the second clan's IPv4 addresses", || {
        let finished = fleet.computer("host").run_as_root("ping", &["-c", "1", "-W", "1", &second], SHORT)?;
        Ok(finished.status.success().then_some(()))
    })?;
    until(LIMIT, "the first clan's name", || ping_once(fleet.computer("host"), "host"))?;
    step("two clans share a computer and do not clash", began);

    let began = Instant::now();
    let paper = fleet.computer("host").another_controller("paper", false, &[])?;
    create(fleet.computer("host"), "paper", &paper.socket)?;
    until(LIMIT, "what the controller needs being said", || {
        let said = fleet.computer("host").clan_quietly(&["status"])?.success()?.stdout;
        Ok((said.contains("No packets flow") && said.contains("CAP_NET_ADMIN")).then_some(()))
    })?;
    fleet.computer("host").clan(&["invite", "paper", "--role", "admin"])?.success()?;
    let invites = fleet.computer("host").clan_json(&["invites", "paper"])?;
    demand(invites.as_array().map_or(0, Vec::len) == 1, "the ledger is not kept")?;
    step("without rights a controller keeps the ledger, and says what it needs", began);

    let began = Instant::now();
    fleet.computer("guest").kill_controller();
    for (clan, heard) in [(CLAN, true), ("work", false), ("paper", true)] {
        let left = fleet.computer("host").clan(&["leave", clan, "--yes"])?.success()?;
        demand(
            left.stderr.contains("no other machine of the clan") != heard,
            "who leaves is told wrongly who heard it",
        )?;
    }
    demand(devices(fleet.computer("host"))? == 0, "a device is left")?;
    demand(fs::read_to_string(&resolv).unwrap() == before, "resolv.conf is not as it was")?;
    for state in [fleet.computer("host").place().controller_state(), work.state.clone(), paper.state.clone()] {
        for file in ["place.json", "ledger.redb"] {
            demand(!state.join(file).exists(), "the controller remembers the clan")?;
        }
    }
    let clans = fs::read_dir(fleet.computer("host").place().data().join("clans")).unwrap().count();
    demand(clans == 0, "the manager remembers a clan")?;
    // The kernel takes a moment to forget what belonged to a device.
    let left = || Ok((traces(fleet.computer("host"))? == untouched).then_some(()));
    if let Err(error) = until(SHORT, "the computer being as it was", left) {
        let now = traces(fleet.computer("host"))?;
        return Err(LabError::Promise(format!("{}: it was\n{untouched}and is\n{now}", error.chain())));
    }
    let socket = fleet.computer("host").place().socket();
    create(fleet.computer("host"), "again", &socket)?;
    step("leaving removes every trace, and the controller takes another clan", began);
    Ok(())
}

fn create(computer: &Computer, clan: &str, socket: &Path) -> Result<(), LabError> {
    let name = computer.name().to_owned();
    let socket = socket.to_str().unwrap();
    computer
        .clan(&["create", clan, "--person", &name, "--machine", &name, "--integrate", "--socket", socket])?
        .success()
        .map(drop)
}

/// What leaving has to put back as it was: addresses, routes, rules, sockets that others can reach, and the names of the
/// controller's files.
fn traces(computer: &Computer) -> Result<String, LabError> {
    let mut text = String::new();
    for (program, arguments) in [
        ("ip", &["-brief", "address"][..]),
        ("ip", &["-4", "route", "show", "table", "all"]),
        ("ip", &["-6", "route", "show", "table", "all"]),
        ("ip", &["-4", "rule"]),
        ("ip", &["-6", "rule"]),
        ("ss", &["-Hlnt"]),
    ] {
        text += &computer.run_as_root(program, arguments, SHORT)?.success()?.stdout;
    }
    let files = fs::read_dir(computer.place().controller_state()).into_iter().flatten().flatten();
    let mut names: Vec<_> = files.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(format!("{text}{names:?}\n"))
}

/// How many clans have a network device.
fn devices(computer: &Computer) -> Result<usize, LabError> {
    let links = computer.run_as_root("ip", &["-o", "link"], SHORT)?.success()?;
    Ok(links.stdout.lines().filter(|line| line.contains(": clan-")).count())
}

/// The IPv4 address of a computer's only clan.
fn second_address(computer: &Computer) -> Result<String, LabError> {
    let listed = computer.run_as_root("ip", &["-4", "-o", "address"], SHORT)?.success()?.stdout;
    let of = |line: &str| Some(line.split_once(" inet ")?.1.split('/').next()?.to_owned());
    let found = listed.lines().find(|line| line.contains(": clan-")).and_then(of);
    found.ok_or_else(|| LabError::Promise(format!("there is no IPv4 address of a clan: {listed}")))
}

fn demand(kept: bool, otherwise: &str) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(otherwise.into())) }
}
