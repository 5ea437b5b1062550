//! How fast the ledger is. Numbers are kept as JSON; nothing here passes or fails by them.

use std::{
    error::Error,
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use clan_ledger::{Body, Entry, Ledger};
use clan_types::{InviteId, Role, Timestamp};
use ed25519_dalek::SigningKey;
use serde::Serialize;

const ENTRIES: u64 = 10_000;
const ROUNDS: usize = 5;
const START: u64 = 1_700_000_000_000;

#[derive(Serialize)]
struct Results {
    version: u32,
    optimised: bool,
    entries: u64,
    rounds: usize,
    measured: Vec<Measured>,
}

#[derive(Serialize)]
struct Measured {
    name: &'static str,
    /// Of all rounds, in milliseconds for all entries.
    median_ms: f64,
    fastest_ms: f64,
}

/// Measures, prints a table to `out`, and keeps the numbers in `target/bench/ledger.json`.
pub(crate) fn run(out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    if cfg!(debug_assertions) {
        writeln!(out, "This build is not optimised: the numbers mean little. Use `make bench`.")?;
    }
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        rounds.push(round()?);
    }
    let measured: Vec<Measured> = rounds[0].iter().map(|(name, _)| summary(name, &rounds)).collect();
    writeln!(
        out,
        "Ledger of {ENTRIES} entries, one author, {ROUNDS} rounds:\n{:34} {:>12} {:>12} {:>14}",
        "", "median ms", "fastest ms", "entries/s"
    )?;
    for Measured { name, median_ms, fastest_ms } in &measured {
        writeln!(
            out,
            "{name:34} {median_ms:>12.1} {fastest_ms:>12.1} {:>14.0}",
            ENTRIES as f64 / (median_ms / 1000.0)
        )?;
    }
    let folder = Path::new("target/bench");
    fs::create_dir_all(folder)?;
    let file = folder.join("ledger.json");
    let results =
        Results { version: 1, optimised: !cfg!(debug_assertions), entries: ENTRIES, rounds: ROUNDS, measured };
    fs::write(&file, serde_json::to_vec_pretty(&results)?)?;
    writeln!(out, "Kept in {}", file.display())?;
    Ok(())
}

fn round() -> Result<Vec<(&'static str, Duration)>, Box<dyn Error>> {
    let mut times = Vec::new();
    let key = SigningKey::from_bytes(&[7; 32]);
    let (mut ledger, founding) =
        Ledger::found(&key, "family".parse()?, "anna".parse()?, [1; 32], Timestamp::from_millis(START))?;

    let mut encoded = vec![founding.encode()];
    let began = Instant::now();
    for number in 1..ENTRIES {
        let mut invite = [0; 32];
        invite[..8].copy_from_slice(&number.to_le_bytes());
        let expires = Timestamp::from_millis(START + 1_000_000 + number);
        let body = Body::Invite {
            invite: InviteId::from_bytes(invite),
            role: Role::Member,
            uses: 1,
            expires,
            approval: false,
        };
        let entry = ledger.author(&key, body, Timestamp::from_millis(START + number))?;
        encoded.push(entry.encode());
        ledger.insert(entry)?;
    }
    times.push(("sign, chain and insert", began.elapsed()));

    let began = Instant::now();
    let entries: Vec<Entry> = encoded.iter().map(|bytes| Entry::decode(bytes)).collect::<Result<_, _>>()?;
    times.push(("decode and verify", began.elapsed()));

    let mut copy = Ledger::open(ledger.clan());
    let began = Instant::now();
    copy.insert_all(entries);
    times.push(("insert", began.elapsed()));

    let began = Instant::now();
    let folded = copy.state();
    times.push(("fold", began.elapsed()));
    if folded != ledger.state() {
        return Err("two ledgers of the same entries differ".into());
    }

    Ok(times)
}

fn summary(name: &'static str, rounds: &[Vec<(&'static str, Duration)>]) -> Measured {
    let mut times: Vec<f64> = rounds
        .iter()
        .flatten()
        .filter(|(known, _)| *known == name)
        .map(|(_, took)| took.as_secs_f64() * 1000.0)
        .collect();
    times.sort_by(f64::total_cmp);
    Measured { name, median_ms: times[times.len() / 2], fastest_ms: times[0] }
}
