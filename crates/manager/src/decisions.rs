//! Roles, names, and who comes in: what admins decide about people, and people about themselves.

use clan_api::{
    AdmissionDecision, ApiProblem, DecideAdmission, ErrorCode, NamedKind, Rename, Renamed, RoleChange, SetRole,
};
use clan_ledger::{Body, Ledger, Standing, State};
use clan_types::{MachineName, PersonId, PersonName, Role};

use crate::{
    authority::{find_machine, find_person, name_of, not_allowed, unique},
    clan::Clan,
    sign,
};

/// Gives a person another role, or finds out whether that would work.
pub(crate) async fn set_role(clan: &Clan, request: &SetRole) -> Result<RoleChange, ApiProblem> {
    let author = clan.person();
    let (mut change, entries) = decide(clan, request.dry_run, |ledger| role_change(ledger, &author, request)).await?;
    change.entries = entries;
    if entries > 0 {
        tracing::info!(clan = %clan.name(), person = %change.name, from = %change.from, to = %change.to, "gave a role");
    }
    Ok(change)
}

/// Gives a person or a machine another name, or finds out whether that would work.
pub(crate) async fn rename(clan: &Clan, request: &Rename) -> Result<Renamed, ApiProblem> {
    let author = clan.person();
    let (mut renamed, entries) = decide(clan, request.dry_run, |ledger| renaming(ledger, &author, request)).await?;
    renamed.entries = entries;
    Ok(renamed)
}

/// Lets a newcomer in who waits for it or refuses them, or finds out whether that would work.
pub(crate) async fn decide_admission(clan: &Clan, request: &DecideAdmission) -> Result<AdmissionDecision, ApiProblem> {
    let author = clan.person();
    let (mut decision, entries) = decide(clan, request.dry_run, |ledger| admission(ledger, &author, request)).await?;
    decision.entries = entries;
    if entries > 0 {
        tracing::info!(clan = %clan.name(), person = %decision.name, approved = decision.approve, "decided");
    }
    Ok(decision)
}

pub(crate) async fn decide<T>(
    clan: &Clan,
    dry_run: bool,
    decision: impl FnOnce(&Ledger) -> Result<(T, Vec<Body>), ApiProblem>,
) -> Result<(T, u32), ApiProblem> {
    if dry_run {
        return decision(&sign::ledger(clan).await?).map(|(outcome, _)| (outcome, 0));
    }
    let (outcome, entries) = sign::decide_all(clan, decision).await?;
    Ok((outcome, u32::try_from(entries.len()).unwrap_or(u32::MAX)))
}

pub(crate) fn own_role(state: &State, author: &PersonId) -> Result<Role, ApiProblem> {
    state.role_of(author).ok_or_else(|| {
        ApiProblem::new(ErrorCode::NotAllowed, "you are not in the clan any more")
            .why("somebody has put you out, or you have left")
            .hint("remove what is left of it here: `clan vm delete --force`")
    })
}

fn role_change(ledger: &Ledger, author: &PersonId, request: &SetRole) -> Result<(RoleChange, Vec<Body>), ApiProblem> {
    let state = ledger.state();
    let role = own_role(state, author)?;
    let (id, name) = find_person(state, request.person.trim())?;
    let from = state.role_of(&id).ok_or_else(|| out(&name))?;
    let change = RoleChange { id, name: name.clone(), from, to: request.role, entries: 0 };
    if from == request.role {
        return Ok((change, Vec::new()));
    }
    let greatest = from.max(request.role);
    let needed = if greatest >= Role::Admin { Role::Owner } else { Role::Admin };
    if role < needed {
        let reason = (from >= Role::Admin).then(|| format!("{name} is {from}"));
        return Err(not_allowed(state, role, needed, &format!("make {name} {}", request.role), reason));
    }
    let owners = state.people.values().filter(|p| p.standing == Standing::Good && p.role == Role::Owner).count();
    if from == Role::Owner && owners == 1 {
        return Err(ApiProblem::new(ErrorCode::Conflict, format!("{name} is the clan's only owner"))
            .why("a clan without an owner could not make anybody admin or owner any more")
            .hint("make somebody else owner first: `clan role NAME owner`"));
    }
    Ok((change, vec![ledger.role_change(&id, request.role)]))
}

fn renaming(ledger: &Ledger, author: &PersonId, request: &Rename) -> Result<(Renamed, Vec<Body>), ApiProblem> {
    let state = ledger.state();
    let role = own_role(state, author)?;
    let bad = |e: clan_types::NameError| ApiProblem::new(ErrorCode::BadRequest, e.to_string());
    let taken = |what: &str, name: &str| {
        ApiProblem::new(ErrorCode::NameTaken, format!("the clan has a {what} called `{name}` already"))
            .hint("choose another name")
    };
    let subject = request.subject.trim();
    let (id, from, to, owner, body, is_taken, what) = match request.kind {
        NamedKind::Person => {
            let to: PersonName = request.name.parse().map_err(bad)?;
            let (id, from) = find_person(state, subject)?;
            state.person(&id).ok_or_else(|| out(&from))?;
            let body = Body::RenamePerson { person: id, name: to.clone() };
            (id.to_string(), from.to_string(), to.to_string(), id, body, state.is_person_name(&to), "person")
        }
        NamedKind::Machine => {
            let to: MachineName = request.name.parse().map_err(bad)?;
            let (id, from) = find_machine(state, subject)?;
            let owner = state.machine_in_good_standing(&id).ok_or_else(|| out(&from))?.owner;
            let body = Body::RenameMachine { machine: id, name: to.clone() };
            (id.to_string(), from.to_string(), to.to_string(), owner, body, state.is_node_name(&to), "machine")
        }
    };
    let renamed = Renamed { kind: request.kind, id, from: from.clone(), to: to.clone(), entries: 0 };
    if from == to {
        return Ok((renamed, Vec::new()));
    }
    let theirs = state.role_of(&owner).unwrap_or(Role::Guest);
    let needed = theirs.max(Role::Admin);
    if owner != *author && role < needed {
        let reason = (theirs > Role::Admin).then(|| format!("{} is {theirs}", name_of(state, &owner)));
        return Err(not_allowed(state, role, needed, &format!("rename {from}"), reason));
    }
    if is_taken {
        return Err(taken(what, &to));
    }
    Ok((renamed, vec![body]))
}

fn admission(
    ledger: &Ledger,
    author: &PersonId,
    request: &DecideAdmission,
) -> Result<(AdmissionDecision, Vec<Body>), ApiProblem> {
    let state = ledger.state();
    let role = own_role(state, author)?;
    let waiting = state.pending.iter().map(|(id, newcomer)| (*id, id.to_string(), newcomer.name.clone()));
    let text = request.person.trim();
    let found = unique("newcomer", text, waiting).and_then(|(id, _)| {
        state.pending.get(&id).map(|newcomer| (id, newcomer)).ok_or_else(|| ApiProblem::new(ErrorCode::NotFound, ""))
    });
    let (id, newcomer) = found.map_err(|problem| {
        if problem.code == ErrorCode::Ambiguous {
            return problem;
        }
        ApiProblem::new(ErrorCode::NotFound, format!("nobody called `{text}` waits for approval"))
            .hint("see who does: `clan members`")
    })?;
    let decision = AdmissionDecision {
        id,
        name: newcomer.name.clone(),
        role: newcomer.role,
        invited_by: state.people.get(&newcomer.invited_by).map_or_else(|| newcomer.name.clone(), |p| p.name.clone()),
        approve: request.approve,
        entries: 0,
    };
    let needed = if newcomer.role >= Role::Admin { Role::Owner } else { Role::Admin };
    if role < needed {
        let act = if request.approve { "let" } else { "refuse" };
        let end = if request.approve { " in" } else { "" };
        let reason = (newcomer.role >= Role::Admin).then(|| format!("they would be {}", newcomer.role));
        return Err(not_allowed(state, role, needed, &format!("{act} {}{end}", newcomer.name), reason));
    }
    let admission = newcomer.admission;
    let body = if request.approve { Body::Approve { admission } } else { Body::Deny { admission } };
    Ok((decision, vec![body]))
}

fn out(name: &impl std::fmt::Display) -> ApiProblem {
    ApiProblem::new(ErrorCode::NotFound, format!("{name} is not in the clan any more"))
        .hint("see who is: `clan members`, `clan machines`")
}

#[cfg(test)]
mod tests {
    use clan_types::InviteId;

    use super::*;
    use crate::authority::tests::{at, clan, key, machine, person, say};

    fn told(problem: &ApiProblem) -> String {
        let lines = std::iter::once(format!("[{}] {}", problem.code, problem.message));
        let why = problem.why.iter().map(|why| format!("why: {why}"));
        let hints = problem.hints.iter().map(|hint| format!("hint: {hint}"));
        lines.chain(why).chain(hints).collect::<Vec<_>>().join("\n")
    }

    fn role(by: u8, name: &str, role: Role) -> Result<(RoleChange, Vec<Body>), ApiProblem> {
        role_change(&clan(), &person(by), &SetRole { person: name.into(), role, dry_run: false })
    }

    #[test]
    fn what_is_decided_about_roles_here_is_what_the_fold_decides() {
        for by in 1..=5 {
            for (subject, name) in [(1, "anna"), (2, "ben"), (4, "dora")] {
                for to in [Role::Guest, Role::Member, Role::Admin, Role::Owner] {
                    let mut ledger = clan();
                    let before = ledger.state().role_of(&person(subject)).unwrap();
                    let decided = role(by, name, to);
                    let change = ledger.role_change(&person(subject), to);
                    let entry = say(&mut ledger, &key(by), change);
                    let void = ledger.state().void.iter().any(|void| void.entry == entry.id());
                    let after = ledger.state().role_of(&person(subject)).unwrap();
                    match decided {
                        Ok((change, bodies)) => {
                            assert_eq!((change.from, change.to, after), (before, to, to));
                            assert_eq!(bodies.is_empty(), before == to);
                            assert!(before == to || !void);
                        }
                        Err(_) => assert!(void && after == before, "{by} makes {name} {to}"),
                    }
                }
            }
        }
    }

    #[test]
    fn who_may_not_is_told_why_and_who_may() {
        insta::assert_snapshot!(told(&role(2, "dora", Role::Admin).unwrap_err()), @r"
        [not_allowed] you may not make dora admin
        why: it takes the role owner, and you are admin
        hint: ask somebody who may: anna (owner)
        ");
        insta::assert_snapshot!(told(&role(2, "carl", Role::Member).unwrap_err()), @r"
        [not_allowed] you may not make carl member
        why: carl is admin: it takes the role owner, and you are admin
        hint: ask somebody who may: anna (owner)
        ");
        insta::assert_snapshot!(told(&role(1, "anna", Role::Member).unwrap_err()), @r"
        [conflict] anna is the clan's only owner
        why: a clan without an owner could not make anybody admin or owner any more
        hint: make somebody else owner first: `clan role NAME owner`
        ");
    }

    #[test]
    fn people_rename_themselves_and_their_machines() {
        let ask = |kind, subject: &str, name: &str| Rename {
            kind,
            subject: subject.into(),
            name: name.into(),
            dry_run: false,
        };
        let ledger = clan();
        let (renamed, bodies) = renaming(&ledger, &person(4), &ask(NamedKind::Person, "dora", "Theodora")).unwrap();
        assert_eq!((renamed.from.as_str(), renamed.to.as_str(), bodies.len()), ("dora", "theodora", 1));
        let (renamed, _) = renaming(&ledger, &person(4), &ask(NamedKind::Machine, "doras-laptop", "nas")).unwrap();
        assert_eq!(renamed.id, machine(4).to_string());
        for (by, kind, subject, name, code) in [
            (4, NamedKind::Person, "emil", "x", ErrorCode::NotAllowed),
            (4, NamedKind::Machine, "emils-laptop", "x", ErrorCode::NotAllowed),
            (2, NamedKind::Person, "anna", "x", ErrorCode::NotAllowed),
            (4, NamedKind::Person, "dora", "emil", ErrorCode::NameTaken),
            (4, NamedKind::Machine, "doras-laptop", "emils-laptop", ErrorCode::NameTaken),
            (4, NamedKind::Person, "dora", "two words", ErrorCode::BadRequest),
            (4, NamedKind::Person, "nobody", "x", ErrorCode::NotFound),
        ] {
            let problem = renaming(&ledger, &person(by), &ask(kind, subject, name)).unwrap_err();
            assert_eq!(problem.code, code, "{by} renames {subject} to {name}");
        }
    }

    #[test]
    fn admins_decide_about_who_waits() {
        let mut ledger = clan();
        let invite = InviteId::from_bytes(key(60).verifying_key().to_bytes());
        let body = Body::Invite { invite, role: Role::Member, uses: 1, expires: at(9000), approval: true };
        say(&mut ledger, &key(2), body);
        let body = Body::admission(&key(60), &ledger.clan(), &person(9), "finn".parse().unwrap());
        let admission_ = say(&mut ledger, &key(9), body).id();
        say(&mut ledger, &key(101), Body::Countersign { admission: admission_ });
        let ask = |person: &str, approve| DecideAdmission { person: person.into(), approve, dry_run: false };
        let (decision, bodies) = admission(&ledger, &person(3), &ask("finn", true)).unwrap();
        assert_eq!((decision.invited_by.as_str(), decision.role), ("ben", Role::Member));
        assert_eq!(bodies, [Body::Approve { admission: admission_ }]);
        let (_, bodies) = admission(&ledger, &person(3), &ask("finn", false)).unwrap();
        assert_eq!(bodies, [Body::Deny { admission: admission_ }]);
        insta::assert_snapshot!(told(&admission(&ledger, &person(4), &ask("finn", true)).unwrap_err()), @r"
        [not_allowed] you may not let finn in
        why: it takes the role admin, and you are member
        hint: ask somebody who may: anna (owner), ben (admin), carl (admin)
        ");
        insta::assert_snapshot!(told(&admission(&ledger, &person(3), &ask("dora", true)).unwrap_err()), @r"
        [not_found] nobody called `dora` waits for approval
        hint: see who does: `clan members`
        ");
    }
}
