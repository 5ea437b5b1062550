//! A clan whose founder is gone goes on: who was invited gets in by any member, and an admin decides. Needs root, for network
//! namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::time::{Duration, Instant};

use clan_lab::{
    LabError,
    five::{CLAN, ping_once},
    fleet::Fleet,
    nat::{Nat, SiteSpec},
    story::until,
};
use common::{flow::Flow, with_fleet};
use serde_json::Value;

/// Every reachable member drops a revoked machine's packets within this time of the command.
const CUT_OFF: Duration = Duration::from_secs(3);
/// How long other things may take.
const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 7000;

#[test]
fn with_all_founders_stopped_members_admit_and_an_admin_decides() {
    let specs: Vec<SiteSpec> =
        ["founder", "admin", "member", "early", "late"].map(|name| SiteSpec::new(name, Nat::Open)).into();
    with_fleet("clanalone", &specs, &["controller", "manager"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    fleet.computer("founder").found(CLAN)?;
    // For the stream that a revocation ends: what is no service of the clan takes a rule.
    let ports = format!("tcp/{PORT}");
    let rule = ["rule", "add", "stream", "--from", "everybody", "--to", "everybody", "--ports", ports.as_str()];
    fleet.computer("founder").clan(&rule)?.success()?;
    for (name, role) in [("admin", "admin"), ("member", "member")] {
        let link = fleet.computer("founder").invite(role)?;
        fleet.computer(name).join(&link)?.success()?;
    }
    for (one, other) in [("admin", "member"), ("member", "admin")] {
        until(LIMIT, "the machines meeting", || ping_once(fleet.computer(one), other))?;
    }

    screen.heading("Invited by an admin, let in by a member: founder and admin are off");
    let early = fleet.computer("admin").invite("member")?;
    let invited =
        |v: &Value| v.as_array().is_some_and(|all| all.iter().any(|i| i["by"] == "admin" || i["by_name"] == "admin"));
    until(LIMIT, "the member hearing of the invite", || {
        Ok(invited(&fleet.computer("member").clan_json(&["invites"])?).then_some(()))
    })?;
    fleet.computer("founder").stop()?;
    fleet.computer("admin").stop()?;
    let began = Instant::now();
    fleet.computer("early").join(&early)?.success()?;
    screen.seen("the newcomer is admitted by the member", began.elapsed());
    until(LIMIT, "the newcomer reaching the member", || ping_once(fleet.computer("early"), "member"))?;

    screen.heading("The admin decides: the founder stays off");
    fleet.computer("admin").start()?;
    until(LIMIT, "the admin hearing of the newcomer", || names(fleet, "admin", "early", true))?;
    let late = fleet.computer("admin").invite("member")?;
    fleet.computer("late").join(&late)?.success()?;
    for other in ["admin", "member", "early"] {
        until(LIMIT, "the last one reaching the others", || ping_once(fleet.computer("late"), other))?;
    }

    let stream = Flow::start(fleet, "early", "member", PORT)?;
    let began = Instant::now();
    fleet.computer("admin").clan(&["revoke", "person", "early", "--yes"])?.success()?;
    let command = began.elapsed();
    let died =
        until(LIMIT, "the end of the revoked person's stream", || Ok(stream.died()))?.saturating_duration_since(began);
    screen.seen(
        &format!(
            "the last byte of a revoked person's stream came {:.2} s after the command was typed",
            died.as_secs_f64()
        ),
        command,
    );
    if died > CUT_OFF {
        return Err(LabError::Promise(format!("a revoked machine's stream went on for {died:?}")));
    }
    for other in ["admin", "member", "late"] {
        until(LIMIT, "everybody hearing of it", || names(fleet, other, "early", false))?;
        let answers = ping_once(fleet.computer("early"), other)?;
        if answers.is_some() {
            return Err(LabError::Promise(format!("{other} still answers the revoked machine")));
        }
    }

    screen.heading("All that are left start at once: none has told the others where it is since");
    let left = ["admin", "member", "late"];
    for name in left {
        fleet.computer(name).stop_controller()?;
    }
    for name in left {
        fleet.computer(name).start_controller(&[])?;
    }
    let began = Instant::now();
    for (one, other) in [("admin", "member"), ("member", "admin"), ("late", "admin")] {
        until(LIMIT, "the machines finding each other again", || ping_once(fleet.computer(one), other))?;
    }
    screen.seen("they reach each other", began.elapsed());

    screen.heading("The founder comes back");
    let founder = fleet.computer("founder");
    founder.start()?;
    until(LIMIT, "the founder hearing of the last one", || names(fleet, "founder", "late", true))?;
    until(LIMIT, "the founder hearing of the revocation", || names(fleet, "founder", "early", false))?;
    Ok(())
}

/// Whether `asked` has a member of that name as it should be.
fn names(fleet: &mut Fleet, asked: &str, name: &str, there: bool) -> Result<Option<()>, LabError> {
    let members = fleet.computer(asked).clan_json(&["members"])?;
    let all = members.as_array().map(Vec::as_slice).unwrap_or_default();
    // An empty list means that nothing is known yet.
    let has = all.iter().any(|m| m["name"] == name);
    Ok((!all.is_empty() && has == there).then_some(()))
}
