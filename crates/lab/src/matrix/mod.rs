//! Every kind of router against every other: whether machines reach each other, by which kind of path, and how fast.

mod document;
mod exchange;
mod trouble;

use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    LabError,
    five::{CLAN, ping_once},
    fleet::{Computer, Fleet},
    nat::{Nat, SiteSpec},
    story::until,
};

pub use document::{Conditions, Times};
pub use trouble::{Troubles, trouble};

/// Who founds the clan and is a relay of it, on a public address.
pub const RELAY: &str = "relay";
/// A second relay.
pub const SPARE: &str = "spare";
/// A computer with two uplinks: a port-restricted router, and a full cone.
pub const ROVER: &str = "rover";
/// Longest that two machines may take to meet.
const MEET: Duration = Duration::from_secs(30);
/// How long a direct path may take to appear where there can be one; what there is then counts.
const SETTLE: Duration = Duration::from_secs(15);
/// The promise for pairs that need a relay.
pub const RELAYED_WITHIN: Duration = Duration::from_secs(2);
/// The promise for streams of a machine that changes its uplink, for 95 of 100.
pub const SWITCHED_WITHIN: Duration = Duration::from_secs(2);

/// The relays, `each` computers behind every kind of router, and one that changes its uplink.
pub fn specs(each: usize) -> Vec<SiteSpec> {
    let behind = Nat::ALL.into_iter().flat_map(|nat| (0..each).map(move |n| SiteSpec::new(name(nat, n), nat)));
    let rover = SiteSpec { name: ROVER.to_owned(), uplinks: vec![Nat::PortRestricted, Nat::FullCone] };
    let relays = [RELAY, SPARE].map(|name| SiteSpec::new(name, Nat::Open));
    relays.into_iter().chain(behind).chain([rover]).collect()
}

fn name(nat: Nat, number: usize) -> String {
    let short = match nat {
        Nat::Open => "open",
        Nat::FullCone => "cone",
        Nat::AddressRestricted => "addr",
        Nat::PortRestricted => "port",
        Nat::Carrier => "carr",
        Nat::Symmetric => "symm",
        Nat::UdpBlocked => "noudp",
    };
    format!("{short}{number}")
}

/// Two machines behind their routers.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The newer machine, and the older.
    pub ends: [String; 2],
    /// What they are behind.
    pub nats: [Nat; 2],
    /// From the newer one's admission until a ping by name came back.
    pub first_packet: Duration,
    /// The kind of path that the newer one uses to the older, as `clan machines` says; empty if there is none.
    pub path: String,
}

impl Pair {
    /// Whether their packets go straight from one to the other: over UDP of their own, or inside a QUIC connection that does.
    pub fn is_direct(&self) -> bool {
        matches!(self.path.as_str(), "direct" | "quic_direct")
    }

    /// Whether their packets go through a relay.
    pub fn is_relayed(&self) -> bool {
        self.path == "relayed"
    }

    /// Whether no better path is to be waited for.
    fn is_settled(&self) -> bool {
        self.path == "direct" || self.is_relayed() && !self.could_be_direct()
    }

    /// Whether they could.
    pub fn could_be_direct(&self) -> bool {
        self.nats[0].meets(self.nats[1])
    }
}

/// How long a running TCP stream between two machines stood still when something happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Pause {
    /// What happened.
    pub what: &'static str,
    /// Whose stream.
    pub ends: [String; 2],
    /// The kind of path before, and after.
    pub paths: [String; 2],
    /// The longest time in which nothing went round.
    pub lasted: Duration,
}

/// A heap of bytes that arrived unchanged.
#[derive(Debug, Clone, PartialEq)]
pub struct Carried {
    /// Under which conditions.
    pub what: &'static str,
    /// Between whom.
    pub ends: [String; 2],
    /// The kind of path at the end.
    pub path: String,
    /// How many.
    pub bytes: usize,
    /// In which time.
    pub took: Duration,
}

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// All pairs but those of the relays.
    pub pairs: Vec<Pair>,
    /// From the typing of the link until admission, by machine.
    pub joined: Vec<(String, Nat, Duration)>,
    /// Streams that were disturbed.
    pub pauses: Vec<Pause>,
    /// What bad wires carried.
    pub carried: Vec<Carried>,
}

/// Founds a clan at a relay and lets everybody in, one after the other; each newcomer pings everybody at once.
///
/// # Errors
/// When somebody is not let in, or two machines do not meet.
pub fn tell(fleet: &mut Fleet) -> Result<Report, LabError> {
    let screen = fleet.screen().clone();
    let mut report = Report::default();
    let nats: BTreeMap<String, Nat> = fleet
        .world()
        .sites()
        .iter()
        .filter_map(|site| Some((site.name().to_owned(), site.uplinks().first()?.nat)))
        .collect();
    let began = Instant::now();
    screen.step(1, "The relay founds a clan");
    fleet.computer(RELAY).found(CLAN)?;
    // Right after founding the machine has not told its addresses yet.
    until(MEET, "a relay", || fleet.computer(RELAY).clan(&["relay", "on"])?.success().map(Some))?;
    fleet
        .computer(RELAY)
        .clan(&["rule", "add", "streams", "--from", "everybody", "--to", "everybody", "--ports", exchange::PORTS])?
        .success()?;
    let link = fleet.computer(RELAY).invite("admin")?;
    fleet.computer(SPARE).join(&link)?.success()?;
    until(MEET, "a second relay", || fleet.computer(SPARE).clan(&["relay", "on"])?.success().map(Some))?;
    screen.seen("two machines pass packets on", began.elapsed());

    let began = Instant::now();
    screen.step(2, "Everybody joins, and reaches everybody who is there");
    let mut here: Vec<String> = Vec::new();
    for newcomer in nats.keys().filter(|name| ![RELAY, SPARE].contains(&name.as_str())) {
        let link = fleet.computer(RELAY).invite("admin")?;
        let typed = Instant::now();
        fleet.computer(newcomer).join(&link)?.success()?;
        report.joined.push((newcomer.clone(), nats[newcomer], typed.elapsed()));
        let admitted = Instant::now();
        let computer: &Computer = fleet.computer(newcomer);
        let met: Vec<Result<Duration, LabError>> = thread::scope(|scope| {
            let pinging: Vec<_> =
                here.iter().map(|other| scope.spawn(move || first_answer(computer, other, admitted))).collect();
            pinging.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect()
        });
        for (other, met) in here.iter().zip(met) {
            report.pairs.push(Pair {
                ends: [newcomer.clone(), other.clone()],
                nats: [nats[newcomer], nats[other]],
                first_packet: met?,
                path: String::new(),
            });
        }
        here.push(newcomer.clone());
    }
    screen.seen(&format!("{} pairs", report.pairs.len()), began.elapsed());

    let began = Instant::now();
    screen.step(3, "Paths settle");
    for name in &here {
        let computer = fleet.computer(name);
        let mut mine: Vec<&mut Pair> = report.pairs.iter_mut().filter(|pair| pair.ends[0] == *name).collect();
        loop {
            let machines = computer.clan_json(&["machines"])?;
            for pair in &mut mine {
                pair.path = path_in(&machines, &pair.ends[1]).unwrap_or_default();
            }
            if mine.iter().all(|pair| pair.is_settled()) || began.elapsed() > SETTLE {
                break;
            }
            thread::sleep(Duration::from_millis(300));
        }
    }
    screen.seen("what `clan machines` says counts", began.elapsed());
    Ok(report)
}

fn panicked() -> LabError {
    LabError::Promise("a thread panicked".into())
}

fn path_in(machines: &Value, name: &str) -> Option<String> {
    Some(machine_in(machines, name)?["path"]["kind"].as_str()?.to_owned())
}

fn machine_in<'a>(machines: &'a Value, name: &str) -> Option<&'a Value> {
    machines.as_array()?.iter().find(|machine| machine["name"] == name)
}

fn address_in(machines: &Value, name: &str) -> Option<Ipv6Addr> {
    machine_in(machines, name)?["address"].as_str()?.parse().ok()
}

fn first_answer(from: &Computer, to: &str, since: Instant) -> Result<Duration, LabError> {
    until(MEET, &format!("an answer of {to} to {}", from.name()), || Ok(ping_once(from, to)?.map(|()| since.elapsed())))
}
