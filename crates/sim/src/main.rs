//! `make sim`: many seeds, with a report.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program")]

use std::{
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use clan_sim::{Outcome, Plan, Report, run};

const USAGE: &str = "usage: clan-sim [--seeds FROM..TO | --seeds COUNT | --seed SEED] [--machines N]";

fn main() -> ExitCode {
    let Some((seeds, machines)) = arguments() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let panicked = AtomicU64::new(0);
    let reports = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let plan = machines.map_or_else(|| Plan::of(seed), |machines| Plan::large(seed, machines));
                    let Ok(report) = std::panic::catch_unwind(|| run(plan)) else {
                        println!("seed {seed}: it panicked");
                        panicked.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    if let Outcome::Bad(wrong) = &report.outcome {
                        println!("seed {seed}:\n  {}", wrong.join("\n  "));
                    }
                    if let Ok(mut reports) = reports.lock() {
                        reports.push(report);
                    }
                }
            });
        }
    });
    let Ok(reports) = reports.into_inner() else { return ExitCode::from(255) };
    let bad: Vec<u64> = reports.iter().filter(|r| r.outcome != Outcome::Good).map(|r| r.seed).collect();
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    let mut healed: Vec<u64> = reports.iter().map(|r| r.healed_ms).collect();
    healed.sort_unstable();
    println!(
        "{} seeds in {:.1} s: {} machines, {} entries, {} messages, {} power failures within a write, {} damaged files",
        reports.len(),
        began.elapsed().as_secs_f64(),
        sum(|r| r.machines as u64),
        sum(|r| r.entries as u64),
        sum(|r| r.messages),
        sum(|r| r.crashes),
        sum(|r| r.put_aside as u64),
    );
    println!(
        "agreement after the faults: median {} s, longest {} s (virtual)",
        healed.get(healed.len() / 2).unwrap_or(&0) / 1000,
        healed.last().unwrap_or(&0) / 1000
    );
    if bad.is_empty() && panicked.into_inner() == 0 {
        println!("nothing wrong");
        ExitCode::SUCCESS
    } else {
        println!("wrong: {bad:?}; run one again with `clan-sim --seed SEED`");
        ExitCode::FAILURE
    }
}

fn arguments() -> Option<(std::ops::Range<u64>, Option<usize>)> {
    let (mut seeds, mut machines) = (0..300, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next()?;
        match name.as_str() {
            "--seed" => {
                let seed: u64 = value.parse().ok()?;
                seeds = seed..seed.checked_add(1)?;
            }
            "--seeds" => {
                seeds = match value.split_once("..") {
                    Some((from, to)) => from.parse().ok()?..to.parse().ok()?,
                    None => 0..value.parse().ok()?,
                };
            }
            "--machines" => machines = Some(value.parse().ok()?),
            _ => return None,
        }
    }
    Some((seeds, machines))
}
