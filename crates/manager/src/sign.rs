//! Signing what the person decides, and handing it to the clan.

use clan_api::{ApiProblem, ErrorCode};
use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_os::channel::Channel;
use clan_types::{ClanId, EntryId};
use clan_wire::control::ControlRequest;
use ed25519_dalek::SigningKey;

use crate::{
    clan::Clan, disk::DiskError, guest, memory::Known, paths::ClanPaths, problem, record::PersonLog, tasks::now,
};

/// The ledger that these entries amount to. Bytes that are no entry of the clan are left out: they came from a guest
/// or a peer, and change nothing.
pub(crate) fn fold<'a>(clan: ClanId, entries: impl IntoIterator<Item = &'a [u8]>) -> Ledger {
    let mut ledger = Ledger::open(clan);
    let decoded = entries.into_iter().filter_map(|bytes| Entry::decode(bytes).ok());
    ledger.insert_all(decoded);
    ledger
}

/// Why an entry has no effect, if it has none.
fn void(ledger: &Ledger, entry: &EntryId) -> Option<String> {
    ledger.state().void.iter().find(|v| v.entry == *entry).map(|v| problem::with_sources(&v.reason))
}

/// Signs an entry into the person's log, durably; nobody has seen it then.
pub(crate) fn sign(
    paths: &ClanPaths,
    key: &SigningKey,
    log: &mut PersonLog,
    ledger: &mut Ledger,
    body: Body,
) -> Result<Entry, ApiProblem> {
    let signed = sign_all(paths, key, log, ledger, vec![body])?;
    signed.into_iter().next().ok_or_else(|| ApiProblem::new(ErrorCode::Internal, "nothing was signed"))
}

/// Signs entries that belong together into the person's log, durably, all of them or none; nobody has seen them then.
///
/// INVARIANT: every entry follows on all that the log holds, whatever the ledger lacks: the person never signs two
/// entries for one place.
pub(crate) fn sign_all(
    paths: &ClanPaths,
    key: &SigningKey,
    log: &mut PersonLog,
    ledger: &mut Ledger,
    bodies: Vec<Body>,
) -> Result<Vec<Entry>, ApiProblem> {
    ledger.insert_all(log.entries().filter_map(|bytes| Entry::decode(bytes).ok()));
    // Entries that an older copy of this log lacks, as after it was restored from a backup.
    let author = AuthorId::of(key);
    let theirs: Vec<Vec<u8>> = ledger.entries().filter(|e| e.author() == author).map(Entry::encode).collect();
    for entry in theirs.into_iter().skip(log.len()) {
        log.push(entry);
    }
    let internal = |e: clan_ledger::EntryError| {
        ApiProblem::new(ErrorCode::Internal, "the entry cannot be signed").why(e.to_string())
    };
    let refused = |e: clan_ledger::InsertError| {
        ApiProblem::new(ErrorCode::Internal, "the entry does not fit the ledger").why(e.to_string())
    };
    let mut signed = Vec::with_capacity(bodies.len());
    for body in bodies {
        let entry = ledger.author(key, body, now()).map_err(internal)?;
        ledger.insert(entry.clone()).map_err(refused)?;
        signed.push(entry);
    }
    for entry in &signed {
        if let Some(why) = void(ledger, &entry.id())
            && !matches!(entry.body(), Body::Admission { .. } | Body::Enrol { .. })
        {
            return Err(ApiProblem::new(ErrorCode::NotAllowed, "the clan's rules do not allow this").why(why));
        }
    }
    let mut longer = log.clone();
    for entry in &signed {
        longer.push(entry.encode());
    }
    longer.save(&paths.log()).map_err(|e: DiskError| problem::disk(&e))?;
    *log = longer;
    Ok(signed)
}

/// The ledger as the clan's machine here has it, and beside it what is to be handed over first: what was signed, and
/// did not arrive, as a manager was killed in between.
async fn present(clan: &Clan, control: &Channel, log: &PersonLog) -> Result<Ledger, ApiProblem> {
    let Known { mut ledger, has } = clan.record.memory().refresh(control).await.map_err(|e| problem::guest(&e))?;
    let mine = log.entries().filter_map(|bytes| Entry::decode(bytes).ok());
    let arrived = has.iter().find(|(author, _)| author == clan.author().as_bytes()).map_or(0, |(_, next)| *next);
    let behind: Vec<Entry> = mine.filter(|entry| entry.seq() >= arrived).collect();
    for entry in &behind {
        guest::tell(control, &ControlRequest::Append(entry.encode())).await.map_err(|e| problem::guest(&e))?;
    }
    ledger.insert_all(behind);
    Ok(ledger)
}

/// The ledger, to look at.
pub(crate) async fn ledger(clan: &Clan) -> Result<Ledger, ApiProblem> {
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    clan.record.memory().refresh(&control).await.map(|known| known.ledger).map_err(|e| problem::guest(&e))
}

/// Signs what `decision` says on seeing the ledger, all of it or nothing, and hands it to the clan's machine here.
/// What it says beside the bodies is given back with the entries.
pub(crate) async fn decide_all<T>(
    clan: &Clan,
    decision: impl FnOnce(&Ledger) -> Result<(T, Vec<Body>), ApiProblem>,
) -> Result<(T, Vec<Entry>), ApiProblem> {
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let mut log = clan.log.lock().await;
    let mut ledger = present(clan, &control, &log).await?;
    let (outcome, bodies) = decision(&ledger)?;
    if bodies.is_empty() {
        return Ok((outcome, Vec::new()));
    }
    let entries = sign_all(clan.record.paths(), &clan.key, &mut log, &mut ledger, bodies)?;
    for entry in &entries {
        guest::tell(&control, &ControlRequest::Append(entry.encode())).await.map_err(|e| {
            problem::guest(&e).hint("what you decided is signed: the same command again hands it to the clan")
        })?;
    }
    Ok((outcome, entries))
}

/// Signs an entry and hands it to the clan's machine here.
pub(crate) async fn decide(
    clan: &Clan,
    body: impl FnOnce(&Ledger) -> Result<Body, ApiProblem>,
) -> Result<Entry, ApiProblem> {
    let decision = |ledger: &Ledger| Ok(((), vec![body(ledger)?]));
    let ((), entries) = decide_all(clan, decision).await?;
    entries.into_iter().next().ok_or_else(|| ApiProblem::new(ErrorCode::Internal, "nothing was signed"))
}

/// Signs the entry by which this machine goes, and says it to the others. Whether one of them has heard it.
pub(crate) async fn bid_farewell(
    clan: &Clan,
    body: impl FnOnce(&Ledger) -> Result<Body, ApiProblem>,
) -> Result<bool, ApiProblem> {
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let mut log = clan.log.lock().await;
    let mut ledger = present(clan, &control, &log).await?;
    let body = body(&ledger)?;
    let entry = sign(clan.record.paths(), &clan.key, &mut log, &mut ledger, body)?;
    guest::farewell(&control, entry.encode()).await.map_err(|e| problem::guest(&e))
}

#[cfg(test)]
mod tests {
    use clan_types::{InviteId, Role, Timestamp};

    use super::*;
    use crate::paths::Paths;

    fn founded() -> (tempfile::TempDir, ClanPaths, SigningKey, PersonLog, ClanId) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path()).clan(&ClanId::from_bytes([1; 32]));
        crate::disk::create_dir(&paths.dir).unwrap();
        let key = SigningKey::from_bytes(&[5; 32]);
        let (ledger, entry) =
            Ledger::found(&key, "family".parse().unwrap(), "anna".parse().unwrap(), [7; 32], now()).unwrap();
        let mut log = PersonLog::default();
        log.push(entry.encode());
        (dir, paths, key, log, ledger.clan())
    }

    fn invite(n: u8) -> Body {
        Body::Invite {
            invite: InviteId::from_bytes([n; 32]),
            role: Role::Member,
            uses: 1,
            expires: Timestamp::from_millis(1 << 45),
            approval: false,
        }
    }

    #[test]
    fn a_guest_that_hides_entries_cannot_make_the_person_sign_a_place_twice() {
        let (_dir, paths, key, mut log, clan) = founded();
        let mut ledger = fold(clan, log.entries());
        let first = sign(&paths, &key, &mut log, &mut ledger, invite(1)).unwrap();
        // A guest that presents the ledger as it was before.
        let found: Vec<u8> = log.entries().next().unwrap().to_vec();
        let mut rolled_back = fold(clan, [found.as_slice()]);
        let second = sign(&paths, &key, &mut log, &mut rolled_back, invite(2)).unwrap();
        assert_eq!(second.seq(), first.seq() + 1);
        assert_eq!(second.prev(), Some(first.id()));
        let all = fold(clan, log.entries());
        assert!(all.state().equivocations.is_empty());
        assert_eq!(all.state().invites.len(), 2);
        assert_eq!(PersonLog::load(&paths).unwrap(), log, "on disk before anyone sees it");
    }

    #[test]
    fn a_log_restored_from_a_backup_goes_on_where_the_clan_knows_it() {
        let (_dir, paths, key, mut log, clan) = founded();
        let backup = log.clone();
        let mut ledger = fold(clan, log.entries());
        let first = sign(&paths, &key, &mut log, &mut ledger, invite(1)).unwrap();
        let mut restored = backup;
        let mut known = fold(clan, log.entries());
        let second = sign(&paths, &key, &mut restored, &mut known, invite(2)).unwrap();
        assert_eq!(second.prev(), Some(first.id()));
        assert_eq!(restored.len(), 3);
    }

    #[test]
    fn what_the_rules_do_not_allow_is_not_signed() {
        let (_dir, paths, _key, log, clan) = founded();
        let stranger = SigningKey::from_bytes(&[6; 32]);
        let mut ledger = fold(clan, log.entries());
        let mut theirs = PersonLog::default();
        let refused = sign(&paths, &stranger, &mut theirs, &mut ledger, invite(1)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::NotAllowed);
        assert_eq!(theirs.len(), 0);
    }

    #[test]
    fn bytes_that_are_no_entries_are_left_out() {
        let (_dir, _paths, _key, log, clan) = founded();
        let junk: [&[u8]; 2] = [b"", &[0xff; 5000]];
        assert_eq!(fold(clan, junk.into_iter().chain(log.entries())).len(), 1);
    }
}
