//! How fast the ledger is. Numbers are kept as JSON; nothing here passes or fails by them.

use std::{
    error::Error,
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_store::{LedgerStore, SealKey};
use clan_types::{ClanId, InviteId, MachineId, PersonId, Role, Timestamp, WgPublicKey};
use ed25519_dalek::SigningKey;
use serde::Serialize;

const ENTRIES: u64 = 10_000;
/// The clan that is opened as a whole.
const MEMBERS: u64 = 1_000;
const WHOLE: usize = 100_000;
const ROUNDS: usize = 5;
const START: u64 = 1_700_000_000_000;

#[derive(Serialize)]
struct Results {
    version: u32,
    optimised: bool,
    entries: u64,
    rounds: usize,
    measured: Vec<Measured>,
    /// Of a clan of 1,000 members and 100,000 entries; milliseconds for each whole step.
    clan: Vec<Measured>,
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
    let clan = whole(folder)?;
    writeln!(out, "Clan of {MEMBERS} members and {WHOLE} entries, {ROUNDS} rounds:")?;
    for Measured { name, median_ms, fastest_ms } in &clan {
        writeln!(out, "{name:34} {median_ms:>12.3} {fastest_ms:>12.3}")?;
    }
    let file = folder.join("ledger.json");
    let results =
        Results { version: 2, optimised: !cfg!(debug_assertions), entries: ENTRIES, rounds: ROUNDS, measured, clan };
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

/// Opens a large clan from its file, and brings another machine up to date that lacks its last entry.
fn whole(folder: &Path) -> Result<Vec<Measured>, Box<dyn Error>> {
    let entries = large_clan()?;
    let clan = entries[0].clan();
    let path = folder.join("clan.redb");
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let seal = SealKey::derive(&[7; 32]);
    LedgerStore::open_sealed(&path, &clan, seal.clone())?.append_all(&entries)?;
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let mut times = Vec::new();
        let began = Instant::now();
        let store = LedgerStore::open_sealed(&path, &clan, seal.clone())?;
        times.push(("open the file", began.elapsed()));
        let load = Instant::now();
        let mut ledger = store.load()?;
        times.push(("load", load.elapsed()));
        let fold = Instant::now();
        let people = ledger.state().people.len();
        times.push(("fold", fold.elapsed()));
        times.push(("open, load and fold", began.elapsed()));
        if people < usize::try_from(MEMBERS)? || ledger.len() != entries.len() {
            return Err(format!("{people} people, {} entries", ledger.len()).into());
        }
        let mut behind = Ledger::open(clan);
        behind.insert_all(entries.iter().take(entries.len() - 1).cloned());
        let _ = behind.state();
        let began = Instant::now();
        let vector = behind.vector();
        times.push(("say what is there", began.elapsed()));
        let began = Instant::now();
        let missing: Vec<Entry> = ledger.missing(&vector, 2000).into_iter().cloned().collect();
        times.push(("find what is missing", began.elapsed()));
        if missing.len() != 1 {
            return Err(format!("{} entries are missing instead of one", missing.len()).into());
        }
        let began = Instant::now();
        behind.insert_all(missing);
        let _ = behind.state();
        times.push(("take it and fold", began.elapsed()));
        if behind.state() != ledger.state() {
            return Err("two ledgers of the same entries differ".into());
        }
        let began = Instant::now();
        let key = SigningKey::from_bytes(&[7; 32]);
        let body = ledger.role_change(&person(3), Role::Admin);
        let entry = ledger.author(&key, body, Timestamp::from_millis(START * 2))?;
        ledger.insert(entry)?;
        let _ = ledger.state();
        times.push(("give a role and fold all anew", began.elapsed()));
        rounds.push(times);
    }
    Ok(rounds[0].iter().map(|(name, _)| summary(name, &rounds)).collect())
}

/// Every member comes in by an invite of one of ten admins; fifty are put out again by admins, a hundred put machines of
/// their own out; the rest is what people do from day to day.
fn large_clan() -> Result<Vec<Entry>, Box<dyn Error>> {
    let founder = SigningKey::from_bytes(&[7; 32]);
    let mut now = START;
    let (mut ledger, founding) =
        Ledger::found(&founder, "family".parse()?, "anna".parse()?, [1; 32], Timestamp::from_millis(now))?;
    let clan = ledger.clan();
    let mut say = |ledger: &mut Ledger, key: &SigningKey, body: Body| -> Result<Entry, Box<dyn Error>> {
        now += 1;
        let entry = ledger.author(key, body, Timestamp::from_millis(now))?;
        ledger.insert(entry.clone())?;
        Ok(entry)
    };
    let mut entries = vec![founding, say(&mut ledger, &founder, enrolment(&clan, &founder, 0, "annas-laptop")?)?];
    for n in 1..=MEMBERS {
        let (by, role) = if n <= 10 { (founder.clone(), Role::Admin) } else { (seed(1, n % 10 + 1), Role::Member) };
        let secret = seed(3, n);
        let invite = InviteId::from_bytes(secret.verifying_key().to_bytes());
        let expires = Timestamp::from_millis(START * 2);
        entries.push(say(&mut ledger, &by, Body::Invite { invite, role, uses: 1, expires, approval: false })?);
        let body = Body::admission(&secret, &clan, &person(n), format!("person{n}").parse()?);
        let admission = say(&mut ledger, &seed(1, n), body)?;
        entries.push(admission.clone());
        entries.push(say(&mut ledger, &seed(1, n), enrolment(&clan, &seed(1, n), n, &format!("laptop{n}"))?)?);
        let witness = if n <= 10 { 0 } else { n % 10 + 1 };
        entries.push(say(&mut ledger, &seed(2, witness), Body::Countersign { admission: admission.id() })?);
    }
    let mut turn = 0;
    while entries.len() < WHOLE - 400 {
        turn += 1;
        let n = 11 + turn % (MEMBERS - 10);
        let name = format!("laptop{n}-{turn}").parse()?;
        let machine = MachineId::from_bytes(seed(2, n).verifying_key().to_bytes());
        entries.push(say(&mut ledger, &seed(1, n), Body::RenameMachine { machine, name })?);
    }
    // What is put out is named by its last entry, so that nothing of this needs the state.
    for n in 0..150u64 {
        let member = MEMBERS - n;
        let machine = MachineId::from_bytes(seed(2, member).verifying_key().to_bytes());
        let by = if n < 50 { seed(1, n % 10 + 1) } else { seed(1, member) };
        let body = ledger.revocation_of_machine(&machine);
        entries.push(say(&mut ledger, &by, body)?);
        if n < 50 {
            let body = Body::RevokePerson { person: person(member), last: ledger.head(person(member).into()) };
            entries.push(say(&mut ledger, &by, body)?);
        }
    }
    while entries.len() < WHOLE {
        let name = format!("anna{}", entries.len()).parse()?;
        let person = PersonId::from_bytes(founder.verifying_key().to_bytes());
        entries.push(say(&mut ledger, &founder, Body::RenamePerson { person, name })?);
    }
    Ok(entries)
}

fn seed(kind: u8, n: u64) -> SigningKey {
    let mut seed = [kind; 32];
    seed[..8].copy_from_slice(&n.to_le_bytes());
    SigningKey::from_bytes(&seed)
}

fn person(n: u64) -> PersonId {
    PersonId::from_bytes(seed(1, n).verifying_key().to_bytes())
}

fn enrolment(clan: &ClanId, by: &SigningKey, n: u64, name: &str) -> Result<Body, Box<dyn Error>> {
    let mut wg = [1; 32];
    wg[..8].copy_from_slice(&n.to_le_bytes());
    Ok(Body::enrol(&seed(2, n), clan, &AuthorId::of(by), name.parse()?, WgPublicKey::from_bytes(wg)))
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
