//! Twenty clans founded at once on one computer, by one manager that may give so much memory to all of them, is killed, and
//! finds them again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, thread,
    time::{Duration, Instant},
};

use clan_lab::{Lab, LabError, Person, Screen, leftovers, story};
use serde_json::Value;

use crate::{Beside, MANAGER, emulators, kill, people::promise, text, vms, with_manager};

const CLANS: usize = 20;
/// So many fit into what the manager may give at first: each needs its 256 MiB, and QEMU 64.
const FIT: usize = 8;
const BUDGET: &str = "2600M";
const STOPPED: usize = 4;
const KILLED: usize = 2;
/// For all that happens at once, emulated, on two cores that others may use too.
const LIMIT: Duration = Duration::from_secs(420);
const LOOK_AGAIN: Duration = Duration::from_millis(400);

#[test]
fn twenty_at_once_all_come_up_or_wait_with_a_reason_and_none_is_lost() {
    with_manager("clanmany", &["--vm-memory", BUDGET], tell);
}

fn tell(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    let began = Instant::now();
    let names: Vec<String> = (0..CLANS).map(|n| format!("clan-{n}")).collect();
    let mut founding = names
        .iter()
        .map(|name| {
            let size = ["--memory", "256M", "--cpus", "1"];
            let who = ["create", name.as_str(), "--person", "founder", "--machine", "box"];
            Beside::start(lab, &[&who[..], &size[..]].concat())
        })
        .collect::<Result<Vec<_>, _>>()?;

    let founder = lab.person("founder");
    let seen = watch(founder, &mut founding, FIT)?;
    screen.seen(&format!("of {CLANS} clans founded at once, {FIT} have a machine that runs"), began.elapsed());
    promise(seen.told.iter().any(|why| why.contains("waits for its turn, number ")), || {
        format!("nobody waited for their turn: {:#?}", seen.told)
    })?;
    promise(seen.starting <= 2 * cores(), || format!("{} machines started at the same time", seen.starting))?;
    let short = vms(founder)?.iter().filter(|vm| hungry(vm)).count();
    promise(short == CLANS - FIT, || format!("{short} wait for memory"))?;
    let shown = founder.clan_quietly(&["vm", "list"])?.success()?.stdout;
    promise(shown.contains("waits for memory, number 12 of 12"), || {
        format!("the list does not say who waits: {shown}")
    })?;
    let of_templates = emulators(founder).into_iter().filter(|pid| went_on(*pid)).count();
    promise(of_templates >= FIT - cores(), || format!("{of_templates} of {FIT} went on from the template"))?;

    let began = Instant::now();
    let running: Vec<String> = vms(founder)?.iter().filter(|vm| runs(vm)).map(|vm| text(vm, "clan").into()).collect();
    let stopped = &running[..STOPPED];
    at_once(lab, "stop", stopped)?;
    let founder = lab.person("founder");
    story::until(LIMIT, "those that waited starting in the place of those that stopped", || {
        let all = vms(founder)?;
        let ready = all.iter().filter(|vm| runs(vm)).count() == FIT;
        Ok((ready && all.iter().filter(|vm| hungry(vm)).count() == CLANS - FIT - STOPPED).then_some(()))
    })?;
    screen.seen(&format!("{STOPPED} are stopped, and as many of those that waited run"), began.elapsed());

    let began = Instant::now();
    let before = pids(&vms(founder)?);
    founder.kill_manager()?;
    let dead: BTreeSet<u32> = before.values().copied().take(KILLED).collect();
    dead.iter().for_each(|pid| kill(*pid));
    drop(founding);
    founder.set_options(&[]);
    founder.start_manager(MANAGER)?;
    at_once(lab, "start", stopped)?;
    let founder = lab.person("founder");
    story::until(LIMIT, "all machines running", || {
        let status = founder.clan_json(&["status"])?;
        let online = status["clans"].as_array().into_iter().flatten().filter(|clan| clan["online"] == true).count();
        Ok((online == CLANS && vms(founder)?.iter().all(runs)).then_some(()))
    })?;
    let after = pids(&vms(founder)?);
    for (clan, pid) in before.iter().filter(|(_, pid)| !dead.contains(*pid)) {
        promise(after.get(clan) == Some(pid), || format!("{clan} was process {pid} and is {:?}", after.get(clan)))?;
    }
    promise(emulators(founder).len() == CLANS, || format!("emulators: {:?}", emulators(founder)))?;
    distinct(founder)?;
    let what = format!("the manager and {KILLED} machines are killed; with memory for all, all {CLANS} run");
    screen.seen(&what, began.elapsed());

    let began = Instant::now();
    for name in &names {
        founder.clan_quietly(&["vm", "delete", name.as_str(), "--force", "--yes"])?.success()?;
    }
    let manager = founder.manager_pid();
    let left = leftovers(lab.record()).processes;
    promise(left.iter().all(|pid| Some(*pid) == manager), || format!("beside the manager {manager:?} runs {left:?}"))?;
    let founder = lab.person("founder");
    let clans = fs::read_dir(founder.data().join("clans")).map_or(0, Iterator::count);
    promise(clans == 0, || format!("{clans} clans are left"))?;
    screen.seen("deleting them leaves nothing that runs", began.elapsed());
    Ok(())
}

/// Stops or starts some machines, and waits until all that is done.
fn at_once(lab: &mut Lab, verb: &str, clans: &[String]) -> Result<(), LabError> {
    let begun = clans.iter().map(|clan| Beside::start(lab, &["vm", verb, clan.as_str()]));
    for mut one in begun.collect::<Result<Vec<_>, _>>()? {
        let (status, said) = one.finish(LIMIT)?;
        promise(status.success(), || format!("a machine does not {verb}: {said}"))?;
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Seen {
    /// Most machines that started at the same time.
    starting: usize,
    /// All reasons that were given.
    told: BTreeSet<String>,
}

/// Looks on until so many run and all others wait for memory. Nobody may be without a reason for long, or fail.
fn watch(founder: &Person, founding: &mut [Beside], fit: usize) -> Result<Seen, LabError> {
    let (began, mut seen) = (Instant::now(), Seen::default());
    loop {
        for one in founding.iter_mut() {
            if let Some(status) = one.ended().filter(|status| !status.success()) {
                return Err(LabError::Promise(format!("a clan is not founded ({status}): {}", one.said())));
            }
        }
        let all = vms(founder)?;
        let starting = all.iter().filter(|vm| vm["state"] == "starting" && vm["pid"].is_u64()).count();
        seen.starting = seen.starting.max(starting);
        seen.told.extend(all.iter().filter_map(|vm| vm["reason"].as_str()).map(str::to_owned));
        let failed = all.iter().find(|vm| vm["state"] == "failed");
        promise(failed.is_none(), || format!("a machine is given up: {failed:?}"))?;
        let unexplained = all.iter().find(|vm| {
            vm["state"] == "starting" && vm["pid"].is_null() && vm["task"].is_null() && vm["reason"].is_null()
        });
        promise(unexplained.is_none(), || format!("nobody knows what a machine waits for: {unexplained:?}"))?;
        if all.len() == founding.len()
            && all.iter().filter(|vm| runs(vm)).count() == fit
            && all.iter().filter(|vm| hungry(vm)).count() == founding.len() - fit
        {
            return Ok(seen);
        }
        if began.elapsed() > LIMIT {
            let states: Vec<_> =
                all.iter().map(|vm| format!("{} {} {}", vm["clan"], vm["state"], vm["reason"])).collect();
            return Err(LabError::Promise(format!("they are not up in time: {states:#?}")));
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// Its controller answers, and no task works on it any more.
fn runs(vm: &Value) -> bool {
    vm["state"] == "running" && vm["task"].is_null()
}

fn hungry(vm: &Value) -> bool {
    vm["state"] == "starting" && vm["pid"].is_null() && text(vm, "reason").contains("waits for memory, number ")
}

fn pids(vms: &[Value]) -> BTreeMap<String, u32> {
    let pid = |vm: &Value| Some((text(vm, "clan").to_owned(), u32::try_from(vm["pid"].as_u64()?).ok()?));
    vms.iter().filter_map(pid).collect()
}

/// Whether it began with a saved state instead of booting.
fn went_on(pid: u32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"-incoming")
}

/// Each is a machine of its own.
fn distinct(founder: &Person) -> Result<(), LabError> {
    let status = founder.clan_json(&["status"])?;
    let own = |clan: &Value| -> Option<String> {
        let machine = clan["machines"].as_array()?.iter().find(|machine| machine["this"] == true)?;
        Some(machine["id"].as_str()?.to_owned())
    };
    let ids: BTreeSet<String> = status["clans"].as_array().into_iter().flatten().filter_map(own).collect();
    promise(ids.len() == CLANS, || format!("{CLANS} clans have {} machines", ids.len()))
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
