//! A virtual machine whose disk is encrypted: nothing of it is in the clear on the base OS, and after the manager's end it waits for
//! its passphrase; also where that end was in the middle of putting a copy of the disk back.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, fchown},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use clan_lab::{Lab, LabError, Screen, matching, story};

use crate::{
    Beside, MANAGER,
    chromium::Chromium,
    crashes::{caught, names},
    people::promise,
    text, vms,
};

const CLAN: &str = "sealed";
/// For a boot under emulation, beside another machine.
const HEAL: Duration = Duration::from_secs(120);
/// What is written in the guest, many times.
const MARK: &str = "nobody-reads-this-outside";
const RIGHT: &str = "correct horse of this test";
const NEXT: &str = "battery staple of this test";

/// A file with the passphrase that the person can read.
fn passphrase(lab: &mut Lab, name: &str, text: &str) -> Result<PathBuf, LabError> {
    let (uid, gid) = (lab.account().uid, lab.account().gid);
    let path = lab.person("founder").data().join(name);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path).map_err(complain)?;
    file.write_all(text.as_bytes()).and_then(|()| fchown(&file, Some(uid), Some(gid))).map_err(complain)?;
    Ok(path)
}

pub(crate) fn tell(lab: &mut Lab, screen: &Screen) -> Result<(), LabError> {
    let began = Instant::now();
    let (file, logs) = (passphrase(lab, "passphrase", RIGHT)?, lab.record().logs());
    let next = passphrase(lab, "next-passphrase", NEXT)?;
    let founder = lab.person("founder");
    let made = ["create", CLAN, "--person", "founder", "--machine", "vault", "--memory", "256M", "--cpus", "1"];
    founder.clan_typing(&[&made[..], &["--encrypt"]].concat(), RIGHT)?.success()?;
    let write = format!("for n in $(seq 2000); do echo {MARK} $n; done > /root/mark && sync");
    founder.console(CLAN)?.run(&write, HEAL)?;
    founder.clan(&["vm", "snapshot", CLAN, "--name", "first"])?.success()?;
    screen.seen("a machine with an encrypted disk", began.elapsed());

    // What runs goes on, and is told what will become of it.
    let began = Instant::now();
    founder.kill_manager()?;
    founder.start_manager(MANAGER)?;
    story::until(HEAL, "what runs to be found", || Ok(vm(founder)?["pid"].as_u64()))?;
    let told = founder.clan(&["status"])?.success()?.output();
    promise(told.contains("does not know the passphrase"), || format!("the status says nothing of a lock: {told}"))?;
    let from = file.display().to_string();
    let unlock = ["vm", "unlock", CLAN, "--passphrase-file", &from];
    on_the_page(lab)?;
    let founder = lab.person("founder");

    let place = founder.data().join("clans").join(text(&vm(founder)?, "id"));
    let is_draft = |name: &String| name.starts_with("data.ext4.");
    let mut restore = Beside::start(lab, &["vm", "restore", "first", CLAN, "--yes"])?;
    let seen = caught(&mut restore, || names(&place).iter().any(is_draft))?;
    promise(seen, || format!("the restoration was over before it was seen: {}", restore.said()))?;
    let founder = lab.person("founder");
    founder.kill_manager()?;
    drop(restore);
    founder.start_manager(MANAGER)?;
    story::until(HEAL, "the machine to be locked", || Ok((vm(founder)?["state"] == "locked").then_some(())))?;
    promise(!names(&place).iter().any(is_draft), || format!("this is there: {:?}", names(&place)))?;
    let reason = text(&vm(founder)?, "reason").to_owned();
    promise(reason.contains("clan vm unlock"), || format!("a locked machine says {reason:?}"))?;
    for (command, typed, says) in
        [("start", "", "clan vm unlock"), ("unlock", "correct horse of no test", "the passphrase is wrong")]
    {
        let refused = founder.clan_typing(&["vm", command, CLAN], typed)?;
        let output = refused.output();
        promise(!refused.status.success() && output.contains(says), || format!("{command} said {output}"))?;
    }
    founder.clan(&unlock)?.success()?;
    story::until(HEAL, "the machine running again", || Ok((vm(founder)?["state"] == "running").then_some(())))?;
    let (said, _) = founder.console(CLAN)?.run("tail -n 1 /root/mark", HEAL)?;
    promise(said.contains(&format!("{MARK} 2000")), || format!("the disk has {said:?} on it"))?;
    founder.clan(&["vm", "resize", CLAN, "--disk", "3G"])?.success()?;
    story::until(HEAL, "the guest to have the larger disk", || {
        let stats = founder.clan_json(&["vm", "stats", CLAN])?;
        Ok(stats["latest"]["disk_total"].as_u64().filter(|total| *total > 5 << 29))
    })?;
    screen.seen("it opens by its passphrase only, and has what was written", began.elapsed());

    let began = Instant::now();
    let to = next.display().to_string();
    let change = ["vm", "passphrase", CLAN, "--passphrase-file", &from, "--new-passphrase-file", &to];
    founder.clan(&change)?.success()?;
    founder.clan(&["vm", "stop", CLAN])?.success()?;
    founder.clan(&["vm", "lock", CLAN])?.success()?;
    let refused = founder.clan(&unlock)?;
    promise(!refused.status.success(), || format!("the old passphrase opens it: {}", refused.output()))?;
    founder.clan(&["vm", "unlock", CLAN, "--passphrase-file", &to])?.success()?;
    screen.seen("it has another passphrase, while it runs", began.elapsed());

    promise(place.join("snapshots/first/data.ext4").exists(), || "there is no snapshot to look through".into())?;
    let marked = containing(MARK, &[&place])?;
    promise(marked.is_empty(), || format!("these files have it in the clear: {marked}"))?;
    for file in [&file, &next] {
        fs::remove_file(file).map_err(complain)?;
    }
    let data = founder.data();
    let folders = ["clans", "tasks", "cache/templates"].map(|folder| data.join(folder));
    let folders: Vec<&Path> = folders.iter().chain([&logs]).filter(|f| f.exists()).map(PathBuf::as_path).collect();
    for secret in [RIGHT, NEXT] {
        let told = containing(secret, &folders)?;
        promise(told.is_empty(), || format!("these files have the passphrase: {told}"))?;
    }
    let shows = |proc: &PathBuf| {
        let seen = ["cmdline", "environ"].map(|file| fs::read(proc.join(file)).unwrap_or_default());
        let has = |seen: &Vec<u8>| String::from_utf8_lossy(seen).contains("of this test");
        seen.iter().any(has)
    };
    let showing = matching(shows);
    promise(showing.is_empty(), || format!("these processes show the passphrase: {showing:?}"))?;
    founder.clan(&["vm", "delete", CLAN, "--force", "--yes"])?.success().map(drop)
}

/// Unlocks the machine, which runs, in a browser.
fn on_the_page(lab: &mut Lab) -> Result<(), LabError> {
    let founder = lab.person("founder");
    let page = story::url_in(&founder.clan_quietly(&["web", "--print"])?.success()?.stdout)?;
    let origin = page.split('/').take(3).collect::<Vec<_>>().join("/");
    let place = text(&vm(founder)?, "id").to_owned();
    let mut browser = Chromium::start(lab.account())?;
    browser.open(&page)?;
    browser.open(&format!("{origin}/#/clan/{place}"))?;
    browser.press("button.unlock")?;
    browser.type_into("dialog[open] input[name=passphrase]", "correct horse of no test")?;
    browser.press("dialog[open] button[type=submit]")?;
    browser.shows("dialog[open] [role=alert]", &["The passphrase is wrong"])?;
    browser.picture(&lab.record().logs().join("wrong-passphrase.png"))?;
    promise(vm(lab.person("founder"))?["locked"] == true, || "a wrong passphrase unlocks it".into())?;
    browser.type_into("dialog[open] input[name=passphrase]", RIGHT)?;
    browser.press("dialog[open] button[type=submit]")?;
    browser.gone("dialog[open]")?;
    browser.gone("button.unlock")?;
    promise(vm(lab.person("founder"))?["locked"].is_null(), || "the page did not unlock it".into())
}

/// Those of the files below these folders that have a text in them, and what cannot be read.
fn containing(what: &str, folders: &[&Path]) -> Result<String, LabError> {
    // Not as text (`-a`): else it reads the holes of disks, too, which are GiB.
    let found = Command::new("grep").args(["-rlFe", what]).args(folders).env("LC_ALL", "C").output();
    let found = found.map_err(complain)?;
    let (files, complaints) = (String::from_utf8_lossy(&found.stdout), String::from_utf8_lossy(&found.stderr));
    Ok(files.into_owned() + &complaints)
}

fn complain(source: io::Error) -> LabError {
    LabError::Io { what: "look through what a machine leaves".into(), source }
}

fn vm(person: &clan_lab::Person) -> Result<serde_json::Value, LabError> {
    let all = vms(person)?;
    let found = all.iter().find(|vm| vm["clan"] == CLAN).cloned();
    found.ok_or_else(|| LabError::Promise(format!("there is no machine of {CLAN}: {all:?}")))
}
