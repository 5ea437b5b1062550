//! One manager with many virtual machines, and what a crash leaves of one. Needs root, for network namespaces, and what
//! `make deps` installs.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod crashes;
mod twenty;

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use clan_lab::{Account, Lab, LabConfig, LabError, Person, Screen, leftovers, matching, story};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MANAGER: Duration = Duration::from_secs(20);

/// Lays a lab, of whose people the founder only has a manager, started with these options and with an image; runs `tell`; and
/// takes the lab down again. Nothing may be left.
fn with_manager(tag: &str, options: &[&str], tell: impl FnOnce(&mut Lab, &Screen) -> Result<(), LabError>) {
    assert!(
        rustix::process::geteuid().is_root(),
        "the lab needs network namespaces: run it as root, as `make test` does"
    );
    let screen = Screen::stdout();
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let own = std::env::current_exe().unwrap();
    let mut config = LabConfig::new(own.parent().and_then(Path::parent).unwrap());
    let account = Account::for_lab(None).unwrap_or_else(|error| panic!("{}", error.chain()));
    config.prefix = tag.into();
    config.state = Some(account.state_root().with_file_name("clan-lab-many"));
    config.any_ports = true;
    let mut lab = Lab::up(&config, &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let record = lab.record().clone();
    let began = Instant::now();
    let mut prepare = || {
        let founder = lab.person("founder");
        share_packages(&account.state_root().with_file_name("clan-lab-test"), founder, &account)
            .map_err(|source| LabError::Io { what: "share packages".into(), source })?;
        founder.set_options(options);
        founder.start_manager(MANAGER)?;
        founder.clan(&["image", "build"])?.success().map(drop)
    };
    let told = prepare().and_then(|()| {
        screen.seen("the image is there", began.elapsed());
        tell(&mut lab, &screen)
    });
    if let Err(error) = &told {
        screen.failed(&error.chain());
        story::post_mortem(&mut lab);
    }
    lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    told.unwrap_or_else(|error| panic!("{}; the logs are in {}", error.chain(), record.logs().display()));
    let left = leftovers(&record);
    assert!(left.is_empty(), "{left:?}");
}

/// What the story has downloaded need not be downloaded again.
fn share_packages(story: &Path, person: &Person, account: &Account) -> io::Result<()> {
    let cache = person.data().join("cache");
    for folder in [person.data(), cache.clone()] {
        if !folder.is_dir() {
            DirBuilder::new().mode(0o700).create(&folder)?;
            chown(&folder, Some(account.uid), Some(account.gid))?;
        }
    }
    for root in fs::read_dir(story.join("founder/data/cache")).into_iter().flatten().flatten() {
        let place = cache.join(root.file_name());
        if root.file_name().to_string_lossy().starts_with("root-") && !place.exists() {
            Command::new("cp").arg("-a").args([root.path(), place]).status()?;
        }
    }
    Ok(())
}

/// A `clan` command that goes on beside the test; ended with it.
struct Beside {
    child: Child,
    said: PathBuf,
}

impl Beside {
    fn start(lab: &mut Lab, arguments: &[&str]) -> Result<Self, LabError> {
        let complain = |source| LabError::Io { what: "start a command".into(), source };
        let (program, said) = (lab.record().programs().join("clan"), tempfile::NamedTempFile::new().map_err(complain)?);
        let (file, said) = said.keep().map_err(|error| complain(error.error))?;
        let again: File = file.try_clone().map_err(complain)?;
        let mut command = lab.person("founder").command(program)?;
        command.args(arguments).env("NO_COLOR", "1").stdin(Stdio::null()).stdout(file).stderr(again);
        Ok(Self { child: command.spawn().map_err(complain)?, said })
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    /// Waits for its end.
    fn finish(&mut self, limit: Duration) -> Result<(ExitStatus, String), LabError> {
        let status = story::until(limit, "the end of a command", || Ok(self.ended()))?;
        Ok((status, self.said()))
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.said);
    }
}

fn vms(person: &Person) -> Result<Vec<Value>, LabError> {
    Ok(person.clan_json(&["vm", "list"])?.as_array().cloned().unwrap_or_default())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The emulators of a person's machines.
fn emulators(person: &Person) -> Vec<u32> {
    let data = person.data();
    matching(|proc| {
        let program = fs::read_link(proc.join("exe")).unwrap_or_default();
        program.file_name().is_some_and(|name| name.to_string_lossy().contains("qemu-system"))
            && fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd.starts_with(&data))
    })
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may be gone.
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn promise(kept: bool, what: impl FnOnce() -> String) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(what())) }
}
