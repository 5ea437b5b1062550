//! A lab of people that a test has for itself.

mod packages;

use std::path::Path;

use clan_lab::{Account, Lab, LabConfig, LabError, Screen, leftovers, story};

/// Lays a lab of this name, which keeps images in the folder of that name, and as `adapt` has it; runs `tell`, and takes the lab
/// down again. The test fails when `tell` does, and when anything is left behind.
pub(crate) fn with_people(
    prefix: &str,
    folder: &str,
    adapt: impl FnOnce(&mut LabConfig),
    tell: impl FnOnce(&mut Lab, &Screen) -> Result<(), LabError>,
) {
    assert!(
        rustix::process::geteuid().is_root(),
        "the lab needs network namespaces: run it as root, as `make test` does"
    );
    let screen = Screen::stdout();
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let own = std::env::current_exe().unwrap();
    let mut config = LabConfig::new(own.parent().and_then(Path::parent).unwrap());
    let account = Account::for_lab(None).unwrap_or_else(|error| panic!("{}", error.chain()));
    config.prefix = prefix.into();
    config.state = Some(account.state_root().with_file_name(folder));
    config.any_ports = true;
    adapt(&mut config);
    let mut lab = Lab::up(&config, &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let record = lab.record().clone();
    let shared = packages::share(lab.person("founder"), &account)
        .map_err(|source| LabError::Io { what: "share packages".into(), source });
    let told = shared.and_then(|()| tell(&mut lab, &screen));
    if let Err(error) = &told {
        screen.failed(&error.chain());
        story::post_mortem(&mut lab);
    }
    lab.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    told.unwrap_or_else(|error| panic!("{}; the logs are in {}", error.chain(), record.logs().display()));
    let left = leftovers(&record);
    assert!(left.is_empty(), "{left:?}");
}

pub(crate) fn promise(kept: bool, what: impl FnOnce() -> String) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(what())) }
}
