//! An image as newcomers and members meet it, by real commands: given by two members at once, gone on with after cuts, made
//! anew and published. Machines are containers; needs root, for network namespaces, and what `make deps` installs.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

#[allow(dead_code, reason = "not every test looks at processes")]
mod boxes;
#[allow(dead_code, reason = "not every test types into a page")]
mod chromium;
mod people;

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Stdio, time::Instant};

use boxes::{HEAL, MANAGER, kill_all, online, pinged, running, tree, with_boxes};
use chromium::Chromium;
use clan_lab::{Lab, LabError, Person, Screen, story};
use clan_types::InviteLink;
use people::promise;
use serde_json::Value;

const CLAN: &str = "offers";
/// What each member's wire carries, in Mbit/s: a debug image takes some ten seconds from two.
const WIRE: u32 = 60;
/// Of the image, before the first cut and before the second.
const FIRST: u64 = 20 << 20;
const THEN: u64 = 20 << 20;
const PIECE: u64 = 256 << 10;

#[test]
fn an_image_comes_from_two_members_and_goes_on_after_cuts() {
    with_boxes("images", true, tell);
}

fn tell(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    for name in ["founder", "second", "stranger"] {
        lab.person(name).start_manager(MANAGER)?;
    }
    let founded = ["create", CLAN, "--container", "--person", "founder", "--machine", "founder"];
    lab.person("founder").clan(&founded)?.success()?;
    let link = story::link_in(&lab.person("founder").clan(&["invite", CLAN])?.success()?.stdout)?;
    join(lab.person("second"), &link)?;
    pinged(lab.person("second"), "founder")?;
    let link = from_two(lab, screen)?;
    joined_already(lab.person("stranger"), &link)?;
    published(lab, screen)
}

fn join(person: &Person, link: &str) -> Result<Value, LabError> {
    let name = person.name();
    person.clan_json(&["join", link, "--container", "--yes", "--person", name, "--machine", name])
}

/// A link that names two members. The founder's machine has told it of the second one's image by now, or soon does.
fn link_of_two(lab: &mut Lab) -> Result<String, LabError> {
    let founder = lab.person("founder");
    story::until(HEAL, "a link that names both members", || {
        let link = story::link_in(&founder.clan_quietly(&["invite", CLAN])?.success()?.stdout)?;
        let parsed: InviteLink = link.parse().map_err(|e| LabError::Promise(format!("{link}: {e}")))?;
        Ok((parsed.peers.len() == 2).then_some(link))
    })
}

fn from_two(lab: &mut Lab, screen: &Screen) -> Result<String, LabError> {
    let link = link_of_two(lab)?;
    let preview = lab.person("stranger").clan_json(&["join", &link, "--container", "--dry-run"])?;
    let download = &preview["container"]["download"];
    let total = download["total"].as_u64().unwrap_or_default();
    promise(total > FIRST + THEN + (8 << 20), || format!("too small an image to be cut twice: {preview}"))?;
    promise(download["missing"] == download["total"], || format!("some of it is there: {preview}"))?;
    for name in ["founder", "second"] {
        lab.slow(name, WIRE)?;
    }

    // The newcomer's manager is killed in the middle, and `clan join` waits for the next one.
    let began = Instant::now();
    let program = lab.record().programs().join("clan");
    let stranger = lab.person("stranger");
    let staging = stranger.data().join("images");
    let mut joining = stranger.command(program)?;
    joining.args(["join", &link, "--container", "--yes", "--person", "stranger", "--machine", "stranger"]);
    joining.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let joining = joining.spawn().map_err(|source| LabError::Io { what: "start clan join".into(), source })?;
    until_here(&staging, FIRST)?;
    stranger.kill_manager()?;
    let kept = here(&staging);
    promise(kept >= FIRST && kept < total, || format!("{kept} bytes of {total} are there after the cut"))?;
    screen.seen(
        &format!("the newcomer's manager is killed with {} MiB of {} there", kept >> 20, total >> 20),
        began.elapsed(),
    );

    // The next manager goes on. In the middle of that, one of the members goes off.
    let began = Instant::now();
    stranger.start_manager(MANAGER)?;
    let task = story::until(HEAL, "the joining that goes on", || {
        let status = stranger.clan_json(&["status"])?;
        let tasks = status["tasks"].as_array().cloned().unwrap_or_default();
        Ok(tasks.into_iter().find(|task| task["kind"] == "join_clan" && task["state"] == "running"))
    })?;
    until_here(&staging, kept + THEN)?;
    let second = lab.person("second");
    let machine = tree(running(second)?);
    second.kill_manager()?;
    kill_all(&machine);
    let stranger = lab.person("stranger");
    story::until(HEAL, "the newcomer in the clan", || online(stranger))?;
    screen.seen("the rest comes from the other member, after one goes off", began.elapsed());
    let joined =
        joining.wait_with_output().map_err(|source| LabError::Io { what: "wait for clan join".into(), source })?;
    let said = String::from_utf8_lossy(&joined.stderr).into_owned();
    let followed = said.contains("was started again, and goes on") && said.contains("is now a machine of");
    promise(joined.status.success() && followed, || format!("the command does not follow: {said}"))?;

    let log = task_log(stranger, &task)?;
    let pieces =
        |from: &str| given(&log, from).ok_or_else(|| LabError::Promise(format!("nothing from {from}: {log:?}")));
    let (founder, second) = (pieces("founder")?, pieces("second")?);
    screen.said(&format!("{founder} pieces came from founder, {second} from second"));
    promise(founder > 10 && second > 10, || format!("one gave next to nothing: {log:?}"))?;
    // What was there is not fetched again: the last piece of a file may be a short one, and those under way were lost.
    let (most, fetched) = ((total - kept) / PIECE + 4 + 32, founder + second);
    promise(fetched <= most, || format!("{fetched} pieces were fetched where {most} were missing: {log:?}"))?;
    promise(log.iter().any(|line| line.ends_with("are here from an earlier attempt")), || format!("{log:?}"))?;
    pinged(stranger, "founder")?;
    stranger.clan(&["image", "verify"])?.success()?;
    let left: Vec<_> = fs::read_dir(&staging).unwrap().flatten().map(|e| e.file_name()).collect();
    promise(left.len() == 1, || format!("something half-made is left: {left:?}"))?;

    lab.person("second").start_manager(MANAGER)?;
    pinged(lab.person("second"), "founder")?;
    Ok(link)
}

/// Whoever follows a link to a clan that they are in is told so, and in which.
fn joined_already(person: &Person, link: &str) -> Result<(), LabError> {
    let before = (machine_id(person)?, runs(person)?);
    for more in [&["--yes"][..], &["--dry-run"], &["--dry-run", "--json"]] {
        let arguments: Vec<&str> = ["join", link, "--container"].iter().chain(more).copied().collect();
        let refused = person.clan(&arguments)?;
        let said = refused.stderr.contains(&format!("this computer is in the clan `{CLAN}` already"));
        promise(refused.status.code() == Some(1) && said, || format!("{more:?}: {}", refused.output()))?;
        let coded = !more.contains(&"--json") || refused.stderr.contains(r#""code":"already_joined""#);
        promise(coded && refused.stdout.is_empty(), || format!("{more:?}: {}", refused.output()))?;
    }
    promise((machine_id(person)?, runs(person)?) == before, || "it is another machine now".into())?;
    let clans = person.clan_json(&["status"])?["clans"].as_array().map_or(0, Vec::len);
    promise(clans == 1, || format!("it is in {clans} clans"))
}

/// The founder runs another image, publishes it, and a member takes it over.
fn published(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    for name in ["founder", "second"] {
        lab.slow(name, 10_000)?;
    }
    // Another build of the same program: what follows the last section is never looked at.
    let program = lab.record().programs().join("clan");
    let next = program.with_extension("next");
    let changed = fs::read(&program).and_then(|mut bytes| {
        bytes.extend_from_slice(b"another build");
        fs::write(&next, bytes)?;
        fs::set_permissions(&next, fs::metadata(&program)?.permissions())?;
        // Whoever runs the present one goes on with it.
        fs::rename(&next, &program)
    });
    changed.map_err(|e| LabError::Promise(format!("{}: {e}", program.display())))?;

    let began = Instant::now();
    let old = runs(lab.person("second"))?;
    let founder = lab.person("founder");
    founder.clan(&["vm", "update", "--build", "--yes"])?.success()?;
    let new = runs(founder)?;
    promise(new != old, || "the founder's container has its old image".into())?;
    let early = founder.clan_json(&["vm", "update", "--dry-run"])?;
    promise(early["image"] == old, || format!("what is not published is offered: {early}"))?;
    let told = founder.clan(&["image", "publish", &new[..12], "--control", "shared", "--yes"])?;
    let told = told.success()?.output();
    let whole =
        ["so far", "Network", "Applications  web", "shared, so far local"].iter().all(|part| told.contains(part));
    promise(whole, || format!("what changes is not said: {told}"))?;
    screen.seen("the founder runs another image, and publishes it", began.elapsed());

    let began = Instant::now();
    let second = lab.person("second");
    let plan = story::until(HEAL, "the published image at a member", || {
        let plan = second.clan_json(&["vm", "update", "--dry-run"])?;
        Ok((plan["image"] == new).then_some(plan))
    })?;
    story::until(HEAL, "a member who is told of it", || {
        let told = second.clan(&["vm", "list"])?.success()?.output();
        Ok(told.contains("publishes another image than").then_some(()))
    })?;
    let status = second.clan_json(&["status"])?;
    promise(status["vms"][0]["published"]["image"] == new, || format!("{status}"))?;
    let stays = plan["stays"].to_string();
    promise(stays.contains("steered by: shared. Yours stays with: local"), || format!("nobody is told: {plan}"))?;
    let bytes = |plan: &Value, what: &str| plan["download"][what].as_u64().unwrap_or_default();
    let (total, missing) = (bytes(&plan, "total"), bytes(&plan, "missing"));
    promise(plan["source"] == "members" && plan["before"] == old, || format!("{plan}"))?;
    // The distribution is the same, and not fetched again.
    promise(missing > 0 && missing < total / 2, || format!("{missing} bytes of {total} are missing: {plan}"))?;
    let asked = second.clan(&["vm", "update"])?;
    let shown = asked.output();
    let size =
        shown.contains("Download") && shown.contains("members of the clan") && shown.contains("the rest is here");
    promise(asked.status.code() == Some(1) && size, || format!("nobody is told before: {shown}"))?;
    promise(runs(second)? == old, || "it was updated without being asked".into())?;

    let machine = machine_id(second)?;
    second.console(CLAN)?.run("echo kept > /root/mark", HEAL)?;
    let done = second.clan_json(&["vm", "update", "--yes"])?;
    let log = task_log(second, &done)?;
    promise(given(&log, "founder").is_some(), || format!("the founder gave nothing: {log:?}"))?;
    promise(runs(second)? == new, || "the container has its old image".into())?;
    let after = second.clan_json(&["vm", "list"])?;
    promise(after[0]["control_mode"] == "local", || format!("an update changed who steers it: {after}"))?;
    promise(after[0].get("published").is_none(), || format!("it runs what is published: {after}"))?;
    promise(machine_id(second)? == machine, || "the machine is another one with its new image".into())?;
    let (said, _) = second.console(CLAN)?.run("cat /root/mark", HEAL)?;
    promise(said.lines().any(|line| line.trim() == "kept"), || format!("its disk has {said:?} on it"))?;
    pinged(second, "founder")?;
    let again = second.clan(&["vm", "update", "--yes"])?.success()?.output();
    promise(again.contains("runs exactly this image already"), || again.clone())?;
    screen.seen("a member takes it over from members", began.elapsed());

    ordered(lab, screen, [&old, &new])?;
    // Of the other one nothing is left once nobody runs it, nor takes it back.
    let second = lab.person("second");
    second.clan(&["vm", "control", "local", "--yes"])?.success()?;
    // What was taken back on the page is being seen to be well.
    story::until(HEAL, "an end of the machine's tasks", || {
        let status = second.clan_json(&["status"])?;
        let mut tasks = status["tasks"].as_array().into_iter().flatten();
        Ok(tasks.all(|task| task["state"] != "running").then_some(()))
    })?;
    second.clan(&["image", "gc", "--yes"])?.success()?;
    let images = second.clan_json(&["image", "list"])?;
    promise(images.as_array().is_some_and(|all| all.len() == 1), || format!("{images}"))
}

/// The founder has the other member's machine take what the clan publishes, as far as its user lets them; who takes it back
/// on the manager's page.
fn ordered(lab: &mut Lab, screen: &Screen, [old, new]: [&str; 2]) -> Result<(), LabError> {
    let began = Instant::now();
    let refused = lab.person("founder").clan(&["machine", "update", "second", "--yes"])?;
    let said = refused.stderr.contains("only second steers second") && refused.stderr.contains("control mode is local");
    promise(refused.status.code() == Some(1) && said, || format!("local: {}", refused.output()))?;
    let second = lab.person("second");
    second.clan(&["vm", "control", "shared", "--yes"])?.success()?;
    second.clan(&["vm", "update", "--image", old, "--yes"])?.success()?;
    promise(runs(second)? == old, || "its user does not get the old image".into())?;
    let noted = journal(second)?;
    let own = noted.last().is_some_and(|entry| entry["after"] == old && entry["here"] == true);
    promise(own, || format!("its user's own change is not written down: {noted:?}"))?;
    screen.seen("a member has its old image again", began.elapsed());

    let began = Instant::now();
    let founder = lab.person("founder");
    let mut said = String::new();
    let plan = story::until(HEAL, "an order that is agreed to", || {
        let plan = founder.clan_quietly(&["machine", "update", "second", "--dry-run", "--json"])?;
        said = plan.output();
        Ok(plan.success().and_then(|plan| plan.json()).ok())
    });
    let plan = plan.map_err(|error| LabError::Promise(format!("{error}: {said}")))?;
    promise(plan["entry"]["before"] == old && plan["entry"]["after"] == new, || format!("{plan}"))?;
    promise(journal(lab.person("second"))? == noted, || "looking is written down".into())?;
    let founder = lab.person("founder");
    let change = founder.clan_json(&["machine", "update", "second", "--yes"])?;
    promise(change["entry"]["deed"] == "image" && change["entry"]["person_name"] == "founder", || format!("{change}"))?;
    let number = change["entry"]["number"].as_u64().unwrap_or_default();
    story::until(HEAL, "second's new image, as the founder sees it", || {
        let machines = founder.clan_json(&["machines"])?;
        let second = machines.as_array().into_iter().flatten().find(|m| m["name"] == "second").cloned();
        let there = second.is_some_and(|m| m["image"] == new && m["control_mode"] == "shared" && !m["path"].is_null());
        Ok(there.then_some(()))
    })?;
    let second = lab.person("second");
    promise(runs(second)? == new, || "the container has its old image".into())?;
    screen.seen("an admin has it take the published one", began.elapsed());

    let began = Instant::now();
    let (clan, machine) = (clan_id(second)?, machine_id(second)?);
    let page = story::url_in(&second.clan_quietly(&["web", "--print"])?.success()?.stdout)?;
    let mut browser = Chromium::start(lab.account())?;
    browser.open(&page)?;
    let origin = page.split('/').take(3).collect::<Vec<_>>().join("/");
    browser.open(&format!("{origin}/#/clan/{clan}/machine/{machine}"))?;
    let what = format!("image from {} to {}", &old[..10], &new[..10]);
    browser.shows(".journal", &["founder", &what, "control from local to shared", "its own computer"])?;
    browser.picture(&lab.record().logs().join("journal.png"))?;
    browser.press(".journal button.revert")?;
    browser.shows("dialog[open]", &[&format!("Take entry {number} back?"), "the image that it had before"])?;
    browser.press("dialog[open] button[type=submit]")?;
    let second = lab.person("second");
    story::until(HEAL, "the image before", || Ok((runs(second)? == old && online(second)?.is_some()).then_some(())))?;
    browser.shows(".journal", &[&format!("which takes {number} back")])?;
    browser.picture(&lab.record().logs().join("taken-back.png"))?;
    screen.seen("its user takes that back, on the page", began.elapsed());
    Ok(())
}

fn journal(person: &Person) -> Result<Vec<Value>, LabError> {
    let entries = person.clan_json(&["machine", "journal", person.name()])?;
    Ok(entries.as_array().cloned().unwrap_or_default())
}

fn clan_id(person: &Person) -> Result<String, LabError> {
    let status = person.clan_json(&["status"])?;
    let id = status["clans"][0]["id"].as_str().map(str::to_owned);
    id.ok_or_else(|| LabError::Promise(format!("no clan: {status}")))
}

fn runs(person: &Person) -> Result<String, LabError> {
    let vms = person.clan_json(&["vm", "list"])?;
    let image = vms[0]["image"].as_str().map(str::to_owned);
    image.ok_or_else(|| LabError::Promise(format!("it runs no image: {vms}")))
}

fn machine_id(person: &Person) -> Result<String, LabError> {
    let status = person.clan_json(&["status"])?;
    let machines = status["clans"][0]["machines"].as_array().cloned().unwrap_or_default();
    let own = machines.iter().find(|machine| machine["this"] == true).and_then(|machine| machine["id"].as_str());
    own.map(str::to_owned).ok_or_else(|| LabError::Promise(format!("no machine is this computer's: {status}")))
}

/// Bytes of an image that arrives which are on disk. Its files have their full length from the start.
fn here(images: &Path) -> u64 {
    let staged = fs::read_dir(images).into_iter().flatten().flatten();
    let staged = staged.filter(|entry| entry.file_name().to_string_lossy().starts_with(".incoming-"));
    let files = staged.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
    files.filter_map(|file| file.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}

fn until_here(images: &Path, bytes: u64) -> Result<(), LabError> {
    story::until(HEAL, &format!("{} MiB of the image", bytes >> 20), || Ok((here(images) >= bytes).then_some(())))
}

fn task_log(person: &Person, task: &Value) -> Result<Vec<String>, LabError> {
    let path = person.data().join("tasks").join(format!("{}.json", task["id"].as_str().unwrap_or_default()));
    let kept = story::until(HEAL, "the task's log", || Ok(fs::read_to_string(&path).ok()))?;
    let kept: Value = serde_json::from_str(&kept).map_err(|e| LabError::Promise(format!("{}: {e}", path.display())))?;
    let lines = kept["task"]["log"].as_array().cloned().unwrap_or_default();
    Ok(lines.iter().filter_map(|line| line.as_str().map(str::to_owned)).collect())
}

/// Pieces that a machine gave.
fn given(log: &[String], from: &str) -> Option<u64> {
    let end = format!(" pieces of the image came from {from}");
    log.iter().find_map(|line| line.strip_suffix(end.as_str())?.parse().ok())
}
