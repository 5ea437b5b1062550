//! A clan over long and lossy wires. Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::time::Duration;

use clan_lab::{
    LabError,
    five::{CLAN, host_name, path_kind, ping_once},
    fleet::{Computer, Fleet},
    nat::{Nat, SiteSpec},
    story::until,
};
use common::{flow::Flow, with_fleet};

const LIMIT: Duration = Duration::from_secs(40);
const PORT: u16 = 7000;
/// One way: what lies between two continents.
const FAR: Duration = Duration::from_millis(120);
/// How much later than it must an answer may come, on a busy machine.
const LATE: Duration = Duration::from_millis(200);

#[test]
fn a_clan_works_between_continents_and_over_lossy_wires() {
    let specs = [SiteSpec::new("near", Nat::Open), SiteSpec::new("far", Nat::PortRestricted)];
    with_fleet("clandelay", &specs, &["controller", "manager"], tell);
}

fn tell(fleet: &mut Fleet) -> Result<(), LabError> {
    let screen = fleet.screen().clone();
    let delay = fleet.world().internet().delay(fleet.world().site("far"), 0, FAR)?;
    let public = fleet.world().site("near").uplinks()[0].public.to_string();
    let bare = round_trip(fleet.computer("far"), &public)?;
    screen.said(&format!("the bare wire takes {bare:.1?}"));
    demand(bare >= 2 * FAR && bare < 2 * FAR + LATE, "the wire does not take the time that it should")?;

    fleet.computer("near").found(CLAN)?;
    let ports = format!("tcp/{PORT}");
    let rule = ["rule", "add", "stream", "--from", "everybody", "--to", "everybody", "--ports", ports.as_str()];
    fleet.computer("near").clan(&rule)?.success()?;
    let link = fleet.computer("near").invite("member")?;
    fleet.computer("far").join(&link)?.success()?;
    until(LIMIT, "the machines meeting", || ping_once(fleet.computer("far"), "near"))?;
    until(LIMIT, "the direct path", || direct(fleet))?;
    let through = round_trip(fleet.computer("far"), &host_name("near"))?;
    screen.said(&format!("through the mesh it takes {through:.1?}"));
    demand(through >= 2 * FAR && through < 2 * FAR + LATE, "the mesh adds too much to it")?;

    let stream = Flow::start(fleet, "far", "near", PORT)?;
    for (loss, what) in [(20, "with 2 % lost each way"), (100, "with 10 % lost each way"), (0, "with nothing lost")] {
        fleet.world().internet().lose(loss)?;
        stream.since();
        (0..10).try_for_each(|_| stream.flows())?;
        let (bytes, pause) = stream.since();
        screen.said(&format!("{what}: {} KiB, longest pause {pause:.1?}", bytes >> 10));
        // Where a tenth is lost each way, a probe in five has no answer: that is no reason to leave a path for good.
        until(LIMIT, "the direct path", || direct(fleet))?;
    }

    drop(delay);
    let bare = round_trip(fleet.computer("far"), &public)?;
    demand(bare < FAR, "the wire still takes its time")?;
    stream.flows()
}

fn direct(fleet: &mut Fleet) -> Result<Option<()>, LabError> {
    Ok((path_kind(fleet.computer("far"), "near")?.as_deref() == Some("direct")).then_some(()))
}

/// The least of a few pings.
fn round_trip(from: &Computer, to: &str) -> Result<Duration, LabError> {
    let pinged = from.run_as_root("ping", &["-c", "4", "-i", "0.2", "-W", "3", to], LIMIT)?.success()?.stdout;
    let times = pinged.lines().filter_map(|line| line.split("time=").nth(1)?.split(' ').next()?.parse::<f64>().ok());
    let least = times.reduce(f64::min).ok_or_else(|| LabError::Promise(format!("no ping was answered: {pinged}")))?;
    Ok(Duration::from_secs_f64(least / 1e3))
}

fn demand(kept: bool, otherwise: &str) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(otherwise.into())) }
}
