//! What somebody may do, at a place of their log and at a time.

use clan_types::{PersonId, Role};

use crate::{
    Entry, Standing, VoidReason,
    fold::{Author, Change, Run, allowed},
    weigh::{At, Subject, may_set_role},
};

impl Run {
    /// What somebody may do in this entry, and what they might without the demotions that touch it.
    pub(super) fn role_for(&self, person: &PersonId, entry: &Entry) -> (Role, Role) {
        let (author, seq) = (entry.author(), entry.seq());
        let (mut role, mut before) = (Role::Guest, Role::Guest);
        for (_, change) in self.roles.get(person).into_iter().flatten() {
            match change {
                Change::Given(given) => (role, before) = (role.max(*given), before.max(*given)),
                Change::Lowered(demotion) if demotion.touches(&author, seq) => role = role.min(demotion.role),
                Change::Lowered(_) => {}
            }
        }
        // INVARIANT: by place in the log, as with revocations: a demotion also touches what claims to be earlier.
        for demotion in self.effective.demotions.get(person).into_iter().flatten() {
            if demotion.at > self.now && demotion.touches(&author, seq) {
                role = role.min(demotion.role);
            }
        }
        (role, before)
    }

    /// Somebody's role as it was, for others, at a point of the order that the pass has gone by.
    pub(crate) fn role_at(&self, person: &PersonId, at: At) -> Option<Role> {
        let changes = self.roles.get(person)?;
        let mut role = None;
        for (when, change) in changes {
            match (role, change) {
                // Before they came in it is the role that they came in with.
                (None, Change::Given(given)) => role = Some(*given),
                (Some(_), _) if *when > at => break,
                (Some(known), Change::Given(given)) => role = Some(known.max(*given)),
                (Some(known), Change::Lowered(demotion)) => role = Some(known.min(demotion.role)),
                (None, Change::Lowered(_)) => {}
            }
        }
        role
    }

    /// Whether somebody had the role at any time.
    pub(crate) fn was_ever(&self, person: &PersonId, role: Role) -> bool {
        let changes = self.roles.get(person).into_iter().flatten();
        changes.into_iter().any(|(_, change)| matches!(change, Change::Given(given) if *given == role))
    }

    pub(super) fn refresh_role(&mut self, person: &PersonId) {
        let role = self.role_at(person, self.now);
        if let (Some(role), Some(person)) = (role, self.state.people.get_mut(person)) {
            person.role = role;
        }
    }

    pub(super) fn set_role(
        &mut self,
        entry: &Entry,
        by: Author,
        subject: &PersonId,
        role: Role,
    ) -> Result<(), VoidReason> {
        if self.effective.refused.contains(&entry.id()) {
            return Err(VoidReason::LastOwner);
        }
        let Some(person) = self.state.people.get(subject) else {
            return self.claim(entry, by, Subject::Role(*subject, role));
        };
        if person.standing != Standing::Good {
            return Err(VoidReason::NoSubject);
        }
        if role < person.role {
            return self.claim(entry, by, Subject::Role(*subject, role));
        }
        allowed(may_set_role(by.role, person.role, role))?;
        if role > person.role
            && let Some(changes) = self.roles.get_mut(subject)
        {
            changes.push((self.now, Change::Given(role)));
            self.supports.entry(*subject).or_default().push(by.person);
            self.refresh_role(subject);
        }
        Ok(())
    }

    /// Whether somebody may remove, rename or revoke a person, or a machine of theirs.
    pub(super) fn may_act_on(&self, by: &Author, subject: &PersonId) -> bool {
        let role = self.state.people.get(subject).map(|person| person.role);
        by.person == *subject || Some(by.role) >= role.max(Some(Role::Admin))
    }
}
