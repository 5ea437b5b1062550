//! Multicast DNS (RFC 6762) among the machines of a clan: what a program says to the group on one machine's device is copied to
//! the machines that it has a session with, and said to the group on theirs.
//!
//! [`Multicast`] is a pure state machine for one machine. It judges each message on both sides: where it is sent, so that nothing
//! leaves that would be refused, and where it arrives, as if the sender were a liar. It is found by it who offers what; what
//! may be reached is for [`crate::filter`] to say, as ever.
//!
//! # Bounds
//!
//! | | at once | from then on |
//! |---|---|---|
//! | messages that a machine says | 32 | 8 per second |
//! | copies of them that it sends to all others together | 512 | 256 per second |
//! | messages that are taken from one machine | 40 | 8 per second |
//! | messages from all machines together that are handed to programs | 512 | 128 per second |
//!
//! No packet is longer than the device's 1280 bytes. A message that goes to many is copied bit by bit, within eight seconds for a
//! thousand; while more than four seconds' worth of copies wait, the machine says nothing further. When machines together say too
//! much, what there is goes to those who say little: the lower half of the last row is for machines that have used less
//! than half of their own.
//!
//! Time is a [`Duration`] since any fixed moment, and must not run backwards.

mod budget;
mod datagram;
mod judge;
mod message;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use clan_types::MachineId;

use self::{
    budget::{Bucket, Rate},
    datagram::Datagram,
    judge::{Clan, address, judge},
    message::{A, AAAA, Message},
};
pub use self::{
    datagram::{GROUP_V4, GROUP_V6, PORT, is_group},
    judge::Refusal,
};

/// The longest packet that is carried: what every device of the clan takes.
pub const MAX_PACKET: usize = 1280;
/// Messages that a machine says.
const SAID: Rate = Rate::per_second(8, 32);
/// Copies of them.
const COPIED: Rate = Rate::per_second(256, 512);
/// INVARIANT: nothing more is said while this many copies wait.
const MAX_WAITING: usize = 1024;
/// Messages from one machine: somewhat more at once than it says, as they may catch up with each other on the way.
const HEARD: Rate = Rate::per_second(8, 40);
/// Messages from all.
const HEARD_FROM_ALL: Rate = Rate::per_second(128, 512);
/// INVARIANT: of no more machines it is remembered how much they said. Who says nothing takes no room.
const MAX_SENDERS: usize = 4096;
/// How long the same message is not said again: less than the 250 ms between the probes of section 8.1.
const SAME_AGAIN: Duration = Duration::from_millis(200);
/// How long a message that was heard is not said in turn: a program may repeat what it hears from one network to the next.
const ECHO: Duration = Duration::from_secs(1);
/// INVARIANT: no more messages are remembered than this, nor ports that asked.
const MAX_RECENT: usize = 256;
const MAX_ASKED: usize = 64;
/// How long somebody who asked to be answered alone is answered.
const ANSWERED: Duration = Duration::from_secs(10);

/// A message that waits to be copied.
struct Waiting {
    packet: Bytes,
    /// Who has not got it yet.
    to: Vec<MachineId>,
}

/// A message that may be said.
#[must_use = "say to whom"]
pub struct Admitted(Bytes);

/// What is multicast DNS in a machine's tunnel, both ways.
pub struct Multicast {
    local: MachineId,
    own: (Ipv6Addr, Option<Ipv4Addr>),
    /// Nothing is carried before it is known who has which name.
    on: bool,
    clan: Clan,
    said: Bucket,
    copied: Bucket,
    waiting: VecDeque<Waiting>,
    waiting_copies: usize,
    /// Who comes first, next time.
    turn: usize,
    heard: BTreeMap<MachineId, Bucket>,
    heard_from_all: Bucket,
    /// What was said or heard lately, and how long that matters.
    recent: VecDeque<([u8; 16], Duration)>,
    /// Local ports that asked to be answered alone, and until when they are.
    asked: BTreeMap<u16, Duration>,
}

impl Multicast {
    /// Of the machine `local` with this address; nothing is carried yet.
    pub fn new(local: MachineId, address: Ipv6Addr) -> Self {
        let turn =
            local.as_bytes().iter().fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte)));
        Self {
            local,
            own: (address, None),
            on: false,
            clan: Clan { names: BTreeMap::new(), addresses: [(address.into(), local)].into() },
            said: Bucket::default(),
            copied: Bucket::default(),
            waiting: VecDeque::new(),
            waiting_copies: 0,
            turn,
            heard: BTreeMap::new(),
            heard_from_all: Bucket::default(),
            recent: VecDeque::new(),
            asked: BTreeMap::new(),
        }
    }

    /// From now on these are the names of the clan's machines, lower case, this one's among them; `None`: nothing is carried.
    pub fn set_names(&mut self, names: Option<BTreeMap<String, MachineId>>) {
        self.on = names.is_some();
        self.clan.names = names.unwrap_or_default();
        if !self.on {
            self.waiting.clear();
            self.waiting_copies = 0;
            self.asked.clear();
        }
    }

    /// From now on these are the other machines' addresses.
    pub fn set_others(&mut self, addresses: HashMap<IpAddr, MachineId>) {
        self.clan.addresses = addresses;
        self.note_own();
        // INVARIANT: whoever is put out gets nothing more, not even what waits already.
        let known: BTreeSet<&MachineId> = self.clan.addresses.values().collect();
        for waiting in &mut self.waiting {
            let before = waiting.to.len();
            waiting.to.retain(|peer| known.contains(peer));
            self.waiting_copies -= before - waiting.to.len();
        }
    }

    /// From now on this is the machine's second address.
    pub fn set_ipv4(&mut self, ipv4: Option<Ipv4Addr>) {
        if let Some(had) = self.own.1 {
            self.clan.addresses.remove(&had.into());
        }
        self.own.1 = ipv4;
        self.note_own();
    }

    fn note_own(&mut self) {
        self.clan.addresses.insert(self.own.0.into(), self.local);
        self.clan.addresses.extend(self.own.1.map(|own| (own.into(), self.local)));
    }

    /// Whether anything is carried.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Judges a packet that a program here sends to the group. Whatever is admitted is to be handed to [`Multicast::say`].
    pub fn outbound(&mut self, packet: &[u8], now: Duration) -> Option<Admitted> {
        if !self.on || self.waiting_copies >= MAX_WAITING || !self.said.has(SAID, 1, now) {
            return None;
        }
        let datagram = datagram::read(packet).filter(|d| d.destination_port == PORT && is_group(d.destination))?;
        let source = self.own_beside(datagram.destination)?;
        let link_local = matches!(datagram.source, IpAddr::V6(source) if source.is_unicast_link_local());
        if datagram.source != source && !link_local {
            return None;
        }
        let mut payload = BytesMut::from(datagram.payload);
        self.tidy(&mut payload);
        let message = judge(&payload, &self.local, &self.clan).ok()?;
        // Section 6: an answer that comes from another port is to be ignored.
        if message.response && datagram.source_port != PORT {
            return None;
        }
        let alone = wants_alone(&message, datagram.source_port);
        // Whoever asks from a port of its own is not served by what others asked.
        if datagram.source_port == PORT && self.is_recent(&payload, datagram.destination, now) {
            return None;
        }
        let packet = datagram::write(&Datagram { source, payload: &payload, ..datagram })?;
        if packet.len() > MAX_PACKET || !self.said.take(SAID, now) {
            return None;
        }
        self.note_recent(&payload, datagram.destination, now + SAME_AGAIN, now);
        if alone {
            self.note_asked(datagram.source_port, now);
        }
        Some(Admitted(packet.freeze()))
    }

    /// Notes a packet that a program sends from port 5353 to one machine alone: if it asks, it may be answered.
    pub fn outbound_alone(&mut self, packet: &[u8], now: Duration) {
        let Some(datagram) = datagram::read(packet).filter(|_| self.on) else { return };
        if message::read(datagram.payload).is_some_and(|message| !message.response) {
            self.note_asked(datagram.source_port, now);
        }
    }

    /// Whom an admitted message goes to. It is not their order that counts.
    pub fn say(&mut self, Admitted(packet): Admitted, mut to: Vec<MachineId>) {
        if to.is_empty() {
            return;
        }
        // Everybody comes first now and then, and not the same machine to all.
        let first = self.turn % to.len();
        to.rotate_left(first);
        self.turn = self.turn.wrapping_add(997);
        self.waiting_copies += to.len();
        self.waiting.push_back(Waiting { packet, to });
    }

    /// The next copy that may be sent now.
    pub fn poll(&mut self, now: Duration) -> Option<(MachineId, Bytes)> {
        loop {
            let waiting = self.waiting.front_mut()?;
            if waiting.to.is_empty() {
                self.waiting.pop_front();
                continue;
            }
            if !self.copied.take(COPIED, now) {
                return None;
            }
            self.waiting_copies -= 1;
            return waiting.to.pop().map(|to| (to, waiting.packet.clone()));
        }
    }

    /// When [`Multicast::poll`] has something again; `None`: not before something is said.
    pub fn poll_timeout(&self) -> Option<Duration> {
        (self.waiting_copies > 0).then(|| self.copied.next(COPIED))
    }

    /// Judges a packet for the group that came out of the tunnel, from `sender`, whose address its source is. What comes
    /// back is to be handed to programs.
    pub fn inbound(&mut self, sender: &MachineId, packet: &[u8], now: Duration) -> Option<BytesMut> {
        if !self.on || packet.len() > MAX_PACKET || !self.hear(sender, now) {
            return None;
        }
        let datagram = datagram::read(packet).filter(|d| d.destination_port == PORT && is_group(d.destination))?;
        let message = judge(datagram.payload, sender, &self.clan).ok()?;
        if message.response && datagram.source_port != PORT {
            return None;
        }
        self.pass(sender, &datagram, now)
    }

    /// Judges a packet for this machine alone: it passes if it answers what a program asked from the port that it goes to.
    pub fn inbound_alone(&mut self, packet: &[u8], now: Duration) -> Option<BytesMut> {
        let datagram =
            datagram::read(packet).filter(|d| self.on && d.source_port == PORT && packet.len() <= MAX_PACKET)?;
        if self.asked.get(&datagram.destination_port).is_none_or(|until| *until <= now) {
            return None;
        }
        let sender = *self.clan.addresses.get(&datagram.source)?;
        if !self.hear(&sender, now) {
            return None;
        }
        let message = judge(datagram.payload, &sender, &self.clan).ok()?;
        if message.response { self.pass(&sender, &datagram, now) } else { None }
    }

    /// Counts a message against its sender, however it is judged.
    fn hear(&mut self, sender: &MachineId, now: Duration) -> bool {
        if self.heard.len() >= MAX_SENDERS {
            self.heard.retain(|_, bucket| !bucket.is_full(now));
            if self.heard.len() >= MAX_SENDERS && !self.heard.contains_key(sender) {
                return false;
            }
        }
        self.heard.entry(*sender).or_default().take(HEARD, now)
    }

    /// INVARIANT: machines that say much leave room for those that say little.
    fn pass(&mut self, sender: &MachineId, datagram: &Datagram<'_>, now: Duration) -> Option<BytesMut> {
        let modest = self.heard.get(sender).is_none_or(|bucket| bucket.has(HEARD, HEARD.burst / 2, now));
        let room = if modest { 1 } else { 1 + HEARD_FROM_ALL.burst / 2 };
        if !self.heard_from_all.has(HEARD_FROM_ALL, room, now) {
            return None;
        }
        let packet = datagram::write(datagram)?;
        self.heard_from_all.take(HEARD_FROM_ALL, now);
        self.note_recent(datagram.payload, datagram.destination, now + ECHO, now);
        Some(packet)
    }

    /// The machine's address of the same version of IP.
    fn own_beside(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V6(_) => Some(self.own.0.into()),
            IpAddr::V4(_) => self.own.1.map(IpAddr::V4),
        }
    }

    /// Many programs tell all addresses of their host to every network. Those that the clan has no use for become the ones that it
    /// has, where a message names both for the same host; where not, they may be another host's.
    fn tidy(&self, payload: &mut [u8]) {
        let Some(message) = message::read(payload) else { return };
        let is_own = |payload: &[u8], record: &message::Record| {
            address(payload, record).is_some_and(|address| self.clan.addresses.get(&address) == Some(&self.local))
        };
        let hosts = message.records.iter().filter(|record| matches!(record.kind, A | AAAA));
        let (own, foreign): (Vec<_>, Vec<_>) = hosts.partition(|record| is_own(payload, record));
        for record in foreign {
            if own.iter().all(|known| known.name != record.name) {
                continue;
            }
            match (payload.get_mut(record.data.clone()), self.own) {
                (Some(data), (_, Some(own))) if data.len() == 4 => data.copy_from_slice(&own.octets()),
                (Some(data), (own, _)) if data.len() == 16 => data.copy_from_slice(&own.octets()),
                _ => {}
            }
        }
    }

    fn note_asked(&mut self, port: u16, now: Duration) {
        if self.asked.len() >= MAX_ASKED {
            self.asked.retain(|_, until| *until > now);
        }
        if self.asked.len() < MAX_ASKED || self.asked.contains_key(&port) {
            self.asked.insert(port, now + ANSWERED);
        }
    }

    fn is_recent(&self, payload: &[u8], destination: IpAddr, now: Duration) -> bool {
        let hash = hash(payload, destination);
        self.recent.iter().any(|(known, until)| *known == hash && *until > now)
    }

    fn note_recent(&mut self, payload: &[u8], destination: IpAddr, until: Duration, now: Duration) {
        self.recent.retain(|(_, until)| *until > now);
        if self.recent.len() >= MAX_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((hash(payload, destination), until));
    }
}

/// Whether it wants an answer for itself (sections 5.4 and 6.7).
fn wants_alone(message: &Message, source_port: u16) -> bool {
    !message.response && (source_port != PORT || message.questions.iter().any(|question| question.alone))
}

/// What tells messages apart.
fn hash(payload: &[u8], destination: IpAddr) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[u8::from(destination.is_ipv4())]).update(payload);
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hash
}

#[cfg(test)]
mod tests;
