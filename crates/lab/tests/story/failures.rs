//! What breaks, and heals or is told.

use std::{ffi::OsStr, fs, os::unix::fs::chown, time::Duration};

use clan_lab::{Browser, Lab, LabError, Person, matching, story};
use rustix::{
    mount::{MountFlags, UnmountFlags},
    process::{Pid, Signal},
};

use crate::{Checked, Checks, HEAL, refused, running_vm, status};

const MANAGER: Duration = Duration::from_secs(20);
const BUSY: u16 = 4161;

pub(crate) fn check(checks: &mut Checks, lab: &mut Lab) {
    checks.that("a busy port is named", || busy_port(lab.person("stranger")));
    checks.that("a second manager on one data folder is refused", || second_manager(lab.person("stranger")));
    checks.that("a missing QEMU is named, with its package", || missing_qemu(lab.person("stranger")));
    checks.that("a full disk is told, and leaves no clan behind", || full_disk(lab));
    checks.that("a killed controller comes back", || killed_controller(lab.person("second")));
    checks.that("a killed manager finds its VM again, neither lost nor doubled", || {
        killed_manager(lab.person("founder"))
    });
    checks.that("a killed VM is started again, as the same machine", || killed_vm(lab.person("founder")));
    checks.that("the service is reached again after all that", || reached_again(lab.person("second")));
}

/// The last check, as there is no clan for the second person afterwards.
pub(crate) fn leave(checks: &mut Checks, lab: &mut Lab) {
    checks.that("whoever leaves is gone, with their VM", || {
        let second = lab.person("second");
        let vm = story::until(HEAL, "second's VM", || running_vm(second))?;
        second.clan(&["leave", story::CLAN, "--yes"])?.success()?;
        if matching(|proc| proc.ends_with(vm.to_string())).contains(&vm) {
            return Err(LabError::Promise("the VM of a clan that was left still runs".into()));
        }
        story::until(HEAL, "the founder to see that second left", || {
            let status = status(lab.person("founder"))?;
            Ok((!story::machines(&status).any(|machine| machine["name"] == "second")).then_some(()))
        })
    });
}

fn busy_port(stranger: &Person) -> Checked {
    let _taken = stranger.occupy(BUSY)?;
    let other = stranger.data().with_file_name("other-data");
    let address = format!("127.0.0.1:{BUSY}");
    let data = other.display().to_string();
    refused(&stranger.clan(&["manager", "--data", &data, "--listen", &address])?, &["4161", "another program"])
}

fn second_manager(stranger: &Person) -> Checked {
    refused(&stranger.clan(&["manager", "--listen", "127.0.0.1:4162"])?, &["another manager"])
}

fn missing_qemu(stranger: &mut Person) -> Checked {
    // Everything that a system has, but for QEMU.
    let folder = stranger.data().with_file_name("without-qemu");
    let complain = |source| LabError::Io { what: "make a PATH without QEMU".into(), source };
    fs::create_dir_all(&folder).map_err(complain)?;
    for from in ["/usr/bin", "/usr/sbin"] {
        for program in fs::read_dir(from).map_err(complain)?.flatten() {
            let name = program.file_name().to_string_lossy().into_owned();
            if !name.starts_with("qemu-system") && name != "kvm" {
                // The first one of a name counts, as in PATH.
                let _ = std::os::unix::fs::symlink(program.path(), folder.join(program.file_name()));
            }
        }
    }
    stranger.kill_manager()?;
    stranger.set_path(folder.display().to_string());
    stranger.start_manager(MANAGER)?;
    let created = stranger.clan(&["create", "impossible", "--person", "stranger", "--machine", "stranger"])?;
    refused(&created, &["qemu", "qemu-system-x86"])?;
    no_clan(stranger)
}

fn full_disk(lab: &mut Lab) -> Checked {
    let (uid, gid) = (lab.account().uid, lab.account().gid);
    let stranger = lab.person("stranger");
    stranger.kill_manager()?;
    stranger.set_path("/usr/bin:/bin:/usr/sbin:/sbin");
    let data = stranger.data();
    let options = c"size=24m,mode=0700";
    rustix::mount::mount("none", &data, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options)
        .map_err(|error| LabError::Io { what: "mount a small disk".into(), source: error.into() })?;
    let mut check = || {
        chown(&data, Some(uid), Some(gid))
            .map_err(|source| LabError::Io { what: "hand over a small disk".into(), source })?;
        stranger.start_manager(MANAGER)?;
        let created = stranger.clan(&["create", "impossible", "--person", "stranger", "--machine", "stranger"])?;
        refused(&created, &["space"])?;
        no_clan(stranger)
    };
    let checked = check();
    let stopped = stranger.kill_manager();
    let _ = rustix::mount::unmount(&data, UnmountFlags::DETACH);
    checked.and(stopped)
}

fn no_clan(person: &Person) -> Checked {
    let status = status(person)?;
    match status["clans"].as_array().map(Vec::len) {
        Some(0) => Ok(()),
        _ => Err(LabError::Promise(format!("a clan that could not be created is still there: {}", status["clans"]))),
    }
}

fn killed_controller(second: &Person) -> Checked {
    let mut console = second.console(story::CLAN)?;
    let before = story::until(HEAL, "the controller", || main_process(&mut console))?;
    console.run("systemctl kill --signal KILL clan-controller.service", HEAL)?;
    story::until(HEAL, "another controller", || Ok(main_process(&mut console)?.filter(|now| *now != before)))?;
    story::until(HEAL, "second's controller to answer and to reach the founder", || {
        let status = status(second)?;
        Ok((status["clans"][0]["online"] == true && story::path_to(&status, "founder").is_some()).then_some(()))
    })
}

/// The controller's process number in the guest. Other lines may be the controller's own, which it writes to the console.
fn main_process(console: &mut clan_lab::Console) -> Result<Option<u32>, LabError> {
    let (said, _) = console.run("systemctl show --property MainPID clan-controller.service", HEAL)?;
    Ok(said.lines().find_map(|line| line.trim().strip_prefix("MainPID=")?.parse().ok()).filter(|pid| *pid != 0))
}

fn killed_manager(founder: &mut Person) -> Checked {
    let before = story::until(HEAL, "founder's VM", || running_vm(founder))?;
    founder.kill_manager()?;
    founder.start_manager(MANAGER)?;
    let after = story::until(HEAL, "founder's VM after the manager's death", || running_vm(founder))?;
    if before != after {
        return Err(LabError::Promise(format!("the VM was process {before} and is now {after}")));
    }
    one_vm(founder)
}

fn killed_vm(founder: &Person) -> Checked {
    let before = story::until(HEAL, "founder's VM", || running_vm(founder))?;
    let machine = machine_id(founder)?;
    let pid =
        i32::try_from(before).ok().and_then(Pid::from_raw).ok_or_else(|| LabError::Promise("no process id".into()))?;
    rustix::process::kill_process(pid, Signal::KILL)
        .map_err(|error| LabError::Io { what: "kill QEMU".into(), source: error.into() })?;
    story::until(HEAL, "another QEMU", || Ok(running_vm(founder)?.filter(|now| *now != before)))?;
    if machine_id(founder)? != machine {
        return Err(LabError::Promise("the machine has another key after a restart".into()));
    }
    one_vm(founder)
}

fn machine_id(person: &Person) -> Result<String, LabError> {
    let status = status(person)?;
    let own =
        story::machines(&status).find(|machine| machine["this"] == true).and_then(|machine| machine["id"].as_str());
    own.map(str::to_owned).ok_or_else(|| LabError::Promise("the manager does not name its own machine".into()))
}

/// No two emulators run on this person's disks.
fn one_vm(person: &Person) -> Checked {
    let data = person.data().display().to_string();
    let is_theirs = |arguments: Vec<u8>| {
        let mut words = arguments.split(|byte| *byte == 0).map(String::from_utf8_lossy);
        let emulator =
            words.next().is_some_and(|word| OsStr::new(word.as_ref()).to_string_lossy().contains("qemu-system"));
        emulator && words.any(|word| word.contains(&data))
    };
    let emulators = matching(|proc| fs::read(proc.join("cmdline")).is_ok_and(is_theirs));
    if emulators.len() == 1 { Ok(()) } else { Err(LabError::Promise(format!("emulators of one VM: {emulators:?}"))) }
}

fn reached_again(second: &Person) -> Checked {
    story::until(HEAL, "the founder's page", || {
        let opened = second.clan_quietly(&["service", "open", story::SERVICE, "--print"])?.success()?;
        let page = Browser::default().get(&story::url_in(&opened.stdout)?)?;
        Ok((page.status == 200 && page.body.contains("founder")).then_some(()))
    })
}
