//! What running streams survive: another uplink, the death of a relay, and bad wires.

use std::{
    net::Ipv6Addr,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    Carried, MEET, Pause, RELAY, ROVER, Report, SETTLE, SPARE, address_in,
    exchange::{self, Exchange},
    machine_in, name, path_in,
};
use crate::{
    LabError,
    five::ping_once,
    fleet::Fleet,
    nat::{Nat, Site},
    story::until,
};

/// Longest that a stream may stand still before it counts as broken.
const BROKEN: Duration = Duration::from_secs(90);
/// How long streams are watched after they went on.
const WATCHED: Duration = Duration::from_secs(4);
/// What bad wires have to carry, and for how long they may.
const HEAP: usize = 1 << 20;
const HEAP_WITHIN: Duration = Duration::from_secs(100);
/// The least that IPv6 allows.
const SMALL: u16 = 1280;
const USUAL: u16 = 1500;
/// In thousandths, on every way between two sites.
const LOST: u16 = 50;

/// How often each trouble is made.
#[derive(Debug, Clone, Copy)]
pub struct Troubles {
    /// Changes of the rover's uplink.
    pub switches: usize,
    /// Deaths of a relay, of each kind.
    pub deaths: usize,
}

/// Makes trouble, after [`super::tell`].
///
/// # Errors
/// When a stream does not survive it.
pub fn trouble(fleet: &mut Fleet, report: &mut Report, troubles: Troubles) -> Result<(), LabError> {
    roam(fleet, report, troubles.switches)?;
    bad_wires(fleet, report)?;
    relays_die(fleet, report, troubles.deaths)
}

/// Streams from one machine to others.
struct Streams {
    from: String,
    to: Vec<(String, Exchange)>,
}

impl Streams {
    fn start(fleet: &mut Fleet, from: &str, to: &[String], port: u16) -> Result<Self, LabError> {
        let mut streams = Vec::new();
        for (port, other) in (port..).zip(to) {
            let address = address(fleet, from, other)?;
            let (near, far) = (fleet.world().site(from), fleet.world().site(other));
            streams.push((other.clone(), Exchange::start(near, far, address, port)?));
        }
        Ok(Self { from: from.to_owned(), to: streams })
    }

    fn paths(&self, fleet: &mut Fleet) -> Result<Vec<String>, LabError> {
        let machines = fleet.computer(&self.from).clan_json(&["machines"])?;
        Ok(self.to.iter().map(|(other, _)| path_in(&machines, other).unwrap_or_default()).collect())
    }

    /// Waits until what was disturbed goes on, and writes down how long it did not.
    fn survive(
        &self,
        fleet: &mut Fleet,
        report: &mut Report,
        what: &'static str,
        before: &[String],
        since: Instant,
    ) -> Result<(), LabError> {
        let disturbed = Instant::now();
        for (other, exchange) in &self.to {
            until(BROKEN, &format!("the stream from {} to {other} going on ({what})", self.from), || {
                Ok(exchange.goes_on_after(disturbed).then_some(()))
            })?;
        }
        thread::sleep(WATCHED);
        let after = self.paths(fleet)?;
        let mut told = Vec::new();
        for ((other, exchange), paths) in self.to.iter().zip(before.iter().zip(after)) {
            let pause = Pause {
                what,
                ends: [self.from.clone(), other.clone()],
                paths: [paths.0.clone(), paths.1],
                lasted: exchange.longest_pause(since),
            };
            told.push(format!(
                "{}–{other} ({} → {}): {} ms",
                self.from,
                pause.paths[0],
                pause.paths[1],
                pause.lasted.as_millis()
            ));
            report.pauses.push(pause);
        }
        fleet.screen().said(&told.join(", "));
        Ok(())
    }
}

/// Changes the rover's uplink again and again, under streams to machines that are reached in different ways.
fn roam(fleet: &mut Fleet, report: &mut Report, switches: usize) -> Result<(), LabError> {
    let (screen, began) = (fleet.screen().clone(), Instant::now());
    screen.step(4, "The rover changes its uplink under running streams");
    let others = [Nat::Open, Nat::PortRestricted, Nat::Symmetric].map(|nat| (name(nat, 0), nat));
    let streams = Streams::start(fleet, ROVER, &others.clone().map(|(other, _)| other), 7000)?;
    let site = fleet.world().site(ROVER).clone();
    for number in 0..switches {
        let uplink = |number: usize| &site.uplinks()[number % site.uplinks().len()];
        settle(fleet, &streams, &others.clone().map(|(_, nat)| uplink(number).nat.meets(nat)))?;
        let before = streams.paths(fleet)?;
        let since = Instant::now();
        site.switch_to((number + 1) % site.uplinks().len())?;
        streams.survive(fleet, report, "uplink switch", &before, since)?;
    }
    screen.seen(&format!("{switches} times"), began.elapsed());
    Ok(())
}

/// Waits until those who can are reached directly; what there is then counts.
fn settle(fleet: &mut Fleet, streams: &Streams, may_meet: &[bool]) -> Result<(), LabError> {
    let began = Instant::now();
    while began.elapsed() < SETTLE {
        let paths = streams.paths(fleet)?;
        if paths.iter().zip(may_meet).all(|(path, direct)| path == if *direct { "direct" } else { "relayed" }) {
            break;
        }
        thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

/// Lets the relay that a pair uses die, in two ways: its controller is killed, or its wire is cut, so that nothing says that it is
/// gone.
fn relays_die(fleet: &mut Fleet, report: &mut Report, deaths: usize) -> Result<(), LabError> {
    let (screen, began) = (fleet.screen().clone(), Instant::now());
    screen.step(6, "Relays die under running streams");
    let [open, cone, port, symmetric, blocked] =
        [Nat::Open, Nat::FullCone, Nat::PortRestricted, Nat::Symmetric, Nat::UdpBlocked].map(|nat| name(nat, 0));
    let direct = Streams::start(fleet, &open, &[cone], 7010)?;
    let relayed = Streams::start(fleet, &blocked, &[port.clone(), symmetric.clone()], 7020)?;
    for number in 0..2 * deaths {
        settle(fleet, &relayed, &[false, false])?;
        let (before_direct, before) = (direct.paths(fleet)?, relayed.paths(fleet)?);
        let victim = until(BROKEN, "a relay in use", || relay_used(fleet, &blocked, &port))?;
        let (what, since) = if number % 2 == 0 {
            let since = Instant::now();
            fleet.computer(&victim).kill_controller();
            ("relay killed", since)
        } else {
            let since = Instant::now();
            fleet.world().site(&victim).unplug()?;
            ("relay cut off", since)
        };
        screen.said(&format!("{victim}: {what}"));
        direct.survive(fleet, report, what, &before_direct, since)?;
        relayed.survive(fleet, report, what, &before, since)?;
        if number % 2 == 0 {
            fleet.computer(&victim).start_controller(&[])?;
        } else {
            fleet.world().site(&victim).switch_to(0)?;
        }
        let back = format!("{victim} coming back");
        until(MEET, &back, || ping_once(fleet.computer(&victim), &open))?;
    }
    screen.seen(&format!("{} times", 2 * deaths), began.elapsed());
    Ok(())
}

/// Through which relay packets go, if through any.
fn relay_used(fleet: &mut Fleet, from: &str, to: &str) -> Result<Option<String>, LabError> {
    let machines = fleet.computer(from).clan_json(&["machines"])?;
    let why = machine_in(&machines, to).and_then(|machine: &Value| machine["path"]["why"].as_str()).unwrap_or_default();
    Ok([RELAY, SPARE].into_iter().find(|relay| why.contains(&format!("via {relay},"))).map(str::to_owned))
}

/// Sends heaps of bytes over wires that lose packets, or take small ones only.
fn bad_wires(fleet: &mut Fleet, report: &mut Report) -> Result<(), LabError> {
    let (screen, began) = (fleet.screen().clone(), Instant::now());
    screen.step(5, "Bad wires");
    let [open, port, symmetric, blocked] =
        [Nat::Open, Nat::PortRestricted, Nat::Symmetric, Nat::UdpBlocked].map(|nat| name(nat, 0));
    let pairs = [[open, port.clone()], [symmetric, port.clone()], [blocked, port]];
    carry_all(fleet, report, "good wires", &pairs)?;
    fleet.world().internet().lose(LOST)?;
    let carried = carry_all(fleet, report, "5 % lost", &pairs);
    fleet.world().internet().lose(0)?;
    carried?;
    // Also the relays' own wires, as if the whole way were like that.
    let sites: Vec<Site> = fleet.world().sites().to_vec();
    sites.iter().try_for_each(|site| site.set_mtu(0, SMALL))?;
    let carried = carry_all(fleet, report, "1280 bytes at most", &pairs).and_then(|()| {
        // Those who were connected before may know something that a newcomer to such a wire does not.
        for pair in &pairs {
            fleet.computer(&pair[0]).stop_controller()?;
            fleet.computer(&pair[0]).start_controller(&[])?;
        }
        carry_all(fleet, report, "1280 bytes at most, from the start", &pairs)
    });
    sites.iter().try_for_each(|site| site.set_mtu(0, USUAL))?;
    carried?;
    screen.seen("everything arrived as it was sent", began.elapsed());
    Ok(())
}

fn carry_all(
    fleet: &mut Fleet,
    report: &mut Report,
    what: &'static str,
    pairs: &[[String; 2]],
) -> Result<(), LabError> {
    for (port, ends) in (7030..).zip(pairs) {
        let [from, to] = ends;
        until(MEET, &format!("an answer of {to} to {from} ({what})"), || ping_once(fleet.computer(from), to))?;
        let address = address(fleet, from, to)?;
        let world = fleet.world();
        let took = exchange::carry(world.site(from), world.site(to), address, port, HEAP, HEAP_WITHIN)
            .map_err(|error| LabError::Promise(format!("{what}: {}", error.chain())))?;
        let machines = fleet.computer(from).clan_json(&["machines"])?;
        let path = path_in(&machines, to).unwrap_or_default();
        fleet.screen().said(&format!("{what}: {from}–{to} ({path}): {} ms", took.as_millis()));
        report.carried.push(Carried { what, ends: ends.clone(), path, bytes: HEAP, took });
    }
    Ok(())
}

fn address(fleet: &mut Fleet, asked: &str, of: &str) -> Result<Ipv6Addr, LabError> {
    let what = format!("{asked} knowing an address of {of}");
    until(MEET, &what, || Ok(address_in(&fleet.computer(asked).clan_json(&["machines"])?, of)))
}
