//! One manager with many virtual machines, and what a crash leaves of one. Needs root, for network namespaces, and what
//! `make deps` installs.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

#[path = "../chromium/mod.rs"]
mod chromium;
mod crashes;
#[path = "../people/mod.rs"]
mod people;
mod sealed;
mod twenty;

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use clan_lab::{Lab, LabError, Person, Screen, matching, story};
use people::with_people;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MANAGER: Duration = Duration::from_secs(20);

/// Lays a lab, of whose people the founder only has a manager, started with these options and with an image, and runs `tell`: see
/// [`with_people`].
fn with_manager(tag: &str, options: &[&str], tell: impl FnOnce(&mut Lab, &Screen) -> Result<(), LabError>) {
    with_people(
        tag,
        "clan-lab-many",
        |_| {},
        |lab, screen| {
            let began = Instant::now();
            let founder = lab.person("founder");
            founder.set_options(options);
            founder.start_manager(MANAGER)?;
            founder.clan(&["image", "build"])?.success()?;
            screen.seen("the image is there", began.elapsed());
            tell(lab, screen)
        },
    );
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
