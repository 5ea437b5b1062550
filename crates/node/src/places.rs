//! How many connections there may be at once, of whom: strangers do not take the places of the clan's machines.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

use clan_types::MachineId;
use iroh::endpoint::IncomingAddr;

/// Whoever has not proved yet which key is theirs, in all and from one address. That takes seconds at most.
const UNPROVED: Limits = Limits { all: 512, each: 32 };
/// From here on an address has to show first that it receives what is sent to it: whoever makes addresses up has one.
const BUSY: usize = UNPROVED.all / 4;
/// Whoever has, and is no machine of the clan in good standing.
const STRANGERS: Limits = Limits { all: 256, each: 64 };
/// A machine's connections: the one to it, one that takes its place, those on which it fetches an image.
const OF_ONE_MACHINE: Limits = Limits { all: usize::MAX, each: 8 };

#[derive(Clone, Copy)]
struct Limits {
    all: usize,
    each: usize,
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// A computer, or a network of them that share an address.
    Address(IpAddr),
    /// An endpoint that a relay has let in.
    Relayed([u8; 32]),
    /// Nothing that tells one from another.
    Other,
}

impl Origin {
    pub(crate) fn of(addr: &IncomingAddr) -> Self {
        match addr {
            IncomingAddr::Ip(addr) => Self::of_ip(addr.ip()),
            IncomingAddr::Relay { endpoint_id, .. } => Self::Relayed(*endpoint_id.as_bytes()),
            _ => Self::Other,
        }
    }

    /// Of IPv6 the half that a network has: the rest is for whoever sits in it to choose.
    fn of_ip(ip: IpAddr) -> Self {
        Self::Address(match ip.to_canonical() {
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)),
            ip => ip,
        })
    }
}

/// The places of an endpoint.
#[derive(Clone, Default)]
pub(crate) struct Places {
    unproved: Counter<Origin>,
    strangers: Counter<Origin>,
    machines: Counter<MachineId>,
}

impl Places {
    /// For whoever connects, until they have proved their key. `None`: there is none.
    pub(crate) fn unproved(&self, origin: Origin) -> Option<Place<Origin>> {
        self.unproved.take(origin, UNPROVED)
    }

    /// Whether whoever connects is to show that their address is theirs.
    pub(crate) fn is_busy(&self) -> bool {
        self.unproved.lock().all >= BUSY
    }

    pub(crate) fn stranger(&self, origin: Origin) -> Option<Place<Origin>> {
        self.strangers.take(origin, STRANGERS)
    }

    /// For a machine of the clan in good standing: nobody else can take these.
    pub(crate) fn machine(&self, machine: MachineId) -> Option<Place<MachineId>> {
        self.machines.take(machine, OF_ONE_MACHINE)
    }
}

struct Counter<K>(Arc<Mutex<Taken<K>>>);

struct Taken<K> {
    all: usize,
    each: HashMap<K, usize>,
}

impl<K> Clone for Counter<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Default for Counter<K> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Taken { all: 0, each: HashMap::new() })))
    }
}

impl<K: Copy + Eq + Hash> Counter<K> {
    fn take(&self, who: K, limits: Limits) -> Option<Place<K>> {
        let mut taken = self.lock();
        let theirs = taken.each.get(&who).copied().unwrap_or(0);
        if taken.all >= limits.all || theirs >= limits.each {
            return None;
        }
        taken.all += 1;
        taken.each.insert(who, theirs + 1);
        Some(Place { who, counter: self.clone() })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Taken<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place, until it is dropped.
pub(crate) struct Place<K: Copy + Eq + Hash> {
    who: K,
    counter: Counter<K>,
}

impl<K: Copy + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.counter.lock();
        taken.all -= 1;
        // INVARIANT: as many are remembered as there are places taken.
        if let Some(theirs) = taken.each.get_mut(&self.who) {
            *theirs -= 1;
            if *theirs == 0 {
                taken.each.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u32) -> Origin {
        Origin::of_ip(IpAddr::V4((0x0a00_0000 + n).into()))
    }

    #[test]
    fn strangers_take_no_place_of_a_machine_and_one_address_not_all_of_theirs() {
        let places = Places::default();
        let flood: Vec<_> = (0..10_000).filter_map(|_| places.stranger(address(1))).collect();
        assert_eq!(flood.len(), STRANGERS.each);
        let more: Vec<_> = (0..10_000).filter_map(|n| places.stranger(address(n))).collect();
        assert_eq!(flood.len() + more.len(), STRANGERS.all);
        let machine = MachineId::from_bytes([1; 32]);
        let own: Vec<_> = (0..100).filter_map(|_| places.machine(machine)).collect();
        assert_eq!(own.len(), OF_ONE_MACHINE.each);
        assert!(places.machine(MachineId::from_bytes([2; 32])).is_some());
        drop((flood, more));
        assert!(places.stranger(address(1)).is_some(), "they are free again");
        assert!(places.strangers.lock().each.is_empty());
    }

    #[test]
    fn who_knocks_in_masses_has_to_show_an_address() {
        let places = Places::default();
        let mut knocks: Vec<_> = (0..100).filter_map(|_| places.unproved(address(1))).collect();
        assert_eq!((knocks.len(), places.is_busy()), (UNPROVED.each, false));
        knocks.extend((2..200).filter_map(|n| places.unproved(address(n))));
        assert!(places.is_busy());
        knocks.clear();
        assert!(!places.is_busy());
    }

    #[test]
    fn a_network_is_one_origin() {
        let of = |text: &str| Origin::of_ip(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3::4"), of("2001:db8:1:2:ffff::1"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
