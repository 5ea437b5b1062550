//! Putting people and machines out, withdrawing invites, and which invites there are.

use std::collections::{BTreeMap, HashSet};

use clan_api::{ApiProblem, ErrorCode, InviteInfo, InviteState, Revocation, RevocationKind, Revoke};
use clan_ledger::{Body, InviteProblem, Ledger, Standing, State};
use clan_types::{EntryId, InviteId, MachineId, MachineName, PersonId, PersonName, Role, Timestamp};

use crate::{clan::Clan, sign, tasks::now};

/// A shorter beginning of an id means nothing.
const LEAST_PREFIX: usize = 6;

/// Puts a person or a machine out, or withdraws an invite; or finds out whether that would work.
pub(crate) async fn revoke(clan: &Clan, request: &Revoke) -> Result<Revocation, ApiProblem> {
    let (author, here) = (clan.person(), clan.state().await?.machine);
    if request.dry_run {
        let ledger = sign::ledger(clan).await?;
        return decide(&ledger, &author, &here, request).map(|(revocation, _)| revocation);
    }
    let (mut revocation, entries) = sign::decide_all(clan, |ledger| decide(ledger, &author, &here, request)).await?;
    revocation.entries = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    if !revocation.already {
        tracing::info!(clan = %clan.name(), kind = ?revocation.kind, subject = %revocation.name, "revoked");
    }
    Ok(revocation)
}

/// The invites that were made in the clan, oldest first.
pub(crate) async fn invites(clan: &Clan) -> Result<Vec<InviteInfo>, ApiProblem> {
    Ok(list(&sign::ledger(clan).await?, now()))
}

/// What a revocation comes to, and the entries that it takes; none if its subject is out already.
///
/// `here` is this computer's own machine.
fn decide(
    ledger: &Ledger,
    author: &PersonId,
    here: &MachineId,
    request: &Revoke,
) -> Result<(Revocation, Vec<Body>), ApiProblem> {
    let state = ledger.state();
    let role = state.role_of(author).ok_or_else(|| {
        ApiProblem::new(ErrorCode::NotAllowed, "you are not in the clan any more")
            .why("somebody has put you out, or you have left")
            .hint("remove what is left of it here: `clan vm delete --force`")
    })?;
    let mut revocation = Revocation {
        kind: request.kind,
        id: String::new(),
        name: String::new(),
        machines: Vec::new(),
        entries: 0,
        already: false,
    };
    let subject = request.subject.trim();
    match request.kind {
        RevocationKind::Person => {
            let (id, person) = find_person(state, subject)?;
            if id == *author {
                return Err(ApiProblem::new(ErrorCode::BadRequest, "this is you").hint("leave the clan: `clan leave`"));
            }
            let machines = state.good_machines().filter(|(_, m)| m.owner == id).map(|(_, m)| m.name.clone());
            revocation.machines = machines.collect();
            (revocation.id, revocation.name) = (id.to_string(), person.to_string());
            if state.people.get(&id).is_some_and(|p| p.standing == Standing::Revoked) {
                revocation.already = true;
                return Ok((revocation, Vec::new()));
            }
            may_put_out(state, author, role, &id, &format!("put {person} out"))?;
            Ok((revocation, ledger.revocation_of_person(&id)))
        }
        RevocationKind::Machine => {
            let (id, name) = find_machine(state, subject)?;
            if *here == id {
                return Err(ApiProblem::new(ErrorCode::BadRequest, format!("{name} is this computer's machine"))
                    .hint("leave the clan with it: `clan leave`"));
            }
            (revocation.id, revocation.name) = (id.to_string(), name.to_string());
            revocation.machines = vec![name.clone()];
            let machine = state.machines.get(&id).ok_or_else(|| nothing("machine", subject))?;
            if machine.standing == Standing::Revoked {
                revocation.already = true;
                return Ok((revocation, Vec::new()));
            }
            may_put_out(state, author, role, &machine.owner, &format!("put the machine {name} out"))?;
            Ok((revocation, vec![ledger.revocation_of_machine(&id)]))
        }
        RevocationKind::Invite => {
            let id = find_invite(state, subject)?;
            let invite = state.invites.get(&id).ok_or_else(|| nothing("invite", subject))?;
            (revocation.id, revocation.name) = (id.to_string(), name_of(state, &invite.by));
            if invite.revoked {
                revocation.already = true;
                return Ok((revocation, Vec::new()));
            }
            if invite.by != *author && role < Role::Admin {
                let act = format!("withdraw an invite of {}", revocation.name);
                return Err(not_allowed(state, role, Role::Admin, &act, None));
            }
            Ok((revocation, vec![Body::RevokeInvite { invite: id }]))
        }
    }
}

/// The rule of the fold, told to people before anything is signed; the fold itself is asked again by who signs.
fn may_put_out(state: &State, author: &PersonId, role: Role, owner: &PersonId, act: &str) -> Result<(), ApiProblem> {
    let theirs = state.people.get(owner).map_or(Role::Guest, |person| person.role);
    let needed = theirs.max(Role::Admin);
    if author == owner || role >= needed {
        return Ok(());
    }
    let reason = (theirs > Role::Admin).then(|| format!("{} is {theirs}", name_of(state, owner)));
    Err(not_allowed(state, role, needed, act, reason))
}

/// Says which role is missing, and who has it.
pub(crate) fn not_allowed(state: &State, role: Role, needed: Role, act: &str, reason: Option<String>) -> ApiProblem {
    let takes = format!("it takes the role {needed}, and you are {role}");
    let why = match reason {
        Some(reason) => format!("{reason}: {takes}"),
        None => takes,
    };
    let mut able: Vec<_> = state.people.values().filter(|p| p.standing == Standing::Good && p.role >= needed).collect();
    able.sort_by_key(|p| (std::cmp::Reverse(p.role), &p.name));
    let able: Vec<String> = able.iter().take(5).map(|p| format!("{} ({})", p.name, p.role)).collect();
    let problem = ApiProblem::new(ErrorCode::NotAllowed, format!("you may not {act}")).why(why);
    if able.is_empty() { problem } else { problem.hint(format!("ask somebody who may: {}", able.join(", "))) }
}

pub(crate) fn name_of(state: &State, person: &PersonId) -> String {
    state.people.get(person).map_or_else(|| person.short(), |p| p.name.to_string())
}

fn nothing(kind: &str, text: &str) -> ApiProblem {
    let command = match kind {
        "person" => "clan members",
        "machine" => "clan machines",
        _ => "clan invites",
    };
    ApiProblem::new(ErrorCode::NotFound, format!("the clan has no {kind} `{text}`"))
        .hint(format!("see which there are: `{command}`"))
}

/// Who is meant by a name, an id, or a unique beginning of one. One in good standing goes before those who had the
/// same name in the past.
pub(crate) fn find_person(state: &State, text: &str) -> Result<(PersonId, PersonName), ApiProblem> {
    if let Some((id, person)) = text.parse().ok().and_then(|name| state.person_named(&name)) {
        return Ok((*id, person.name.clone()));
    }
    let known = state.people.iter().map(|(id, p)| (*id, id.to_string(), p.name.clone()));
    unique("person", text, known)
}

pub(crate) fn find_machine(state: &State, text: &str) -> Result<(MachineId, MachineName), ApiProblem> {
    if let Some((id, machine)) = text.parse().ok().and_then(|name| state.machine_named(&name)) {
        return Ok((*id, machine.name.clone()));
    }
    unique("machine", text, state.machines.iter().map(|(id, m)| (*id, id.to_string(), m.name.clone())))
}

fn find_invite(state: &State, text: &str) -> Result<InviteId, ApiProblem> {
    if text.starts_with("clan:") {
        return Err(ApiProblem::new(ErrorCode::BadRequest, "an invite is named by its id, not by its link")
            .hint("see the ids: `clan invites`"));
    }
    unique("invite", text, state.invites.keys().map(|id| (*id, id.to_string(), ""))).map(|(id, _)| id)
}

pub(crate) fn unique<I, N: std::fmt::Display>(
    kind: &str,
    text: &str,
    known: impl Iterator<Item = (I, String, N)>,
) -> Result<(I, N), ApiProblem> {
    let lower = text.to_ascii_lowercase();
    let fits = |id: &str, name: &str| {
        (!name.is_empty() && name == lower) || (lower.len() >= LEAST_PREFIX && id.starts_with(&lower))
    };
    let mut found: Vec<_> = known.filter(|(_, id, name)| fits(id, &name.to_string())).take(2).collect();
    match (found.pop(), found.pop()) {
        (Some((id, _, name)), None) => Ok((id, name)),
        (Some(_), Some(_)) => Err(ApiProblem::new(ErrorCode::Ambiguous, format!("`{text}` fits more than one {kind}"))
            .hint("name it by its whole id")),
        (None, _) => Err(nothing(kind, text)),
    }
}

fn list(ledger: &Ledger, at: Timestamp) -> Vec<InviteInfo> {
    let state = ledger.state();
    let void: HashSet<EntryId> = state.void.iter().map(|v| v.entry).collect();
    let (mut made, mut redeemed) = (BTreeMap::new(), BTreeMap::<InviteId, Vec<PersonName>>::new());
    for entry in ledger.entries().filter(|e| !void.contains(&e.id())) {
        match entry.body() {
            Body::Invite { invite, .. } => {
                made.insert(*invite, entry.time());
            }
            Body::Admission { invite, name, .. } if state.people.contains_key(&entry.author().person()) => {
                redeemed.entry(*invite).or_default().push(name.clone());
            }
            _ => {}
        }
    }
    let mut invites: Vec<_> = state
        .invites
        .iter()
        .filter_map(|(id, invite)| {
            let made = *made.get(id)?;
            let by_name = state.people.get(&invite.by)?.name.clone();
            let state = match state.check_invite(id, at) {
                Ok(_) => InviteState::Open,
                Err(InviteProblem::Used) => InviteState::Used,
                Err(InviteProblem::Expired) => InviteState::Expired,
                Err(InviteProblem::Revoked | InviteProblem::Unknown) => InviteState::Withdrawn,
            };
            let info = InviteInfo {
                id: *id,
                state,
                role: invite.role,
                uses: invite.uses,
                used: invite.used,
                approval: invite.approval,
                expires: invite.expires,
                made: made.wall,
                by: invite.by,
                by_name,
                redeemed_by: redeemed.remove(id).unwrap_or_default(),
            };
            Some((made, info))
        })
        .collect();
    invites.sort_by_key(|(made, info)| (*made, info.id));
    invites.into_iter().map(|(_, info)| info).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use clan_ledger::{AuthorId, Entry};
    use clan_types::WgPublicKey;
    use ed25519_dalek::SigningKey;

    use super::*;

    pub(crate) fn key(n: u8) -> SigningKey {
        SigningKey::from_bytes(&[n; 32])
    }

    pub(crate) fn person(n: u8) -> PersonId {
        AuthorId::of(&key(n)).person()
    }

    pub(crate) fn machine(n: u8) -> MachineId {
        AuthorId::of(&key(100 + n)).machine()
    }

    pub(crate) fn at(seconds: u64) -> Timestamp {
        Timestamp::from_millis(1_790_000_000_000 + seconds * 1000)
    }

    pub(crate) fn say(ledger: &mut Ledger, by: &SigningKey, body: Body) -> Entry {
        let entry = ledger.author(by, body, at(ledger.len() as u64)).unwrap();
        ledger.insert(entry.clone()).unwrap();
        entry
    }

    fn enrol(ledger: &mut Ledger, n: u8, name: &str) {
        let wg = WgPublicKey::from_bytes([n; 32]);
        let body = Body::enrol(&key(100 + n), &ledger.clan(), &AuthorId::of(&key(n)), name.parse().unwrap(), wg);
        say(ledger, &key(n), body);
    }

    fn invite(ledger: &mut Ledger, by: u8, n: u8, role: Role, expires: Timestamp) -> InviteId {
        let invite = InviteId::from_bytes(key(n).verifying_key().to_bytes());
        say(ledger, &key(by), Body::Invite { invite, role, uses: 1, expires, approval: false });
        invite
    }

    fn join(ledger: &mut Ledger, n: u8, name: &str, role: Role) {
        invite(ledger, 1, 200 + n, role, at(10_000));
        let body = Body::admission(&key(200 + n), &ledger.clan(), &person(n), name.parse().unwrap());
        let admission = say(ledger, &key(n), body).id();
        enrol(ledger, n, &format!("{name}s-laptop"));
        say(ledger, &key(101), Body::Countersign { admission });
    }

    /// anna, owner; ben and carl, admins; dora and emil, members.
    pub(crate) fn clan() -> Ledger {
        let (mut ledger, _) =
            Ledger::found(&key(1), "family".parse().unwrap(), "anna".parse().unwrap(), [7; 32], at(0)).unwrap();
        enrol(&mut ledger, 1, "annas-laptop");
        join(&mut ledger, 2, "ben", Role::Admin);
        join(&mut ledger, 3, "carl", Role::Admin);
        join(&mut ledger, 4, "dora", Role::Member);
        join(&mut ledger, 5, "emil", Role::Member);
        assert!(ledger.state().void.is_empty(), "{:?}", ledger.state().void);
        ledger
    }

    fn ask(kind: RevocationKind, subject: &str) -> Revoke {
        Revoke { kind, subject: subject.into(), dry_run: false }
    }

    fn told(problem: &ApiProblem) -> String {
        let mut text = format!("[{}] {}", problem.code, problem.message);
        if let Some(why) = &problem.why {
            text.push_str(&format!("\nwhy: {why}"));
        }
        for hint in &problem.hints {
            text.push_str(&format!("\nhint: {hint}"));
        }
        text
    }

    fn refusal(by: u8, kind: RevocationKind, subject: &str) -> String {
        told(&decide(&clan(), &person(by), &machine(by), &ask(kind, subject)).unwrap_err())
    }

    #[test]
    fn who_may_not_is_told_which_role_it_takes_and_who_has_it() {
        use RevocationKind::{Invite, Machine, Person};
        insta::assert_snapshot!(refusal(4, Person, "ben"), @r"
        [not_allowed] you may not put ben out
        why: it takes the role admin, and you are member
        hint: ask somebody who may: anna (owner), ben (admin), carl (admin)
        ");
        insta::assert_snapshot!(refusal(4, Person, "emil"), @r"
        [not_allowed] you may not put emil out
        why: it takes the role admin, and you are member
        hint: ask somebody who may: anna (owner), ben (admin), carl (admin)
        ");
        insta::assert_snapshot!(refusal(2, Person, "anna"), @r"
        [not_allowed] you may not put anna out
        why: anna is owner: it takes the role owner, and you are admin
        hint: ask somebody who may: anna (owner)
        ");
        insta::assert_snapshot!(refusal(2, Machine, "annas-laptop"), @r"
        [not_allowed] you may not put the machine annas-laptop out
        why: anna is owner: it takes the role owner, and you are admin
        hint: ask somebody who may: anna (owner)
        ");
        insta::assert_snapshot!(refusal(4, Invite, &clan().state().invites.keys().next().unwrap().to_string()), @r"
        [not_allowed] you may not withdraw an invite of anna
        why: it takes the role admin, and you are member
        hint: ask somebody who may: anna (owner), ben (admin), carl (admin)
        ");
    }

    #[test]
    fn what_makes_no_sense_is_told_with_what_to_do_instead() {
        use RevocationKind::{Invite, Machine, Person};
        insta::assert_snapshot!(refusal(2, Person, "ben"), @r"
        [bad_request] this is you
        hint: leave the clan: `clan leave`
        ");
        insta::assert_snapshot!(refusal(2, Machine, "bens-laptop"), @r"
        [bad_request] bens-laptop is this computer's machine
        hint: leave the clan with it: `clan leave`
        ");
        insta::assert_snapshot!(refusal(2, Machine, "toaster"), @r"
        [not_found] the clan has no machine `toaster`
        hint: see which there are: `clan machines`
        ");
        insta::assert_snapshot!(refusal(2, Person, "Not a name"), @r"
        [not_found] the clan has no person `Not a name`
        hint: see which there are: `clan members`
        ");
        insta::assert_snapshot!(refusal(2, Invite, "clan://join/abc"), @r"
        [bad_request] an invite is named by its id, not by its link
        hint: see the ids: `clan invites`
        ");
        insta::assert_snapshot!(refusal(9, Person, "anna"), @r"
        [not_allowed] you are not in the clan any more
        why: somebody has put you out, or you have left
        hint: remove what is left of it here: `clan vm delete --force`
        ");
    }

    #[test]
    fn a_person_goes_with_all_their_machines_and_a_second_time_signs_nothing() {
        let mut ledger = clan();
        for subject in ["dora", &person(4).to_string(), &person(4).to_string()[..8]] {
            let (told, bodies) =
                decide(&ledger, &person(2), &machine(2), &ask(RevocationKind::Person, subject)).unwrap();
            assert_eq!((told.name.as_str(), told.machines.len(), bodies.len()), ("dora", 1, 2), "{subject}");
        }
        let request = ask(RevocationKind::Person, "dora");
        for body in decide(&ledger, &person(2), &machine(2), &request).unwrap().1 {
            say(&mut ledger, &key(2), body);
        }
        assert!(ledger.state().machine_in_good_standing(&machine(4)).is_none());
        assert_eq!(ledger.state().role_of(&person(4)), None);
        let (told, bodies) = decide(&ledger, &person(2), &machine(2), &request).unwrap();
        assert!(told.already && bodies.is_empty());
    }

    #[test]
    fn everybody_puts_out_their_own_lost_machine_and_admins_those_of_members() {
        let mut ledger = clan();
        let wg = WgPublicKey::from_bytes([77; 32]);
        let enrol = Body::enrol(&key(177), &ledger.clan(), &AuthorId::of(&key(4)), "phone".parse().unwrap(), wg);
        say(&mut ledger, &key(4), enrol);
        let request = ask(RevocationKind::Machine, "phone");
        assert!(decide(&ledger, &person(5), &machine(5), &request).is_err(), "another member");
        for by in [4, 2, 1] {
            let (_, bodies) = decide(&ledger, &person(by), &machine(by), &request).unwrap();
            let mut after = ledger.clone();
            for body in bodies {
                say(&mut after, &key(by), body);
            }
            assert!(after.state().machine_in_good_standing(&machine(77)).is_none(), "by {by}");
            assert!(after.state().machine_in_good_standing(&machine(4)).is_some(), "by {by}");
        }
    }

    #[test]
    fn invites_are_listed_with_what_became_of_them() {
        let mut ledger = clan();
        let expired = invite(&mut ledger, 2, 50, Role::Guest, at(200));
        let withdrawn = invite(&mut ledger, 2, 51, Role::Guest, at(10_000));
        let open = invite(&mut ledger, 3, 52, Role::Member, at(10_000));
        // A member's: void, hence no invite at all.
        invite(&mut ledger, 4, 53, Role::Member, at(10_000));
        let short = &withdrawn.to_string()[..10];
        let (told, bodies) = decide(&ledger, &person(3), &machine(3), &ask(RevocationKind::Invite, short)).unwrap();
        assert_eq!(told.name, "ben", "whose invite it is");
        for body in bodies {
            say(&mut ledger, &key(3), body);
        }
        let listed = list(&ledger, at(300));
        let states: Vec<_> = listed.iter().skip(4).map(|i| (i.id, i.state)).collect();
        assert_eq!(
            states,
            [(expired, InviteState::Expired), (withdrawn, InviteState::Withdrawn), (open, InviteState::Open)]
        );
        assert_eq!(listed[0].state, InviteState::Used);
        assert_eq!(listed[0].redeemed_by, ["ben".parse().unwrap()]);
        assert_eq!((listed[0].by_name.as_str(), listed[0].used), ("anna", 1));
    }
}
