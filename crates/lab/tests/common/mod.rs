//! What the tests of a whole fleet share.

#[allow(dead_code, reason = "not every test has a stream")]
pub(crate) mod flow;
#[allow(dead_code, reason = "not every test runs another program")]
pub(crate) mod running;

use std::{fs, os::unix::fs::PermissionsExt};

use clan_lab::{LabConfig, LabError, Screen, fleet::Fleet, leftovers, nat::SiteSpec};

/// Lays a fleet with a folder of its own, runs `tell`, and takes the fleet down again. When `tell` fails, the ends of these
/// `logs` of every computer are shown, and the test fails; so it does when anything is left behind.
pub(crate) fn with_fleet<T>(
    prefix: &str,
    specs: &[SiteSpec],
    logs: &[&str],
    tell: impl FnOnce(&mut Fleet) -> Result<T, LabError>,
) -> T {
    assert!(rustix::process::geteuid().is_root(), "this lays network namespaces: run it as root, as `make test` does");
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let mut config = LabConfig::new(own.parent().and_then(std::path::Path::parent).unwrap());
    config.prefix = prefix.into();
    config.state = Some(folder.path().join("fleet"));
    let screen = Screen::stdout();
    let mut fleet = Fleet::up(&config, specs, &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let record = fleet.record().clone();
    let told = tell(&mut fleet);
    if told.is_err() {
        for computer in fleet.computers() {
            for kind in logs {
                screen.heading(&format!("{}'s {kind}", computer.name()));
                computer.log_tail(kind, 30).lines().for_each(|line| screen.said(line));
            }
        }
    }
    fleet.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    let told = told.unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(leftovers(&record).is_empty(), "{:?}", leftovers(&record));
    told
}
