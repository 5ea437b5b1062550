//! Who may reach what on this machine, decided where packets come out of the tunnel.
//!
//! A packet passes if its sender may reach the port that it goes to, or if it belongs to a conversation that this machine
//! began. The sender is known: WireGuard has authenticated the peer, and the caller has checked that the source address
//! is the peer's own.
//!
//! Time is a [`Duration`] since any fixed moment, and must not run backwards.

mod flow;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
    time::Duration,
};

use self::flow::{Flow, ICMP_V4, ICMP_V6, Kind, TCP, UDP};

/// INVARIANT: no more conversations, and no more packets in pieces, are remembered than this.
pub const MAX_FLOWS: usize = 32_768;
const MAX_FRAGMENTS: usize = 1024;
/// How long a conversation is remembered after its last packet: an idle TCP connection survives two hours (RFC 5382
/// asks for that), a UDP one what RFC 4787 recommends.
const TCP_IDLE: Duration = Duration::from_secs(2 * 3600 + 240);
const UDP_IDLE: Duration = Duration::from_secs(300);
const OTHER_IDLE: Duration = Duration::from_secs(60);
/// How long after the first packet, either way, a TCP connection counts as begun here whose beginning was not seen: it is older than
/// this memory, as after a restart.
const PICK_UP: Duration = Duration::from_secs(120);
/// The first of the ports that the system gives to whoever asks for none: the own end of what was begun here.
const FIRST_EPHEMERAL: u16 = 32_768;
/// How long the pieces of a packet may take.
const FRAGMENT_LIFETIME: Duration = Duration::from_secs(30);

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What a sender may reach here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    Everything,
    /// Some of it.
    Ports {
        /// These ports.
        ports: Vec<(Transport, RangeInclusive<u16>)>,
        /// Whether it may ask if this machine is there.
        ping: bool,
    },
}

/// Who may reach what. Whoever is not in it may reach nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    by_source: BTreeMap<IpAddr, Access>,
}

impl Policy {
    /// A sender and what it may reach; the last word on a sender counts.
    pub fn allow(&mut self, source: IpAddr, access: Access) {
        self.by_source.insert(source, access);
    }

    /// What a sender may reach.
    pub fn access(&self, source: IpAddr) -> Option<&Access> {
        self.by_source.get(&source)
    }

    fn allows(&self, flow: &Flow) -> bool {
        let transport = match flow.protocol {
            TCP => Some(Transport::Tcp),
            UDP => Some(Transport::Udp),
            _ => None,
        };
        match self.by_source.get(&flow.source) {
            None => false,
            Some(Access::Everything) => true,
            Some(Access::Ports { ports, ping }) => {
                (*ping && flow.kind == Kind::EchoRequest)
                    || ports
                        .iter()
                        .any(|(open, range)| Some(*open) == transport && range.contains(&flow.destination_port))
            }
        }
    }
}

/// A conversation, seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Conversation {
    remote: IpAddr,
    local: IpAddr,
    protocol: u8,
    local_port: u16,
    remote_port: u16,
}

impl Conversation {
    /// Of a packet that goes out.
    fn of(flow: &Flow) -> Self {
        Self {
            remote: flow.destination,
            local: flow.source,
            protocol: flow.protocol,
            local_port: flow.source_port,
            remote_port: flow.destination_port,
        }
    }

    /// Of a packet that comes in.
    fn answered_by(flow: &Flow) -> Self {
        Self {
            remote: flow.source,
            local: flow.destination,
            protocol: flow.protocol,
            local_port: flow.destination_port,
            remote_port: flow.source_port,
        }
    }
}

/// Decides about packets one by one.
#[derive(Debug, Default)]
pub struct Filter {
    policy: Policy,
    /// Conversations begun here, and when they are forgotten.
    own: BTreeMap<Conversation, Duration>,
    /// Conversations without connections that others began with permission, and when they are forgotten.
    theirs: BTreeMap<Conversation, Duration>,
    /// When the first packet was seen.
    started: Option<Duration>,
    /// Pieces of packets whose first piece passed.
    fragments: BTreeMap<(IpAddr, IpAddr, u8, u32), Duration>,
}

impl Filter {
    /// From now on this counts. Conversations that this machine began go on; others end with their permission.
    pub fn set_policy(&mut self, policy: Policy) {
        let gone: BTreeSet<IpAddr> =
            self.own.keys().map(|own| own.remote).filter(|remote| !policy.by_source.contains_key(remote)).collect();
        // INVARIANT: a machine that was put out gets nothing through, not even an answer.
        self.own.retain(|own, _| !gone.contains(&own.remote));
        self.fragments.clear();
        self.policy = policy;
    }

    /// Notes a packet that this machine sends into the tunnel: what answers it may come in.
    pub fn outbound(&mut self, packet: &[u8], now: Duration) {
        let started = *self.started.get_or_insert(now);
        let Some(flow) = flow::read(packet) else { return };
        // INVARIANT: whoever may reach nothing is not answered either.
        if !self.policy.by_source.contains_key(&flow.destination) {
            return;
        }
        if matches!(flow.kind, Kind::Error(_) | Kind::EchoReply | Kind::LaterFragment(_)) {
            return;
        }
        let own = Conversation::of(&flow);
        let until = now + idle(flow.protocol);
        if let Some(known) = self.own.get_mut(&own) {
            *known = until;
            return;
        }
        // INVARIANT: an answer of a service here begins nothing, so that it ends when its permission does. TCP says which
        // packet opens a connection, and an echo who asks; of other conversations it is remembered that the other side began
        // them. Both sides may ask with the same identifier, as machines do that began as copies of one.
        let older = now < started + PICK_UP && flow.source_port >= FIRST_EPHEMERAL;
        let begins = flow.begins || older;
        let asks = flow.kind == Kind::EchoRequest;
        if !begins || (!asks && self.theirs.get(&own).is_some_and(|until| now < *until)) {
            return;
        }
        if self.own.len() >= MAX_FLOWS {
            make_room(&mut self.own, MAX_FLOWS, now);
        }
        self.own.insert(own, until);
    }

    /// Whether a packet that came out of the tunnel may be given to applications.
    pub fn inbound(&mut self, packet: &[u8], now: Duration) -> bool {
        let started = *self.started.get_or_insert(now);
        let Some(flow) = flow::read(packet) else { return false };
        let passes = match flow.kind {
            Kind::LaterFragment(identification) => {
                let piece = (flow.source, flow.destination, flow.protocol, identification);
                self.fragments.get(&piece).is_some_and(|until| now < *until)
            }
            Kind::Error(quoted) => self.is_about_own(&flow, packet.get(quoted..).unwrap_or_default(), now),
            Kind::Plain | Kind::EchoRequest | Kind::EchoReply | Kind::FirstFragment(_) => {
                self.is_answer(&flow, now)
                    || self.is_allowed(&flow, now)
                    || (now < started + PICK_UP && self.may_be_older(&flow))
            }
        };
        if let (true, Kind::FirstFragment(identification)) = (passes, flow.kind) {
            if self.fragments.len() >= MAX_FRAGMENTS {
                make_room(&mut self.fragments, MAX_FRAGMENTS, now);
            }
            let piece = (flow.source, flow.destination, flow.protocol, identification);
            self.fragments.insert(piece, now + FRAGMENT_LIFETIME);
        }
        passes
    }

    /// How many conversations are remembered.
    pub fn remembered(&self) -> usize {
        self.own.len()
    }

    fn is_allowed(&mut self, flow: &Flow, now: Duration) -> bool {
        if !self.policy.allows(flow) {
            return false;
        }
        if flow.protocol != TCP {
            if self.theirs.len() >= MAX_FLOWS {
                make_room(&mut self.theirs, MAX_FLOWS, now);
            }
            self.theirs.insert(Conversation::answered_by(flow), now + idle(flow.protocol));
        }
        true
    }

    fn is_answer(&mut self, flow: &Flow, now: Duration) -> bool {
        if flow.kind == Kind::EchoRequest {
            return false;
        }
        match self.own.get_mut(&Conversation::answered_by(flow)) {
            Some(until) if now < *until => {
                *until = now + idle(flow.protocol);
                true
            }
            _ => false,
        }
    }

    /// Whether it may belong to a connection that was begun here before this memory began. Where only the other side has
    /// something to say, nothing goes out that would tell; the system knows its connections, and refuses what is none.
    fn may_be_older(&self, flow: &Flow) -> bool {
        flow.established
            && flow.kind == Kind::Plain
            && flow.destination_port >= FIRST_EPHEMERAL
            && self.policy.by_source.contains_key(&flow.source)
    }

    /// An error passes if it quotes a packet that went from here to somebody, in a conversation that is known.
    fn is_about_own(&self, error: &Flow, quoted: &[u8], now: Duration) -> bool {
        if !self.policy.by_source.contains_key(&error.source) {
            return false;
        }
        // The quotation may be cut off behind its first bytes, but not so early that the ports are missing.
        let Some(about) = flow::read(quoted) else { return false };
        about.source == error.destination && self.own.get(&Conversation::of(&about)).is_some_and(|until| now < *until)
    }
}

fn idle(protocol: u8) -> Duration {
    match protocol {
        TCP => TCP_IDLE,
        UDP => UDP_IDLE,
        ICMP_V4 | ICMP_V6 => OTHER_IDLE,
        _ => OTHER_IDLE,
    }
}

/// Forgets what has expired, and if that is not an eighth of all, what would expire next.
fn make_room<K: Ord>(entries: &mut BTreeMap<K, Duration>, most: usize, now: Duration) {
    entries.retain(|_, until| now < *until);
    let keep = most - most / 8;
    if entries.len() > keep {
        let mut ends: Vec<Duration> = entries.values().copied().collect();
        ends.sort_unstable();
        let mut surplus = entries.len() - keep;
        let last = ends[surplus - 1];
        entries.retain(|_, until| {
            let goes = surplus > 0 && *until <= last;
            surplus -= usize::from(goes);
            !goes
        });
    }
}

#[cfg(test)]
mod tests;
