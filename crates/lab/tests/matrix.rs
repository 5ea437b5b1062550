//! Machines behind every kind of router reach each other: directly where that can be, else through a relay. Needs root, for
//! network namespaces.
#![allow(clippy::unwrap_used, reason = "what helps a test may fail it")]

mod common;

use std::time::Duration;

use clan_lab::matrix::{self, Conditions, RELAYED_WITHIN, SWITCHED_WITHIN, Troubles};
use common::with_fleet;

#[test]
fn every_pair_meets_directly_where_it_can_and_streams_survive_a_move_a_dead_relay_and_bad_wires() {
    let report = with_fleet("clanmatrix", &matrix::specs(1), &["controller"], |fleet| {
        let mut report = matrix::tell(fleet)?;
        matrix::trouble(fleet, &mut report, Troubles { switches: 2, deaths: 1 })?;
        Ok(report)
    });
    println!("{}", report.document(&Conditions::default()));
    for pair in &report.pairs {
        assert!(if pair.could_be_direct() { pair.is_direct() } else { pair.is_relayed() }, "{pair:?}");
        // Twice the promise: this machine may have more to do than the test.
        assert!(pair.is_direct() || pair.first_packet < RELAYED_WITHIN * 2, "{pair:?}");
    }
    let switches = report.times("uplink switch").percentile(95).unwrap();
    assert!(switches < SWITCHED_WITHIN * 2, "{:?}", report.pauses);
    for pause in report.pauses.iter().filter(|pause| pause.what != "uplink switch") {
        // To a direct pair the death of a relay is nothing; others find another one, before QUIC gives a connection up.
        let within = Duration::from_secs(if pause.paths[0] == "direct" { 1 } else { 30 });
        assert!(pause.lasted < within, "{pause:?}");
    }
}
