//! The clan's ledger in plain sentences: who decided what, when, and whether it counts.

use std::collections::HashMap;

use clan_api::{ApiProblem, AuthorKind, ClanLog, ClanLogEntry};
use clan_ledger::{Body, Entry, Ledger, State};
use clan_types::{EntryId, MachineId, PersonId, PersonName};

use crate::{clan::Clan, problem, sign};

/// More entries are not asked for at once.
const MAX_LIMIT: u32 = 10_000;

/// The newest entries of a clan's ledger, newest last.
pub(crate) async fn log(clan: &Clan, limit: u32) -> Result<ClanLog, ApiProblem> {
    Ok(tell(&sign::ledger(clan).await?, limit.min(MAX_LIMIT)))
}

fn tell(ledger: &Ledger, limit: u32) -> ClanLog {
    let names = Names::new(ledger);
    let void: HashMap<EntryId, String> =
        names.state.void.iter().map(|v| (v.entry, problem::with_sources(&v.reason))).collect();
    let mut entries: Vec<&Entry> = ledger.entries().collect();
    entries.sort_by_key(|e| (e.time(), e.id()));
    let shown = entries.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
    let told = entries[shown..].iter().map(|entry| {
        let author = entry.author();
        let machine = matches!(entry.body(), Body::Countersign { .. });
        let (by, author_name) = if machine {
            (AuthorKind::Machine, names.machine(&author.machine()))
        } else {
            (AuthorKind::Person, names.person(&author.person()))
        };
        ClanLogEntry {
            id: entry.id(),
            at: entry.time().wall,
            by,
            author: author.to_string(),
            author_name,
            what: names.sentence(entry.body()),
            void: void.get(&entry.id()).cloned(),
        }
    });
    ClanLog { total: entries.len() as u64, entries: told.collect() }
}

/// Who is called what.
struct Names<'a> {
    state: &'a State,
    /// Who wrote an admission, by its entry, those who never came in included.
    newcomers: HashMap<EntryId, (PersonId, &'a PersonName)>,
    /// What people call themselves in their admission.
    asked_as: HashMap<PersonId, &'a PersonName>,
}

impl<'a> Names<'a> {
    fn new(ledger: &'a Ledger) -> Self {
        let (mut newcomers, mut asked_as) = (HashMap::new(), HashMap::new());
        for entry in ledger.entries() {
            if let Body::Admission { name, .. } = entry.body() {
                newcomers.insert(entry.id(), (entry.author().person(), name));
                asked_as.insert(entry.author().person(), name);
            }
        }
        Self { state: ledger.state(), newcomers, asked_as }
    }

    /// Somebody who never came in is never shown by a bare name, which could be a member's.
    fn person(&self, id: &PersonId) -> String {
        match (self.state.people.get(id), self.asked_as.get(id)) {
            (Some(person), _) => person.name.to_string(),
            (None, Some(name)) => format!("{} (wants to be {name})", id.short()),
            (None, None) => id.short(),
        }
    }

    fn machine(&self, id: &MachineId) -> String {
        self.state.machines.get(id).map_or_else(|| id.short(), |machine| machine.name.to_string())
    }

    fn machine_of(&self, id: &MachineId) -> String {
        match self.state.machines.get(id) {
            Some(machine) => format!("the machine {} of {}", machine.name, self.person(&machine.owner)),
            None => format!("the machine {}", id.short()),
        }
    }

    fn sentence(&self, body: &Body) -> String {
        match body {
            Body::Found { clan, founder, .. } => format!("founded the clan {clan} as {founder}"),
            Body::Enrol { name, .. } => format!("added the machine {name}"),
            Body::Remove { machine } => format!("took {} out", self.machine_of(machine)),
            Body::Invite { invite, role, uses: 1, .. } => format!("invited one person as {role} ({})", invite.short()),
            Body::Invite { invite, role, uses, .. } => {
                format!("invited up to {uses} people as {role} ({})", invite.short())
            }
            Body::Admission { invite, name, .. } => {
                let by = self.state.invites.get(invite).map_or_else(|| "nobody".to_owned(), |i| self.person(&i.by));
                format!("asked to come in as {name}, invited by {by} ({})", invite.short())
            }
            Body::Countersign { admission } => match self.newcomers.get(admission) {
                Some((person, name)) if self.state.people.contains_key(person) => format!("let {name} in"),
                Some((person, _)) => format!("let {} in", self.person(person)),
                None => "let somebody in whose request is not known here".to_owned(),
            },
            Body::Publish { description } => format!(
                "put the virtual machine \"{}\" in force (image {})",
                description.title,
                description.image.short()
            ),
            Body::RevokePerson { person, .. } => format!("put {} out of the clan", self.person(person)),
            Body::RevokeMachine { machine, .. } => format!("put {} out of the clan", self.machine_of(machine)),
            Body::RevokeInvite { invite } => match self.state.invites.get(invite) {
                Some(known) => format!("withdrew the invite {} of {}", invite.short(), self.person(&known.by)),
                None => format!("withdrew the invite {}", invite.short()),
            },
            Body::Leave => "left the clan".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clan_types::{InviteId, Role};

    use super::*;
    use crate::authority::tests::{at, clan, key, machine, person, say};

    fn lines(log: &ClanLog) -> String {
        let line = |e: &ClanLogEntry| {
            let void = e.void.as_ref().map(|why| format!(" [no effect: {why}]")).unwrap_or_default();
            format!("{:?} {} {}{void}", e.by, e.author_name, e.what)
        };
        log.entries.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn every_entry_is_a_sentence_and_a_void_one_says_why() {
        let mut ledger = clan();
        for body in ledger.revocation_of_person(&person(4)) {
            say(&mut ledger, &key(2), body);
        }
        // A member may not invite, a member may not put an owner out, and somebody out says nothing any more.
        let invite = InviteId::from_bytes(key(60).verifying_key().to_bytes());
        say(&mut ledger, &key(5), Body::Invite { invite, role: Role::Owner, uses: 3, expires: at(9000) });
        let revoke = ledger.revocation_of_machine(&machine(1));
        say(&mut ledger, &key(5), revoke);
        say(&mut ledger, &key(4), Body::Leave);
        let stranger = Body::admission(&key(60), &ledger.clan(), &person(9), "anna".parse().unwrap());
        say(&mut ledger, &key(9), stranger);
        say(&mut ledger, &key(3), Body::RevokeInvite { invite });
        insta::assert_snapshot!(lines(&tell(&ledger, 1000)), @r"
        Person anna founded the clan family as anna
        Person anna added the machine annas-laptop
        Person anna invited one person as admin (iztcpvjhop)
        Person ben asked to come in as ben, invited by anna (iztcpvjhop)
        Person ben added the machine bens-laptop
        Machine annas-laptop let ben in
        Person anna invited one person as admin (ykdfkswhsw)
        Person carl asked to come in as carl, invited by anna (ykdfkswhsw)
        Person carl added the machine carls-laptop
        Machine annas-laptop let carl in
        Person anna invited one person as member (zjl65uyojj)
        Person dora asked to come in as dora, invited by anna (zjl65uyojj)
        Person dora added the machine doras-laptop
        Machine annas-laptop let dora in
        Person anna invited one person as member (7skhomhut2)
        Person emil asked to come in as emil, invited by anna (7skhomhut2)
        Person emil added the machine emils-laptop
        Machine annas-laptop let emil in
        Person ben put the machine doras-laptop of dora out of the clan
        Person ben put dora out of the clan
        Person emil invited up to 3 people as owner (kutpoquuc4) [no effect: its author's role does not allow it]
        Person emil put the machine annas-laptop of anna out of the clan [no effect: its author's role does not allow it]
        Person dora left the clan [no effect: its author was revoked]
        Person 7ulsioc2ud (wants to be anna) asked to come in as anna, invited by nobody (kutpoquuc4) [no effect: no machine of the clan has countersigned the admission]
        Person carl withdrew the invite kutpoquuc4
        ");
    }

    #[test]
    fn the_newest_come_last_and_no_more_than_asked_for() {
        let ledger = clan();
        let all = tell(&ledger, 1000);
        assert_eq!(all.total, ledger.len() as u64);
        assert_eq!(all.entries.len(), ledger.len());
        assert!(all.entries.windows(2).all(|w| w[0].at <= w[1].at));
        let some = tell(&ledger, 3);
        assert_eq!(some.entries, all.entries[all.entries.len() - 3..]);
        assert_eq!(some.total, all.total);
        assert!(tell(&ledger, 0).entries.is_empty());
    }
}
