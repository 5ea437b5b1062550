//! What `make lab` shows, without anybody watching. Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

use std::{fs, os::unix::fs::PermissionsExt};

use clan_lab::{LabConfig, Screen, five, fleet::Fleet, leftovers};

#[test]
fn five_machines_meet_reach_each_other_by_name_and_leave_nothing_behind() {
    assert!(rustix::process::geteuid().is_root(), "this lays network namespaces: run it as root, as `make test` does");
    let folder = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let own = std::env::current_exe().unwrap();
    // target/<triple>/<profile>/deps/<test>: the programs are two above.
    let mut config = LabConfig::new(own.parent().and_then(std::path::Path::parent).unwrap());
    config.prefix = "clanfive".into();
    config.state = Some(folder.path().join("five"));
    let before = fs::read("/etc/resolv.conf").ok();
    let screen = Screen::stdout();
    let mut fleet =
        Fleet::up(&config, &five::specs(&five::ROUTERS), &screen).unwrap_or_else(|error| panic!("{}", error.chain()));
    let record = fleet.record().clone();
    let told = five::tell(&mut fleet);
    if told.is_err() {
        for computer in fleet.computers() {
            for kind in ["controller", "manager"] {
                screen.heading(&format!("{}'s {kind}", computer.name()));
                computer.log_tail(kind, 30).lines().for_each(|line| screen.said(line));
            }
        }
    }
    fleet.down().unwrap_or_else(|error| panic!("{}", error.chain()));
    let report = told.unwrap_or_else(|error| panic!("{}", error.chain()));
    report.print(&screen);
    assert_eq!((report.joined.len(), report.pairs.len()), (4, 10));
    assert!(report.pairs.iter().all(|pair| pair.throughput > 0.0));
    assert!(leftovers(&record).is_empty(), "{:?}", leftovers(&record));
    assert_eq!(fs::read("/etc/resolv.conf").ok(), before, "this machine's own name resolution is not touched");
}
