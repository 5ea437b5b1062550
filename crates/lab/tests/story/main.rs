//! The whole story, with real virtual machines under emulation, and then what may go wrong. One lab for all of it:
//! every boot costs time. Needs root, for network namespaces, and what `make deps` installs.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod browser;
#[path = "../chromium/mod.rs"]
mod chromium;
mod failures;
mod isolation;
mod links;
mod machine;
#[path = "../people/packages.rs"]
mod packages;
mod secrecy;
mod traffic;

use std::time::{Duration, Instant};

use clan_lab::{Account, Lab, LabConfig, LabError, Person, Screen, leftovers, story};
use serde_json::Value;

/// How long something in a guest may take to heal: a boot under emulation beside another guest.
const HEAL: Duration = Duration::from_secs(90);

/// What a check found.
type Checked = Result<(), LabError>;

/// Runs every check, whatever the ones before it found, and says how each went.
struct Checks {
    screen: Screen,
    failed: Vec<String>,
}

impl Checks {
    fn that(&mut self, promise: &str, check: impl FnOnce() -> Checked) {
        let began = Instant::now();
        match check() {
            Ok(()) => self.screen.seen(promise, began.elapsed()),
            Err(error) => {
                self.screen.failed(&format!("{promise}: {}", error.chain()));
                self.failed.push(promise.to_owned());
            }
        }
    }
}

#[test]
fn two_people_meet_and_what_goes_wrong_is_told_or_heals() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the story needs network namespaces: run it as root, as `make test` does"
    );
    assert!(
        std::process::Command::new("qemu-system-x86_64").arg("--version").output().is_ok(),
        "the story needs QEMU: run `make deps`"
    );
    let screen = Screen::stdout();
    let (mut config, capture) = config();
    config.capture = Some(capture.path().join("internet.pcap"));
    let mut lab = Lab::up(&config, &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let (record, account) = (lab.record().clone(), lab.account().clone());
    packages::share(lab.person("founder"), &account).unwrap();
    let watch = secrecy::Watch::begin();

    let began = Instant::now();
    let told = story::tell(&mut lab);
    let report = match told {
        Ok(report) => report,
        Err(error) => {
            screen.failed(&error.chain());
            story::post_mortem(&mut lab);
            lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
            panic!("the story was not told to its end; the logs are in {}", record.logs().display());
        }
    };
    report.print(&screen, began.elapsed());

    screen.heading("What may go wrong");
    let mut checks = Checks { screen: screen.clone(), failed: Vec::new() };
    let packets = lab.take_capture().map(clan_lab::Capture::finish);
    checks.that("nobody between the machines reads the page", || traffic::is_sealed(packets, &report.page));
    links::check(&mut checks, &mut lab, &report.link);
    browser::check(&mut checks, &mut lab);
    isolation::check(&mut checks, &mut lab);
    failures::check(&mut checks, &mut lab);
    machine::check(&mut checks, &mut lab);
    secrecy::check(&mut checks, &mut lab, &report.link, watch);
    failures::leave(&mut checks, &mut lab);
    if !checks.failed.is_empty() {
        story::post_mortem(&mut lab);
    }

    lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    checks.that("nothing is left behind", || {
        let left = leftovers(&record);
        if left.is_empty() { Ok(()) } else { Err(LabError::Promise(format!("{left:?}"))) }
    });
    assert!(checks.failed.is_empty(), "not kept: {:#?}; the logs are in {}", checks.failed, record.logs().display());
}

/// A lab beside one that `make run` may have left up; its image is kept from one run to the next.
fn config() -> (LabConfig, tempfile::TempDir) {
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let own = std::env::current_exe().unwrap();
    let mut config = LabConfig::new(own.parent().and_then(std::path::Path::parent).unwrap());
    let account = Account::for_lab(None).unwrap_or_else(|error| panic!("{}", error.chain()));
    config.prefix = "clantest".into();
    config.state = Some(account.state_root().with_file_name("clan-lab-test"));
    config.any_ports = true;
    config.fresh_second = true;
    config.stranger = true;
    (config, tempfile::tempdir().unwrap())
}

/// A manager's status, through its command line.
fn status(person: &Person) -> Result<Value, LabError> {
    person.clan_json(&["status"])
}

/// The QEMU process of a person's VM, once the VM runs and its controller answers.
fn running_vm(person: &Person) -> Result<Option<u32>, LabError> {
    let status = status(person)?;
    let pid = status["vms"][0]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    Ok(pid.filter(|_| status["clans"][0]["online"] == true))
}

/// Demands that a command fails, with a message that has all these words in it and says what to do.
fn refused(finished: &clan_lab::Finished, words: &[&str]) -> Checked {
    let said = finished.stderr.to_lowercase();
    let missing: Vec<&&str> = words.iter().filter(|word| !said.contains(**word)).collect();
    if finished.status.success()
        || said.contains("panicked")
        || finished.status.code() == Some(255)
        || !missing.is_empty()
    {
        let message = format!(
            "`{}` ended with {} and without {missing:?}: {}",
            finished.command,
            finished.status,
            finished.output()
        );
        return Err(LabError::Promise(message));
    }
    Ok(())
}
