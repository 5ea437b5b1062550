//! A clan to play through: fixed keys, a clock that only goes forward.
#![allow(dead_code, unreachable_pub)]

use clan_ledger::{AuthorId, Body, DeviceKind, Entry, Ledger, VoidReason};
use clan_types::{
    ClanId, DeviceId, InviteId, MachineId, MachineName, PersonId, PersonName, Role, Timestamp, WgPublicKey,
};
use ed25519_dalek::SigningKey;

pub fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

pub fn person(key: &SigningKey) -> PersonId {
    AuthorId::of(key).person()
}

pub fn device(key: &SigningKey) -> DeviceId {
    AuthorId::of(key).device()
}

pub fn machine(key: &SigningKey) -> MachineId {
    AuthorId::of(key).machine()
}

pub fn invite(key: &SigningKey) -> InviteId {
    InviteId::from_bytes(key.verifying_key().to_bytes())
}

pub fn name(text: &str) -> PersonName {
    text.parse().unwrap()
}

pub fn machine_name(text: &str) -> MachineName {
    text.parse().unwrap()
}

pub fn at(seconds: u64) -> Timestamp {
    Timestamp::from_millis(1_800_000_000_000 + seconds * 1000)
}

/// The founder is key 1, with machine key 101.
#[derive(Clone)]
pub struct Clan {
    pub ledger: Ledger,
    pub now: u64,
}

impl Clan {
    pub fn new() -> Self {
        let (ledger, _) = Ledger::found(&key(1), "family".parse().unwrap(), name("p1"), [7; 32], at(0)).unwrap();
        let mut clan = Self { ledger, now: 1 };
        clan.enrol(1);
        clan
    }

    pub fn say(&mut self, author: &SigningKey, body: Body) -> Entry {
        self.now += 1;
        let entry = self.ledger.author(author, body, at(self.now)).unwrap();
        self.ledger.insert(entry.clone()).unwrap();
        entry
    }

    /// Person `n` enrols machine `100 + n`.
    pub fn enrol(&mut self, n: u8) -> Entry {
        self.say(&key(n), enrolment(&self.ledger.clan(), &key(n), n))
    }

    pub fn invite(&mut self, by: u8, secret: u8, role: Role, uses: u32) -> Entry {
        let expires = at(self.now + 1000);
        self.say(&key(by), Body::Invite { invite: invite(&key(secret)), role, uses, expires, approval: false })
    }

    pub fn ask(&mut self, n: u8, secret: u8) -> Entry {
        let body = Body::admission(&key(secret), &self.ledger.clan(), &person(&key(n)), name(&format!("p{n}")));
        self.say(&key(n), body)
    }

    pub fn countersign(&mut self, witness: u8, admission: &Entry) -> Entry {
        self.say(&key(100 + witness), Body::Countersign { admission: admission.id() })
    }

    /// Invites, admits and enrols person `n`.
    pub fn join(&mut self, n: u8, by: u8, role: Role) {
        let secret = 200 + n;
        self.invite(by, secret, role, 1);
        let admission = self.ask(n, secret);
        if role >= Role::Member {
            self.enrol(n);
        }
        self.countersign(1, &admission);
        assert_eq!(self.ledger.state().role_of(&person(&key(n))), Some(role));
    }

    /// Person `n` asks to come in with this secret, and the founder's machine countersigns.
    pub fn redeem(&mut self, n: u8, secret: u8) -> Entry {
        let admission = self.ask(n, secret);
        self.countersign(1, &admission);
        admission
    }

    pub fn set_role(&mut self, by: &SigningKey, n: u8, role: Role) -> Entry {
        let body = self.ledger.role_change(&person(&key(n)), role);
        self.say(by, body)
    }

    /// The device `by` adds the device with key `device`.
    pub fn add_device(&mut self, by: &SigningKey, device: u8, kind: DeviceKind) -> Entry {
        let name = format!("d{device}").parse().unwrap();
        let body = Body::add_device(&key(device), &self.ledger.clan(), &AuthorId::of(by), name, kind);
        self.say(by, body)
    }

    pub fn reason(&self, entry: &Entry) -> Option<VoidReason> {
        self.ledger.state().void.iter().find(|void| void.entry == entry.id()).map(|void| void.reason)
    }

    pub fn role(&self, n: u8) -> Option<Role> {
        self.ledger.state().role_of(&person(&key(n)))
    }

    pub fn has_machine(&self, n: u8) -> bool {
        self.ledger.state().machine_in_good_standing(&machine(&key(100 + n))).is_some()
    }

    /// Takes over what another copy of the clan has.
    pub fn merge(&mut self, other: &Self) {
        let entries: Vec<_> = other.ledger.entries().cloned().collect();
        self.ledger.insert_all(entries);
        self.now = self.now.max(other.now);
    }
}

/// Machine `100 + n`, added by somebody.
pub fn enrolment(clan: &ClanId, by: &SigningKey, n: u8) -> Body {
    enrol(clan, by, 100 + n, &format!("m{n}"), n)
}

/// The machine with key `n`, added by somebody.
pub fn enrol(clan: &ClanId, by: &SigningKey, n: u8, name: &str, wg: u8) -> Body {
    Body::enrol(&key(n), clan, &AuthorId::of(by), machine_name(name), WgPublicKey::from_bytes([wg; 32]))
}
