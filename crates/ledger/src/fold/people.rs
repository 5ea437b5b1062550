//! How people and their devices come in.

use clan_types::{DeviceId, DeviceName, EntryId, PersonId, PersonName, Role, Timestamp};

use crate::{
    AuthorId, Body, Device, DeviceKind, Entry, InviteProblem, Pending, Person, Standing, VoidReason,
    fold::{Author, Change, Newcomer, Run, allowed},
};

/// How many devices a person may have had in all. INVARIANT: a demotion names the last entry of each in one entry.
const MAX_DEVICES: usize = 48;

impl Run {
    pub(super) fn ask(&mut self, admission: &Entry) -> Result<(), VoidReason> {
        let person = admission.author().person();
        if self.state.devices.contains_key(&admission.author().device()) {
            return Err(VoidReason::KeyTaken);
        }
        self.admissions.insert(admission.id(), person);
        self.newcomers.insert(person, Newcomer { admission: admission.clone(), later: Vec::new(), failed: None });
        Ok(())
    }

    pub(super) fn countersign(&mut self, entry: &Entry, admission: &EntryId) -> Result<(), VoidReason> {
        let witness = entry.author().machine();
        let cut = self.effective.machines.get(&entry.author()).copied();
        if cut.is_some_and(|count| entry.seq() >= count) {
            return Err(VoidReason::AuthorRevoked);
        }
        let machine = self.state.machines.get(&witness).ok_or(VoidReason::Outsider)?;
        // INVARIANT: who goes by themselves, or takes a machine of theirs out, undoes nobody's coming, whenever they say that
        // they did. A newcomer needs a valid invite in any case; honest machines ask nobody who has gone.
        // What a revoked machine's own revocation left standing counts, whenever it was written. Where only its owner
        // was revoked, time decides.
        if cut.is_none() && self.put_out.contains(&machine.owner) {
            return Err(VoidReason::AuthorRevoked);
        }
        let person = *self.admissions.get(admission).ok_or(VoidReason::NoSubject)?;
        let Some(newcomer) = self.newcomers.get(&person) else {
            return Ok(()); // Somebody else countersigned first.
        };
        if self.state.pending.contains_key(&person) {
            return Ok(());
        }
        let asks = newcomer.admission.clone();
        let result = self.redeem(&asks, entry);
        match result {
            Ok(()) => self.catch_up(&person),
            Err(reason) => {
                if let Some(newcomer) = self.newcomers.get_mut(&person) {
                    newcomer.failed = Some(reason);
                }
            }
        }
        result
    }

    pub(super) fn redeem(&mut self, admission: &Entry, countersign: &Entry) -> Result<(), VoidReason> {
        let Body::Admission { invite: id, name, .. } = admission.body() else { return Err(VoidReason::NoSubject) };
        let at: Timestamp = countersign.time().wall;
        // The same for whoever made the invite.
        self.state.check_invite_if(id, at, |by| !self.put_out.contains(by)).map_err(VoidReason::Invite)?;
        let invite = self.state.invites.get_mut(id).ok_or(VoidReason::Invite(InviteProblem::Unknown))?;
        invite.used += 1;
        let (role, by, approval) = (invite.role, invite.by, invite.approval);
        let person = admission.author().person();
        // INVARIANT: a name that somebody took, whenever they say that they did, keeps nobody out.
        let name = self.person_names.give_free(name, person);
        if approval {
            let pending = Pending { admission: admission.id(), name, role, invite: *id, invited_by: by, since: at };
            self.state.pending.insert(person, pending);
        } else {
            self.admit(person, name, role, Some(by), None, countersign);
        }
        Ok(())
    }

    /// Who may decide about a newcomer, and who that is.
    pub(super) fn decide(&self, by: Author, admission: &EntryId) -> Result<PersonId, VoidReason> {
        let person = *self.admissions.get(admission).ok_or(VoidReason::NoSubject)?;
        match self.state.pending.get(&person) {
            Some(pending) => allowed(may_give(by.role, pending.role)).map(|()| person),
            None if self.state.people.contains_key(&person) || self.denied.contains(&person) => {
                Err(VoidReason::Decided)
            }
            None => Err(VoidReason::NoSubject),
        }
    }

    pub(super) fn approve(&mut self, entry: &Entry, by: Author, admission: &EntryId) -> Result<(), VoidReason> {
        let person = self.decide(by, admission)?;
        let Pending { name, role, invited_by, .. } = self.state.pending.remove(&person).ok_or(VoidReason::NoSubject)?;
        self.admit(person, name, role, Some(invited_by), Some(by.person), entry);
        self.catch_up(&person);
        Ok(())
    }

    pub(super) fn deny(&mut self, by: Author, admission: &EntryId) -> Result<(), VoidReason> {
        let person = self.decide(by, admission)?;
        let pending = self.state.pending.remove(&person).ok_or(VoidReason::NoSubject)?;
        self.person_names.free(&pending.name, &person);
        self.denied.insert(person);
        if let Some(newcomer) = self.newcomers.remove(&person) {
            self.void(&newcomer.admission, VoidReason::Denied);
            for entry in newcomer.later {
                self.void(&entry, VoidReason::Denied);
            }
        }
        Ok(())
    }

    /// The keys that come in with a newcomer.
    pub(crate) fn newcomers_keys(&self, admission: &EntryId) -> Vec<AuthorId> {
        let Some(person) = self.admissions.get(admission) else { return Vec::new() };
        let theirs = self.newcomers_entries(admission).iter().filter_map(|entry| match entry.body() {
            Body::Enrol { machine, .. } => Some((*machine).into()),
            Body::AddDevice { device, .. } => Some((*device).into()),
            _ => None,
        });
        theirs.chain([(*person).into()]).collect()
    }

    /// What a newcomer who is not in yet has written since they asked.
    pub(crate) fn newcomers_entries(&self, admission: &EntryId) -> &[Entry] {
        let newcomer = self.admissions.get(admission).and_then(|person| self.newcomers.get(person));
        newcomer.map_or(&[], |newcomer| &newcomer.later)
    }

    /// What a newcomer wrote before they were in takes effect once they are.
    pub(super) fn catch_up(&mut self, person: &PersonId) {
        if !self.state.people.contains_key(person) {
            return;
        }
        let later = self.newcomers.remove(person).map(|newcomer| newcomer.later).unwrap_or_default();
        for entry in later {
            if let Err(reason) = self.take_person(&entry) {
                self.void(&entry, reason);
            }
        }
    }

    pub(super) fn admit(
        &mut self,
        id: PersonId,
        name: PersonName,
        role: Role,
        invited_by: Option<PersonId>,
        approved_by: Option<PersonId>,
        by: &Entry,
    ) {
        let since = by.time().wall;
        let witness = self.state.machines.get(&by.author().machine()).map(|machine| machine.owner);
        self.supports.insert(id, invited_by.into_iter().chain(approved_by).chain(witness).collect());
        self.joined.insert(id, self.now);
        let person = Person { name, role, invited_by, approved_by, since, standing: Standing::Good };
        self.state.people.insert(id, person);
        let lowered =
            self.effective.demotions.get(&id).into_iter().flatten().filter(|demotion| demotion.at <= self.now);
        let given = std::iter::once(Change::Given(role));
        let changes = given.chain(lowered.cloned().map(Change::Lowered)).map(|change| (self.now, change)).collect();
        self.roles.insert(id, changes);
        self.refresh_role(&id);
        let first = AuthorId::from(id).device();
        self.device_in(
            first,
            Device { owner: id, name: None, kind: DeviceKind::Device, since, standing: Standing::Good },
        );
        if self.people_out.contains(&id) {
            self.person_out(&id, Standing::Revoked);
        }
    }

    pub(super) fn add_device(
        &mut self,
        entry: &Entry,
        by: Author,
        id: &DeviceId,
        name: &DeviceName,
        kind: DeviceKind,
    ) -> Result<(), VoidReason> {
        let key = AuthorId::from(*id);
        if self.is_in_use(&key) || self.state.machines.contains_key(&key.machine()) {
            return Err(VoidReason::KeyTaken);
        }
        let theirs = self.devices_of.get(&by.person).map_or(&[][..], Vec::as_slice);
        if theirs.len() >= MAX_DEVICES {
            return Err(VoidReason::TooManyDevices);
        }
        let bears = |device: &Device| device.standing == Standing::Good && device.name.as_ref() == Some(name);
        if theirs.iter().filter_map(|id| self.state.devices.get(id)).any(bears) {
            return Err(VoidReason::NameTaken);
        }
        let (name, since) = (Some(name.clone()), entry.time().wall);
        self.device_in(*id, Device { owner: by.person, name, kind, since, standing: Standing::Good });
        Ok(())
    }

    pub(super) fn device_in(&mut self, id: DeviceId, mut device: Device) {
        if self.devices_out.contains(&id) {
            device.standing = Standing::Revoked;
        }
        self.device_since.insert(id.into(), self.now);
        self.devices_of.entry(device.owner).or_default().push(id);
        self.state.devices.insert(id, device);
    }

    /// Whether a key is somebody's device, or a newcomer's.
    pub(super) fn is_in_use(&self, key: &AuthorId) -> bool {
        let person = key.person();
        self.state.devices.contains_key(&key.device())
            || self.newcomers.contains_key(&person)
            || self.denied.contains(&person)
    }
}

/// Who may give a newcomer a role: admins guest and member, owners any.
pub(super) fn may_give(role: Role, given: Role) -> bool {
    role >= if given >= Role::Admin { Role::Owner } else { Role::Admin }
}
