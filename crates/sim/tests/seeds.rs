//! A few hundred clans in which everything goes wrong. `make sim SEEDS=…` runs more.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use clan_sim::{Outcome, Plan, Report, run};

fn good(plan: Plan) -> Report {
    let seed = plan.seed;
    let report = run(plan);
    if let Outcome::Bad(wrong) = &report.outcome {
        panic!("seed {seed}; run it again with `clan-sim --seed {seed}`:\n  {}", wrong.join("\n  "));
    }
    report
}

macro_rules! seeds {
    ($($name:ident: $range:expr),* $(,)?) => {
        $(#[test] fn $name() { $range.for_each(|seed| { good(Plan::of(seed)); }); })*
    };
}

// In parts, so that they run beside each other. Seeds outside these ranges that find something are added as their own.
seeds! {
    seeds_from_0: 0..30,
    seeds_from_30: 30..60,
    seeds_from_60: 60..90,
    seeds_from_90: 90..120,
    seeds_from_120: 120..150,
    seeds_from_150: 150..180,
    seeds_from_180: 180..210,
    seeds_from_210: 210..240,
    whom_only_a_liar_acknowledged: 713..714,
}

#[test]
fn a_clan_of_sixty_machines_agrees() {
    let report = good(Plan::large(1, 60));
    assert!(report.machines >= 60);
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    let (one, other) = (run(Plan::of(5)), run(Plan::of(5)));
    assert_eq!((one.messages, one.entries, one.crashes), (other.messages, other.entries, other.crashes));
}

/// A simulation that finds nothing wrong may be one that cannot.
#[test]
fn a_disk_that_forgets_what_it_was_told_to_keep_is_noticed() {
    let broken = |seed| Plan { lying_disks: true, crashes: 10, ..Plan::of(seed) };
    let noticed = (0..10).filter(|seed| run(broken(*seed)).outcome != Outcome::Good).count();
    assert_eq!(noticed, 10);
}

/// Machines whose disks are put back sign nothing before they were told what they had signed.
#[test]
fn a_machine_whose_disk_was_put_back_signs_no_place_twice() {
    let plan = |seed, forgetful_managers| {
        let plan = Plan { machines: 3, admins: 3, deeds: 40, restores: 8, ..Plan::of(seed) };
        Plan { crashes: 0, partitions: 0, rot: 0, full_disks: 0, hostile: 0, forgetful_managers, ..plan }
    };
    let forks = |seed: &u64| match run(plan(*seed, true)).outcome {
        Outcome::Bad(wrong) => wrong.iter().any(|line| line.contains("signed two entries for one place")),
        Outcome::Good => false,
    };
    let forked: Vec<u64> = (1000..1040).filter(forks).take(2).collect();
    assert_eq!(forked.len(), 2, "where nobody remembers, they do");
    for seed in forked {
        good(plan(seed, false));
    }
}
