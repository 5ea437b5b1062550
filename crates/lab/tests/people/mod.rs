//! A lab of people that a test has for itself.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
    process::Command,
};

use clan_lab::{Account, Lab, LabConfig, LabError, Person, Screen, leftovers, story};

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
    let shared = share_packages(&account.state_root().with_file_name("clan-lab-test"), lab.person("founder"), &account)
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

pub(crate) fn promise(kept: bool, what: impl FnOnce() -> String) -> Result<(), LabError> {
    if kept { Ok(()) } else { Err(LabError::Promise(what())) }
}
