//! What a person does with a VM, and that the state is what they were told, also after the manager was killed.

use std::{
    os::unix::fs::{MetadataExt, chown, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use clan_lab::{Lab, LabError, Person, story};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    process::{Pid, Signal},
};
use serde_json::Value;

use crate::{Checked, Checks, HEAL, refused, running_vm, status};

const MANAGER: Duration = Duration::from_secs(20);
/// Sorts after the story's clan, which is the first in every list.
const ANOTHER: &str = "zoo";

pub(crate) fn check(checks: &mut Checks, lab: &mut Lab) {
    checks.that("a paused VM stays paused when the manager is killed, and goes on when told", || {
        paused(lab.person("second"))
    });
    checks.that("a snapshot brings the disk back, of the same machine", || brought_back(lab.person("second")));
    checks.that("a larger disk is there at once, and a smaller one is refused", || larger(lab.person("second")));
    checks.that("memory that a guest frees comes back to the computer", || given_back(lab.person("second")));
    checks.that("a VM is held while the computer's disk is full, says so, and goes on unharmed", || held(lab));
    checks.that("a VM that does not fit waits for memory, says so, and starts when there is enough", || {
        waits_for_memory(lab.person("second"))
    });
    checks.that("a second VM of the image goes on from the template, with keys of its own", || {
        from_template(lab.person("founder"))
    });
    checks.that("a VM gets a new image, keeps its disk, and goes back from one that does not boot", || updated(lab));
    checks.that("images are listed, found whole, and none that runs is removed", || images(lab.person("founder")));
}

fn vm(person: &Person, clan: &str) -> Result<Value, LabError> {
    let vms = person.clan_json(&["vm", "list"])?;
    let found = vms.as_array().and_then(|vms| vms.iter().find(|vm| vm["clan"] == clan)).cloned();
    found.ok_or_else(|| LabError::Promise(format!("there is no VM of {clan}: {vms}")))
}

pub(crate) fn promise(kept: bool, what: impl FnOnce() -> String) -> Checked {
    if kept { Ok(()) } else { Err(LabError::Promise(what())) }
}

fn paused(second: &mut Person) -> Checked {
    let pid = story::until(HEAL, "second's VM", || running_vm(second))?;
    second.clan(&["vm", "pause"])?.success()?;
    let told = vm(second, story::CLAN)?;
    promise(told["state"] == "paused", || format!("a paused VM is {}", told["state"]))?;
    second.kill_manager()?;
    second.start_manager(MANAGER)?;
    let found = story::until(HEAL, "the manager to find the VM", || {
        let told = vm(second, story::CLAN)?;
        Ok((!told["pid"].is_null()).then_some(told))
    })?;
    let same = found["state"] == "paused" && found["pid"] == u64::from(pid);
    promise(same, || format!("process {pid} was paused; found was {found}"))?;
    second.clan(&["vm", "resume"])?.success()?;
    let now = story::until(HEAL, "second's VM to go on", || running_vm(second))?;
    promise(now == pid, || format!("it went on as process {now} instead of {pid}"))
}

fn machine_id(person: &Person) -> Result<Option<String>, LabError> {
    let status = status(person)?;
    let own = story::machines(&status).find(|machine| machine["this"] == true);
    Ok(own.and_then(|machine| machine["id"].as_str()).map(str::to_owned))
}

fn brought_back(second: &Person) -> Checked {
    let mark = |text: &str| -> Checked {
        let mut console = second.console(story::CLAN)?;
        console.run(&format!("echo {text} > /root/mark && sync"), HEAL).map(drop)
    };
    let machine = story::until(HEAL, "second's machine", || machine_id(second))?;
    mark("kept")?;
    second.clan(&["vm", "snapshot", "--name", "before"])?.success()?;
    mark("lost")?;
    refused(&second.clan(&["vm", "snapshot", "--name", "before"])?, &["already"])?;
    refused(&second.clan(&["vm", "restore", "behind", "--yes"])?, &["no such"])?;
    second.clan(&["vm", "restore", "before", "--dry-run"])?.success()?;
    second.clan(&["vm", "restore", "before", "--yes"])?.success()?;
    story::until(HEAL, "second's VM after the restoration", || running_vm(second))?;
    let (said, _) = second.console(story::CLAN)?.run("cat /root/mark", HEAL)?;
    promise(said.lines().any(|line| line.trim() == "kept"), || format!("the disk has {said:?} on it"))?;
    let now = story::until(HEAL, "second's machine again", || machine_id(second))?;
    promise(now == machine, || "the machine has another key on its restored disk".into())?;
    second.clan(&["vm", "discard", "before", "--yes"])?.success()?;
    let left = second.clan_json(&["vm", "snapshots"])?;
    promise(left.as_array().is_some_and(Vec::is_empty), || format!("a removed snapshot is still there: {left}"))
}

fn larger(second: &Person) -> Checked {
    refused(&second.clan(&["vm", "resize", "--disk", "128M"])?, &["already"])?;
    refused(&second.clan(&["vm", "resize", "--memory", "1000G"])?, &["memory"])?;
    second.clan(&["vm", "resize", "--disk", "3G"])?.success()?;
    story::until(HEAL, "the guest to have the larger disk", || {
        let stats = second.clan_json(&["vm", "stats"])?;
        Ok(stats["latest"]["disk_total"].as_u64().filter(|total| *total > 5 << 29))
    })
    .map(drop)
}

/// Memory of a process, MiB.
pub(crate) fn rss(pid: u32) -> Result<u64, LabError> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| LabError::Promise(format!("process {pid} is gone")))
}

fn given_back(second: &Person) -> Checked {
    const WRITTEN: u64 = 150;
    let pid = story::until(HEAL, "second's VM", || running_vm(second))?;
    let mut console = second.console(story::CLAN)?;
    let before = rss(pid)?;
    let write = format!("mount -t tmpfs -o size=200m none /mnt && dd if=/dev/zero of=/mnt/big bs=1M count={WRITTEN}");
    let (said, status) = console.run(&write, HEAL)?;
    promise(status == 0, || format!("the guest cannot write {WRITTEN} MiB: {said}"))?;
    let full = rss(pid)?;
    promise(full >= before + WRITTEN / 2, || format!("writing {WRITTEN} MiB took QEMU from {before} to {full} MiB"))?;
    console.run("umount /mnt", HEAL)?;
    let limit = full - (full - before).min(WRITTEN) * 3 / 4;
    story::until(HEAL, &format!("QEMU to give back memory, down from {full} to {limit} MiB"), || {
        Ok((rss(pid)? <= limit).then_some(()))
    })
}

fn held(lab: &mut Lab) -> Checked {
    let owner = (lab.account().uid, lab.account().gid);
    let second = &*lab.person("second");
    let complain = |what: &str| {
        let what = what.to_owned();
        move |source| LabError::Io { what, source }
    };
    let clans = std::fs::read_dir(second.data().join("clans")).map_err(complain("list second's clans"))?;
    let disk = clans.flatten().map(|clan| clan.path().join("data.ext4")).find(|disk| disk.exists());
    let disk = disk.ok_or_else(|| LabError::Promise("second has no disk".into()))?;
    let (small, aside) = (second.data().with_file_name("small-disk"), disk.with_extension("aside"));
    second.clan(&["vm", "stop"])?.success()?;
    std::fs::create_dir_all(&small).map_err(complain("make a folder"))?;
    let used = std::fs::metadata(&disk).map_err(complain("measure a disk"))?.blocks() >> 11;
    let size = |more: u64| std::ffi::CString::new(format!("size={}m,mode=0700", used + more)).unwrap();
    let refuse = |error: rustix::io::Errno| complain("mount a small disk")(error.into());
    rustix::mount::mount("none", &small, "tmpfs", MountFlags::empty(), size(64).as_c_str()).map_err(refuse)?;
    let check = || -> Checked {
        let there = small.join("data.ext4");
        let copied = std::process::Command::new("cp").arg("--sparse=always").args([&disk, &there]).status();
        promise(copied.map_err(complain("copy a disk"))?.success(), || "the disk is not copied".into())?;
        for path in [&small, &there] {
            chown(path, Some(owner.0), Some(owner.1)).map_err(complain("hand over a small disk"))?;
        }
        std::fs::rename(&disk, &aside).and_then(|()| symlink(&there, &disk)).map_err(complain("move a disk"))?;
        second.clan(&["vm", "start"])?.success()?;
        let pid = story::until(HEAL, "second's VM on the small disk", || running_vm(second))?;
        // Nobody waits for what cannot end.
        second
            .console(story::CLAN)?
            .run("{ (dd if=/dev/urandom of=/root/fill bs=1M count=120; sync) >/dev/null 2>&1 & }", HEAL)?;
        story::until(HEAL, "the VM to say that the disk is full", || {
            let told = vm(second, story::CLAN)?;
            Ok(told["reason"].as_str().is_some_and(|why| why.contains("disk is full")).then_some(()))
        })?;
        rustix::mount::mount_remount(&small, MountFlags::empty(), size(400).as_c_str()).map_err(refuse)?;
        let now = story::until(HEAL, "the VM to go on", || running_vm(second))?;
        promise(now == pid, || format!("it went on as process {now} instead of {pid}"))?;
        let (said, _) = second.console(story::CLAN)?.run("wait; sync; stat -c %s /root/fill; rm /root/fill", HEAL)?;
        promise(said.contains("125829120"), || format!("what was written is {said}"))
    };
    let checked = check();
    let stopped = second.clan(&["vm", "stop"]).map(drop);
    if aside.exists() {
        std::fs::remove_file(&disk)
            .and_then(|()| std::fs::rename(&aside, &disk))
            .map_err(complain("move a disk back"))?;
    }
    let _ = rustix::mount::unmount(&small, UnmountFlags::DETACH);
    let started = second.clan(&["vm", "start"])?.success().map(drop);
    checked.and(stopped).and(started)
}

fn waits_for_memory(second: &Person) -> Checked {
    let status = status(second)?;
    let size = vm(second, story::CLAN)?["memory"].as_u64().unwrap_or_default();
    // As much as any VM may have, which is more than is left beside what runs.
    let total = status["host"]["memory_total"].as_u64().unwrap_or_default();
    second.clan(&["vm", "resize", "--memory", &format!("{}M", (total >> 20) - 200)])?.success()?;
    // It has its new size at the next start, which this brings about.
    let pid = story::until(HEAL, "second's VM", || running_vm(second))?;
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| LabError::Promise("no process".into()))?;
    rustix::process::kill_process(pid, Signal::KILL)
        .map_err(|error| LabError::Io { what: "kill QEMU".into(), source: error.into() })?;
    let told = story::until(HEAL, "the VM to say that it waits for memory", || {
        let told = vm(second, story::CLAN)?;
        Ok(told["reason"].as_str().is_some_and(|why| why.contains("waits for memory")).then_some(told))
    })?;
    promise(told["state"] == "starting" && told["pid"].is_null(), || format!("a VM that waits: {told}"))?;
    second.clan(&["vm", "resize", "--memory", &format!("{}M", size >> 20)])?.success()?;
    story::until(HEAL, "the VM to start with less", || running_vm(second)).map(drop)
}

fn from_template(founder: &Person) -> Checked {
    let kept = image_in_use(founder)?;
    promise(kept["template"] == true, || format!("the first VM left no template: {kept}"))?;
    let made = ["create", ANOTHER, "--person", "founder", "--machine", "other"];
    founder.clan(&made)?.success()?;
    let pid = vm(founder, ANOTHER)?["pid"].as_u64().unwrap_or_default();
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let went_on = line.split(|byte| *byte == 0).any(|word| word == b"-incoming");
    promise(went_on, || "the second VM booted".into())?;
    let status = status(founder)?;
    let ids = status["clans"].as_array().into_iter().flatten().flat_map(|clan| {
        clan["machines"].as_array().into_iter().flatten().filter(|m| m["this"] == true).map(|m| m["id"].clone())
    });
    let ids: Vec<_> = ids.collect();
    promise(ids.len() == 2 && ids[0] != ids[1], || format!("two VMs from one state are the machines {ids:?}"))?;
    founder.clan(&["vm", "delete", ANOTHER, "--force", "--yes"])?.success().map(drop)
}

fn runs_image(person: &Person) -> Result<String, LabError> {
    let image = image_in_use(person)?;
    let id = image["id"].as_str().map(str::to_owned);
    id.ok_or_else(|| LabError::Promise(format!("an image without an id: {image}")))
}

/// The clan's image: earlier builds may have left others.
fn image_in_use(person: &Person) -> Result<Value, LabError> {
    let images = person.clan_json(&["image", "list"])?;
    let mut all = images.as_array().into_iter().flatten();
    let used = all.find(|image| image["clans"].as_array().is_some_and(|c| c.iter().any(|clan| clan == story::CLAN)));
    used.cloned().ok_or_else(|| LabError::Promise(format!("no image is the clan's: {images}")))
}

fn updated(lab: &mut Lab) -> Checked {
    let programs = lab.record().programs();
    let founder = lab.person("founder");
    let (before, machine) = (runs_image(founder)?, machine_id(founder)?);
    founder.console(story::CLAN)?.run("echo kept > /root/mark && sync", HEAL)?;
    // Another build of the same program: what follows the last section is never looked at.
    let another = another(&programs.join("clan"), |bytes| bytes.extend_from_slice(b"another build"))?;
    founder.clan(&["vm", "update", "--build", "--yes"])?.success()?;
    let after = runs_image(founder)?;
    promise(after != before, || "the VM has its old image".into())?;
    promise(machine_id(founder)? == machine, || "the machine is another one with its new image".into())?;
    let (said, _) = founder.console(story::CLAN)?.run("cat /root/mark", HEAL)?;
    promise(said.lines().any(|line| line.trim() == "kept"), || format!("the disk has {said:?} on it"))?;

    // An agent that ends at once: the kernel has nothing to go on with.
    let clan = std::fs::read(programs.join("clan")).map_err(|e| LabError::Promise(e.to_string()))?;
    let broken = self::another(&programs.join("clan-agent"), |bytes| *bytes = clan)?;
    refused(&founder.clan(&["vm", "update", "--build", "--yes"])?, &["not well", "previous one again"])?;
    drop((another, broken));
    promise(runs_image(founder)? == after, || "the VM has an image that does not boot".into())?;
    story::until(HEAL, "founder's VM with its previous image", || running_vm(founder))?;
    promise(machine_id(founder)? == machine, || "the machine is another one after it went back".into())
}

/// A program that is replaced until this is dropped.
struct Replaced {
    place: PathBuf,
    kept: PathBuf,
}

impl Drop for Replaced {
    fn drop(&mut self) {
        let _ = std::fs::rename(&self.kept, &self.place);
    }
}

fn another(place: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Result<Replaced, LabError> {
    let failed = |e: std::io::Error| LabError::Promise(format!("{}: {e}", place.display()));
    let replaced = Replaced { place: place.to_owned(), kept: place.with_extension("kept") };
    let next = place.with_extension("next");
    let mut bytes = std::fs::read(place).map_err(failed)?;
    change(&mut bytes);
    std::fs::write(&next, bytes).map_err(failed)?;
    std::fs::set_permissions(&next, std::fs::metadata(place).map_err(failed)?.permissions()).map_err(failed)?;
    std::fs::hard_link(place, &replaced.kept).map_err(failed)?;
    // Whoever runs the present one goes on with it.
    std::fs::rename(&next, place).map_err(failed)?;
    Ok(replaced)
}

fn images(founder: &Person) -> Checked {
    founder.clan(&["image", "verify"])?.success()?;
    founder.clan(&["image", "gc", "--yes"])?.success()?;
    let left = founder.clan_json(&["image", "list"])?;
    let runs = left[0]["clans"].as_array().is_some_and(|clans| clans.iter().any(|clan| clan == story::CLAN));
    promise(runs, || format!("the image that runs is gone: {left}"))?;
    refused(&founder.clan(&["image", "verify", "nosuch"])?, &["no such image"])
}
