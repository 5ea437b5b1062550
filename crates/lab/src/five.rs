//! A clan of five machines behind as many kinds of router, told through the real commands and measured: who is let in how fast,
//! and how each reaches each.
//!
//! The first has a public address, and so can be a relay; the last is invited by the one behind the hardest NAT.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    LabError, Screen,
    fleet::{Computer, Fleet},
    nat::{Nat, SiteSpec},
    process::end,
    screen::seconds,
    story::until,
};

/// The clan that is founded.
pub const CLAN: &str = "village";
/// Who founds it.
pub const FOUNDER: &str = "ann";

/// How long a newcomer may take to reach the inviter's machine by name.
const FIRST_PING: Duration = Duration::from_secs(20);
/// How long any two machines may take to meet.
const MEET: Duration = Duration::from_secs(40);
/// How long the best path may take to appear; what there is then counts.
const SETTLE: Duration = Duration::from_secs(6);
/// How long a throughput is measured.
const MEASURE: Duration = Duration::from_secs(2);
const PINGS: &str = "5";

/// The other computers.
const OTHERS: [&str; 4] = ["bob", "cleo", "dan", "eve"];
/// Who invites the last of them: behind a NAT that nobody gets through uncalled, unless something else is asked for.
pub const HIDDEN: &str = "dan";
/// What stands before the others unless something else is asked for.
pub const ROUTERS: [Nat; 4] = [Nat::FullCone, Nat::PortRestricted, Nat::Symmetric, Nat::UdpBlocked];

/// The computers: the founder's has a public address, the others are behind these routers, in turn.
pub fn specs(routers: &[Nat]) -> Vec<SiteSpec> {
    let routers = routers.iter().copied().chain(ROUTERS.into_iter().skip(routers.len()));
    let others = OTHERS.into_iter().zip(routers).map(|(name, nat)| SiteSpec::new(name, nat));
    std::iter::once(SiteSpec::new(FOUNDER, Nat::Open)).chain(others).collect()
}

/// A newcomer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Who.
    pub name: String,
    /// Who invited them.
    pub by: String,
    /// From the moment that the link was typed until the clan let them in.
    pub admitted: Duration,
    /// The same until the inviter's machine answered the first ping, by name.
    pub first_ping: Duration,
}

/// Two machines.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The names.
    pub ends: [String; 2],
    /// The kind of path that each uses to the other.
    pub paths: [Way; 2],
    /// Median round trip of pings by name.
    pub rtt: Duration,
    /// Of one TCP stream, bits per second.
    pub throughput: f64,
}

/// How a machine reaches another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// As the manager's status names it: `direct`, `quic_direct`, `relayed`.
    pub kind: String,
    /// Why it is no better one; a sentence.
    pub why: String,
}

impl Way {
    fn words(&self) -> &str {
        match self.kind.as_str() {
            "quic_direct" => "direct (QUIC)",
            kind => kind,
        }
    }
}

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// What stands before each computer.
    pub routers: BTreeMap<String, Nat>,
    /// The newcomers.
    pub joined: Vec<Joined>,
    /// All pairs.
    pub pairs: Vec<Pair>,
}

/// Tells it all on a fleet whose daemons run.
///
/// # Errors
/// At the first promise that is not kept.
pub fn tell(fleet: &mut Fleet) -> Result<Report, LabError> {
    let screen = fleet.screen().clone();
    let names: Vec<String> = fleet.computers().map(|computer| computer.name().to_owned()).collect();
    let mut report = Report { routers: routers(fleet), ..Report::default() };

    let began = Instant::now();
    screen.step(1, &format!("{FOUNDER} founds a clan; the machine has a public address, and becomes a relay"));
    fleet.computer(FOUNDER).found(CLAN)?;
    fleet.computer(FOUNDER).clan(&["relay", "on"])?.success()?;
    screen.seen(&format!("{FOUNDER}.{CLAN}.clan is its first machine"), began.elapsed());

    let began = Instant::now();
    screen.step(2, &format!("Everybody is invited, the last one by {HIDDEN}, and joins"));
    for name in names.iter().filter(|name| *name != FOUNDER) {
        let by = if Some(name) == names.last() { HIDDEN } else { FOUNDER };
        let role = if name == HIDDEN { "admin" } else { "member" };
        let link = fleet.computer(by).invite(role)?;
        report.joined.push(join(fleet.computer(name), by, &link)?);
    }
    screen.seen(&format!("{} machines are in the clan", names.len()), began.elapsed());

    let began = Instant::now();
    screen.step(3, "Everybody reaches everybody by name");
    for from in &names {
        for to in names.iter().filter(|to| *to != from) {
            until(MEET, &format!("an answer of {to} to {from}"), || ping_once(fleet.computer(from), to))?;
        }
    }
    screen.seen(&format!("{} ways, each with a ping by name", names.len() * (names.len() - 1)), began.elapsed());

    let began = Instant::now();
    screen.step(4, "How they reach each other");
    // What is neither a service of the clan nor one's own machine is not to be reached without a rule.
    let rule = ["rule", "add", "measure", "--from", "everybody", "--to", "everybody", "--ports", "tcp/5201"];
    fleet.computer(FOUNDER).clan(&rule)?.success()?;
    let servers = names.iter().map(|name| serve(fleet.computer(name))).collect::<Result<Vec<_>, _>>()?;
    for (at, one) in names.iter().enumerate() {
        for other in &names[at + 1..] {
            let of = |name: &str| report.routers.get(name).copied().unwrap_or(Nat::Open);
            let may_meet = of(one).meets(of(other));
            report.pairs.push(measure(fleet, one, other, may_meet)?);
        }
    }
    drop(servers);
    screen
        .seen(&format!("{} pairs measured, {} s of TCP each", report.pairs.len(), MEASURE.as_secs()), began.elapsed());
    Ok(report)
}

impl Report {
    /// The tables that end it.
    pub fn print(&self, screen: &Screen) {
        screen.heading("Who was let in");
        screen.line(&format!(
            "   {:<10} {:<20} {:<12} {:>16} {:>18}",
            "MACHINE", "BEHIND", "INVITED BY", "LINK → ADMITTED", "LINK → FIRST PING"
        ));
        for joined in &self.joined {
            screen.line(&format!(
                "   {:<10} {:<20} {:<12} {:>16} {:>18}",
                joined.name,
                self.router(&joined.name),
                joined.by,
                seconds(joined.admitted),
                seconds(joined.first_ping)
            ));
        }
        screen.heading("How they reach each other");
        screen
            .line(&format!("   {:<12} {:<32} {:<26} {:>10} {:>14}", "MACHINES", "BEHIND", "PATH", "ROUND TRIP", "TCP"));
        for pair in &self.pairs {
            let [one, other] = pair.paths.each_ref().map(Way::words);
            let path = if one == other { one.to_owned() } else { format!("{one} / {other}") };
            screen.line(&format!(
                "   {:<12} {:<32} {path:<26} {:>7.2} ms {:>7.0} Mbit/s",
                pair.ends.join(" – "),
                pair.ends.each_ref().map(|name| self.router(name)).join(" – "),
                pair.rtt.as_secs_f64() * 1e3,
                pair.throughput / 1e6
            ));
        }
        let reasons: BTreeSet<&str> =
            self.pairs.iter().flat_map(|pair| &pair.paths).map(|way| way.why.as_str()).collect();
        screen.line("");
        reasons.iter().for_each(|why| screen.line(&format!("   {why}")));
    }

    fn router(&self, name: &str) -> &'static str {
        self.routers.get(name).map_or("?", |nat| nat.name())
    }
}

fn routers(fleet: &Fleet) -> BTreeMap<String, Nat> {
    let of = |site: &crate::nat::Site| Some((site.name().to_owned(), site.uplinks().first()?.nat));
    fleet.world().sites().iter().filter_map(of).collect()
}

fn join(computer: &Computer, by: &str, link: &str) -> Result<Joined, LabError> {
    let began = Instant::now();
    computer.join(link)?.success()?;
    let admitted = began.elapsed();
    let first = format!("an answer of {by} to {}", computer.name());
    until(FIRST_PING, &first, || ping_once(computer, by))?;
    Ok(Joined { name: computer.name().to_owned(), by: by.to_owned(), admitted, first_ping: began.elapsed() })
}

/// The name of a machine in the clan.
pub fn host_name(machine: &str) -> String {
    format!("{machine}.{CLAN}.clan")
}

/// Whether a machine answers one ping, by name.
///
/// # Errors
/// When ping cannot be run.
pub fn ping_once(from: &Computer, to: &str) -> Result<Option<()>, LabError> {
    let finished = from.run_as_root("ping", &["-c", "1", "-W", "1", &host_name(to)], Duration::from_secs(15))?;
    Ok(finished.status.success().then_some(()))
}

/// The kind of path that `machine` is reached by, as a manager's status has it.
///
/// # Errors
/// When the manager does not answer.
pub fn path_kind(from: &Computer, machine: &str) -> Result<Option<String>, LabError> {
    Ok(way(from, machine)?.map(|way| way.kind))
}

/// How `machine` is reached, as a manager's status has it.
///
/// # Errors
/// When the manager does not answer.
pub fn way(from: &Computer, machine: &str) -> Result<Option<Way>, LabError> {
    let machines = from.clan_json(&["machines"])?;
    let all = machines.as_array().map(Vec::as_slice).unwrap_or_default();
    let path = all.iter().find(|m| m["name"] == machine).map(|m| &m["path"]);
    let text = |path: &Value, field: &str| path[field].as_str().map(str::to_owned);
    Ok(path.and_then(|path| Some(Way { kind: text(path, "kind")?, why: text(path, "why")? })))
}

fn measure(fleet: &mut Fleet, one: &str, other: &str, may_meet: bool) -> Result<Pair, LabError> {
    let best = || Ok((path_kind(fleet.computer(one), other)?.as_deref() == Some("direct")).then_some(()));
    if may_meet {
        let _ = until(SETTLE, "a direct path", best);
    }
    let path = |fleet: &mut Fleet, from: &str, to: &str| {
        let what = format!("a path from {from} to {to}");
        until(MEET, &what, || way(fleet.computer(from), to))
    };
    let rtt = pings(fleet.computer(one), other)?;
    let throughput = stream(fleet.computer(one), other)?;
    let paths = [path(fleet, one, other)?, path(fleet, other, one)?];
    Ok(Pair { ends: [one.to_owned(), other.to_owned()], paths, rtt, throughput })
}

fn pings(from: &Computer, to: &str) -> Result<Duration, LabError> {
    let finished =
        from.run_as_root("ping", &["-c", PINGS, "-i", "0.2", "-W", "2", &host_name(to)], Duration::from_secs(30))?;
    median_of_pings(&finished.stdout)
        .ok_or_else(|| LabError::Promise(format!("{to} does not answer: {}", finished.output())))
}

fn median_of_pings(output: &str) -> Option<Duration> {
    let time = |line: &str| line.split("time=").nth(1)?.split(' ').next()?.parse::<f64>().ok();
    let mut times: Vec<f64> = output.lines().filter_map(time).collect();
    times.sort_by(f64::total_cmp);
    Some(Duration::from_secs_f64(times.get(times.len() / 2)? / 1e3))
}

/// Bits per second that one TCP stream carries.
fn stream(from: &Computer, to: &str) -> Result<f64, LabError> {
    let span = MEASURE.as_secs().to_string();
    let arguments = ["-c", &host_name(to), "-t", &span, "-J", "--connect-timeout", "5000"];
    let finished = from.run_as_root("iperf3", &arguments, MEASURE + Duration::from_secs(20))?;
    let answer: Value = finished.json()?;
    answer["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .ok_or_else(|| LabError::Promise(format!("no stream from {} to {to}: {}", from.name(), answer["error"])))
}

/// An iperf3 server, until it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

fn serve(computer: &Computer) -> Result<Server, LabError> {
    let mut command = computer.place().root_command("iperf3")?;
    command.arg("-s").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(LabError::io("start iperf3 (package iperf3)"))?;
    let began = Instant::now();
    while !listens(child.id(), 5201) {
        if !matches!(child.try_wait(), Ok(None)) || began.elapsed() > Duration::from_secs(10) {
            end(&mut child);
            return Err(LabError::Promise(format!("iperf3 does not listen on {}", computer.name())));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(Server(child))
}

/// Whether anything in a process's network listens on a TCP port.
fn listens(pid: u32, port: u16) -> bool {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp6")).unwrap_or_default();
    let (port, listening) = (format!(":{port:04X}"), "0A");
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(
        |fields| matches!(fields.as_slice(), [_, local, _, state, ..] if local.ends_with(&port) && *state == listening),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_ping_counts() {
        let output =
            "64 bytes from x: icmp_seq=1 ttl=64 time=9.00 ms\n64 bytes: time=1.00 ms\n64 bytes: time=2.50 ms\n";
        assert_eq!(median_of_pings(output), Some(Duration::from_micros(2500)));
        assert_eq!(median_of_pings("nothing"), None);
    }
}
