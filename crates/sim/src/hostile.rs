//! Members who lie: with their keys, over their connections, beside a controller that does as it should.

use clan_ledger::{AuthorId, Body, Entry};
use clan_types::{EntryId, Hlc, PersonId, Role, Timestamp};
use clan_wire::{
    beacon::{Beacon, SignedBeacon},
    peer::PeerMessage,
};
use ed25519_dalek::SigningKey;

use crate::{
    people::{Invitation, enrolment, invite_id},
    world::{EPOCH, World},
};

/// Entries of one flood.
const FLOOD: u64 = 60;

impl World {
    /// A hostile member does something that they should not.
    pub(crate) fn lie(&mut self) {
        let liars: Vec<usize> = (0..self.people.all.len())
            .filter(|person| {
                self.people.all[*person].hostile && self.nodes[self.people.all[*person].home].running.is_some()
            })
            .collect();
        let Some(liar) = self.dice.pick(&liars).copied() else { return };
        let (key, home) = (self.people.all[liar].key.clone(), self.people.all[liar].home);
        let machine = self.nodes[home].key.clone();
        let victim = self.people.all[0].id();
        match self.dice.range(0..9) {
            0 => {
                let secret = SigningKey::from_bytes(&self.dice.bytes());
                let expires = Timestamp::from_millis(EPOCH + 86_400_000);
                let body =
                    Body::Invite { invite: invite_id(&secret), role: Role::Owner, uses: 9, expires, approval: false };
                self.tell_all(home, &[&self.next(home, &key, body, 0)]);
                self.people.invitations.push(Invitation { secret, role: Role::Owner, rightful: false });
            }
            1 => {
                // Two entries for one place, each to half of the clan.
                let mut two = || {
                    let name = u32::try_from(self.dice.range(5000..6000)).unwrap_or(5000);
                    enrolment(&self.clan, &key, &SigningKey::from_bytes(&self.dice.bytes()), name)
                };
                let (one, other) = (two(), two());
                let entries = [self.next(home, &key, one, 0), self.next(home, &key, other, 1)];
                for (number, link) in self.links_of(home).into_iter().enumerate() {
                    let message = PeerMessage::Entries(entries[number % 2].iter().map(Entry::encode).collect());
                    self.send(link, message);
                }
            }
            2 => self.tell_all(home, &[&self.next(home, &key, Body::RevokePerson { person: victim, last: None }, 0)]),
            3 => {
                // The past: just after what the author said last, as if nobody had said anything since.
                let back = i64::try_from(self.dice.range(0..90_000_000)).unwrap_or(0);
                let body = Body::RevokePerson { person: victim, last: None };
                self.tell_all(home, &[&self.next(home, &key, body, -back)]);
            }
            4 => self.admit_an_outsider(home, &machine),
            5 => {
                let far = i64::try_from(self.dice.range(0..40 * 86_400_000)).unwrap_or(0);
                let body = enrolment(&self.clan, &key, &SigningKey::from_bytes(&self.dice.bytes()), 7000);
                self.tell_all(home, &[&self.next(home, &key, body, far)]);
            }
            6 if self.dice.permille(500) => {
                let me = AuthorId::of(&key).person();
                let body = Body::SetRole { person: me, role: Role::Owner, last: vec![] };
                self.tell_all(home, &[&self.next(home, &key, body, 0)]);
            }
            6 => self.flood(home),
            7 => {
                let beacon = Beacon {
                    clan: self.clan,
                    machine: self.nodes[home].id,
                    made: Timestamp::from_millis(EPOCH + self.now + self.dice.range(0..1_200_000)),
                    version: "x".repeat(64),
                    quic: vec![self.nodes[0].address; 32],
                    wireguard: vec![],
                    services: vec![],
                    image: None,
                    certificate: None,
                    control: clan_types::ControlMode::Local,
                };
                if let Ok(signed) = SignedBeacon::sign(&beacon, &machine) {
                    self.broadcast(home, &PeerMessage::Beacon(signed));
                }
            }
            _ => {
                self.broadcast(home, &PeerMessage::Vector(vec![]));
                let vector = (0..500).map(|_| (self.dice.bytes(), self.dice.word())).collect();
                self.broadcast(home, &PeerMessage::Vector(vector));
                let garbage = (0..20).map(|_| self.dice.bytes().to_vec()).collect();
                self.broadcast(home, &PeerMessage::Entries(garbage));
                self.broadcast(home, &PeerMessage::Hello { clan: self.clan, vector: vec![] });
            }
        }
    }

    /// The author's next entry, as far as the machine knows, with a time that is so many milliseconds off.
    fn next(&self, home: usize, key: &SigningKey, body: Body, shift: i64) -> Option<Entry> {
        let ledger = self.nodes[home].running.as_ref()?.replica.ledger();
        let author = AuthorId::of(key);
        let head = ledger.head(author).and_then(|head| ledger.get(&head.id));
        let wanted = Hlc { wall: Timestamp::from_millis((EPOCH + self.now).saturating_add_signed(shift)), counter: 0 };
        let floor = head.map_or(Hlc::default(), |head| head.time().next(Timestamp::from_millis(0)));
        let (seq, prev) = head.map_or((0, None), |head| (head.seq() + 1, Some(head.id())));
        Entry::sign(key, Some(&self.clan), seq, prev, wanted.max(floor), body).ok()
    }

    /// An outsider with an invite that nobody made, countersigned by the liar's machine.
    fn admit_an_outsider(&mut self, home: usize, machine: &SigningKey) {
        let (outsider, secret) =
            (SigningKey::from_bytes(&self.dice.bytes()), SigningKey::from_bytes(&self.dice.bytes()));
        let person: PersonId = AuthorId::of(&outsider).person();
        let time = Hlc { wall: Timestamp::from_millis(EPOCH + self.now), counter: 0 };
        let body = Body::admission(&secret, &self.clan, &person, "outsider".parse().expect("a name"));
        let Ok(admission) = Entry::sign(&outsider, Some(&self.clan), 0, None, time, body) else { return };
        let countersign = self.next(home, machine, Body::Countersign { admission: admission.id() }, 0);
        self.tell_all(home, &[&Some(admission), &countersign]);
    }

    /// Entries of nobody: some count as an outsider's, some wait for predecessors that do not exist.
    fn flood(&mut self, home: usize) {
        let mut entries = Vec::new();
        for number in 0..FLOOD {
            let nobody = SigningKey::from_bytes(&self.dice.bytes());
            let (seq, prev) =
                if number % 2 == 0 { (0, None) } else { (3 + number, Some(EntryId::from_bytes(self.dice.bytes()))) };
            let time = Hlc { wall: Timestamp::from_millis(EPOCH + self.now), counter: 0 };
            entries
                .extend(Entry::sign(&nobody, Some(&self.clan), seq, prev, time, Body::Leave).ok().map(|e| e.encode()));
        }
        self.broadcast(home, &PeerMessage::Entries(entries));
    }

    fn tell_all(&mut self, home: usize, entries: &[&Option<Entry>]) {
        let entries: Vec<_> = entries.iter().filter_map(|entry| entry.as_ref().map(Entry::encode)).collect();
        self.broadcast(home, &PeerMessage::Entries(entries));
    }

    fn broadcast(&mut self, home: usize, message: &PeerMessage) {
        for link in self.links_of(home) {
            self.send(link, message.clone());
        }
    }

    fn links_of(&self, home: usize) -> Vec<clan_replica::LinkId> {
        self.nodes[home].running.iter().flat_map(|running| running.replica.links().values().copied()).collect()
    }
}
