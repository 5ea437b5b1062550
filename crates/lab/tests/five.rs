//! What `make lab` shows, without anybody watching. Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::{fs, time::Duration};

use clan_lab::{
    LabError, Screen,
    five::{self, CLAN, Way, host_name, ping_once},
    fleet::Fleet,
    nat::{Nat, SiteSpec},
    story::until,
};
use clan_types::InviteLink;
use common::with_fleet;

#[test]
fn five_machines_meet_reach_each_other_by_name_and_leave_nothing_behind() {
    let before = fs::read("/etc/resolv.conf").ok();
    let specs = five::specs(&five::ROUTERS);
    let report = with_fleet("clanfive", &specs, &["controller", "manager"], |fleet| {
        let report = five::tell(fleet)?;
        echoes(fleet)?;
        Ok(report)
    });
    report.print(&Screen::stdout());
    assert_eq!((report.joined.len(), report.pairs.len()), (4, 10));
    assert!(report.pairs.iter().all(|pair| pair.throughput > 0.0));
    for pair in &report.pairs {
        let [one, other] = pair.ends.each_ref().map(|name| report.routers[name]);
        // What the routers forbid is relayed; a public address is reached by everybody who may send to it.
        let blocked = one == Nat::UdpBlocked || other == Nat::UdpBlocked;
        let open = one == Nat::Open || other == Nat::Open;
        let relayed = pair.paths.each_ref().map(|way: &Way| way.kind == "relayed");
        assert!(!blocked || relayed == [true, true], "{pair:?}");
        assert!(blocked || !open || relayed == [false, false], "{pair:?}");
    }
    assert_eq!(fs::read("/etc/resolv.conf").ok(), before, "this machine's own name resolution is not touched");
}

/// `clan ping`, which needs no rights and no name service on the computer.
fn echoes(fleet: &mut Fleet) -> Result<(), LabError> {
    let eve = fleet.computer("eve");
    let answered = eve.clan_json(&["ping", &host_name("dan"), "--count", "2"])?;
    assert_eq!((&answered["received"], &answered["last"]["name"]), (&2.into(), &"dan".into()), "{answered}");
    assert_eq!(answered["last"]["path"]["kind"], "relayed", "{answered}");
    let unknown = eve.clan_quietly(&["ping", "nobody", "--count", "1"])?;
    assert_eq!(unknown.status.code(), Some(1), "{}", unknown.output());
    fleet.computer("bob").stop()?;
    let silent = fleet.computer("cleo").clan_quietly(&["ping", "bob", "--count", "1"])?;
    assert_eq!(silent.status.code(), Some(1), "{}", silent.output());
    Ok(())
}

/// How long two machines may take to meet.
const LIMIT: Duration = Duration::from_secs(40);

#[test]
fn behind_a_symmetric_nat_somebody_invites_and_lets_in_through_the_clans_relay() {
    let sites = [
        ("ann", Nat::Open),
        ("dan", Nat::Symmetric),
        ("fay", Nat::PortRestricted),
        ("gil", Nat::UdpBlocked),
        ("hal", Nat::UdpBlocked),
    ];
    let specs = sites.map(|(name, nat)| SiteSpec::new(name, nat));
    with_fleet("clanhidden", &specs, &["controller", "manager"], |fleet| {
        fleet.computer("ann").found(CLAN)?;
        fleet.computer("ann").clan(&["relay", "on"])?.success()?;
        let link = fleet.computer("ann").invite("admin")?;
        fleet.computer("dan").join(&link)?.success()?;
        for name in ["fay", "gil"] {
            let link = only_the_inviter(fleet, "dan")?;
            fleet.computer(name).join(&link)?.success()?;
            until(LIMIT, "the newcomer reaching the inviter", || ping_once(fleet.computer(name), "dan"))?;
        }
        until(LIMIT, "the newcomers reaching each other", || ping_once(fleet.computer("fay"), "gil"))?;
        by_words(fleet)
    });
}

/// Four words and a relay do as well as the link, once; another guess does not.
fn by_words(fleet: &mut Fleet) -> Result<(), LabError> {
    let invite = fleet.computer("dan").clan_json(&["invite"])?;
    let (words, relay) = (invite["words"].as_str().unwrap(), invite["words_relay"].as_str().unwrap());
    assert_eq!(relay, "203.0.113.11");
    let hal = fleet.computer("hal");
    let socket = hal.place().socket();
    let join = ["join", "--yes", "--integrate", "--socket", socket.to_str().unwrap(), "--relay", relay];
    hal.clan_typing(&[join.as_slice(), &["--person", "hal", "--machine", "hal"]].concat(), words)?.success()?;
    until(LIMIT, "the one with the words reaching the inviter", || ping_once(fleet.computer("hal"), "dan"))?;
    let again = fleet.computer("hal").clan_typing(&["join", "--dry-run", "--relay", relay], words)?;
    assert!(again.output().contains("used already"), "{}", again.output());

    let invite = fleet.computer("dan").clan_json(&["invite"])?;
    let words = invite["words"].as_str().unwrap();
    let guess = format!("{} zoo zoo zoo", words.split(' ').next().unwrap());
    for (typed, _) in [(guess.as_str(), "wrong"), (words, "right, and too late")] {
        let void = fleet.computer("hal").clan_typing(&["join", "--dry-run", "--relay", relay], typed)?;
        assert!(void.output().contains("void"), "{}", void.output());
    }
    until(LIMIT, "the inviter hearing of the guess", || {
        Ok(fleet.computer("dan").clan_quietly(&["status"])?.output().contains("wrong words").then_some(()))
    })
}

/// A link that names the inviter's machine and the relay, and no other machine that could let anybody in.
fn only_the_inviter(fleet: &mut Fleet, inviter: &str) -> Result<String, LabError> {
    let mut link: InviteLink = fleet.computer(inviter).invite("member")?.parse().unwrap();
    assert_eq!(link.relays.len(), 1, "it carries the relay");
    link.peers.truncate(1);
    Ok(link.to_string())
}
