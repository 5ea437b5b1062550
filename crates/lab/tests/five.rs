//! What `make lab` shows, without anybody watching. Needs root, for network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::fs;

use clan_lab::{Screen, five};
use common::with_fleet;

#[test]
fn five_machines_meet_reach_each_other_by_name_and_leave_nothing_behind() {
    let before = fs::read("/etc/resolv.conf").ok();
    let specs = five::specs(&five::ROUTERS);
    let report = with_fleet("clanfive", &specs, &["controller", "manager"], five::tell);
    report.print(&Screen::stdout());
    assert_eq!((report.joined.len(), report.pairs.len()), (4, 10));
    assert!(report.pairs.iter().all(|pair| pair.throughput > 0.0));
    assert_eq!(fs::read("/etc/resolv.conf").ok(), before, "this machine's own name resolution is not touched");
}
