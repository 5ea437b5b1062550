//! Two and more machines on a simulated network, in virtual time.

#![allow(clippy::unwrap_used)] // Helpers of tests.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use clan_tunnel::{LOST_AFTER, PROBE_LEN, PathChange, PathChoice, Paths, ProbeKey, is_probe};
use clan_types::MachineId;
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);
const S: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq)]
enum Nat {
    None,
    /// One outside port for all destinations; lets in only whom we sent to.
    Restricted,
    /// Another outside port for each destination; lets in only whom we sent to.
    Symmetric,
}

struct Node {
    id: MachineId,
    paths: Paths,
    addrs: Vec<SocketAddr>,
    nat: Nat,
    outside: Ipv4Addr,
    mappings: BTreeMap<Option<SocketAddr>, u16>,
    opened: BTreeSet<(SocketAddr, SocketAddr)>,
    changes: Vec<PathChange>,
}

impl Node {
    fn new(n: u8, nat: Nat, addrs: &[&str]) -> Self {
        let id = MachineId::from_bytes([n; 32]);
        Self {
            id,
            paths: Paths::new(id, [n + 100; 32]),
            addrs: addrs.iter().map(|a| a.parse().unwrap()).collect(),
            nat,
            outside: Ipv4Addr::new(203, 0, 113, n),
            mappings: BTreeMap::new(),
            opened: BTreeSet::new(),
            changes: Vec::new(),
        }
    }

    /// The source address that the receiver at `dst` sees.
    fn source(&mut self, dst: SocketAddr) -> Option<SocketAddr> {
        let key = match self.nat {
            Nat::None => return self.addrs.iter().find(|a| network(**a) == network(dst)).copied(),
            Nat::Restricted => None,
            Nat::Symmetric => Some(dst),
        };
        let fresh = 40_000 + self.mappings.len() as u16;
        let public = SocketAddr::from((self.outside, *self.mappings.entry(key).or_insert(fresh)));
        self.opened.insert((public, dst));
        Some(public)
    }

    fn owns(&self, dst: SocketAddr, src: SocketAddr) -> bool {
        self.addrs.contains(&dst) && self.nat == Nat::None || self.opened.contains(&(dst, src))
    }
}

fn network(addr: SocketAddr) -> u8 {
    match addr.ip() {
        IpAddr::V4(ip) => ip.octets()[0],
        IpAddr::V6(_) => 6,
    }
}

/// A datagram on its way: arrival, a number that keeps the order total, source, destination, content.
type Flying = Reverse<(Duration, u64, SocketAddr, SocketAddr, Vec<u8>)>;

struct Net {
    now: Duration,
    nodes: Vec<Node>,
    flying: BinaryHeap<Flying>,
    sent: u64,
    /// Every n-th datagram is lost.
    lose_every: u64,
    /// Networks that carry nothing.
    cut: BTreeSet<u8>,
    /// Only datagrams from this machine are lost.
    mute: Option<usize>,
    latency: BTreeMap<u8, Duration>,
    busy: bool,
    recorded: Vec<Vec<u8>>,
}

impl Net {
    fn new(nodes: Vec<Node>) -> Self {
        Self {
            now: S,
            nodes,
            flying: BinaryHeap::new(),
            sent: 0,
            lose_every: u64::MAX,
            cut: BTreeSet::new(),
            mute: None,
            latency: BTreeMap::from([(203, 20 * MS), (198, 20 * MS), (10, MS / 2)]),
            busy: true,
            recorded: Vec::new(),
        }
    }

    fn pair(a: Node, b: Node, know: (bool, bool)) -> Self {
        let mut net = Self::new(vec![a, b]);
        let addrs: Vec<_> = net.nodes.iter().map(|n| n.addrs.clone()).collect();
        net.introduce(0, 1, if know.0 { &addrs[1] } else { &[] });
        net.introduce(1, 0, if know.1 { &addrs[0] } else { &[] });
        net
    }

    fn introduce(&mut self, at: usize, of: usize, candidates: &[SocketAddr]) {
        let (low, high) = (at.min(of) as u8, at.max(of) as u8);
        let (key, id, now) = (ProbeKey::derive(&[low * 16 + high; 32]), self.nodes[of].id, self.now);
        self.nodes[at].paths.add_peer(id, key, candidates, now);
    }

    fn send(&mut self, from: usize, to: SocketAddr, bytes: Vec<u8>) {
        assert!(is_probe(&bytes) && bytes.len() == PROBE_LEN);
        self.recorded.push(bytes.clone());
        self.sent += 1;
        let Some(src) = self.nodes[from].source(to) else { return };
        if self.sent.is_multiple_of(self.lose_every) || self.cut.contains(&network(to)) || self.mute == Some(from) {
            return;
        }
        let latency = self.latency.get(&network(to)).copied().unwrap_or(20 * MS);
        self.flying.push(Reverse((self.now + latency, self.sent, src, to, bytes)));
    }

    /// Runs until `until`, or until `done` says so; returns whether it did.
    fn run(&mut self, until: Duration, mut done: impl FnMut(&Self) -> bool) -> bool {
        loop {
            for i in 0..self.nodes.len() {
                let now = self.now;
                if self.busy {
                    let others: Vec<_> = self.nodes.iter().map(|n| n.id).collect();
                    for other in others {
                        self.nodes[i].paths.note_traffic(other, now);
                    }
                }
                self.nodes[i].paths.handle_timeout(now);
                while let Some(transmit) = self.nodes[i].paths.poll_transmit() {
                    self.send(i, transmit.to, transmit.bytes);
                }
                while let Some(change) = self.nodes[i].paths.poll_change() {
                    self.nodes[i].changes.push(change);
                }
                assert!(
                    self.nodes[i].paths.next_timeout().is_none_or(|at| at > now),
                    "a timeout that was handled is over"
                );
            }
            if done(self) {
                return true;
            }
            if self.now >= until {
                return false;
            }
            let timeout = self.nodes.iter().filter_map(|n| n.paths.next_timeout()).min();
            let arrival = self.flying.peek().map(|Reverse((at, ..))| *at);
            let tick = self.busy.then_some(self.now + 100 * MS);
            self.now = [timeout, arrival, tick, Some(until)].into_iter().flatten().min().unwrap();
            while self.flying.peek().is_some_and(|Reverse((at, ..))| *at <= self.now) {
                let Some(Reverse((_, _, src, dst, bytes))) = self.flying.pop() else { break };
                if let Some(to) = self.nodes.iter().position(|n| n.owns(dst, src)) {
                    self.deliver(to, src, &bytes);
                }
            }
        }
    }

    fn deliver(&mut self, to: usize, src: SocketAddr, bytes: &[u8]) {
        let now = self.now;
        if let Some(reply) = self.nodes[to].paths.handle_probe(src, bytes, now) {
            assert!(reply.bytes.len() <= bytes.len(), "no amplification");
            assert_eq!(reply.to, src);
            self.send(to, reply.to, reply.bytes);
        }
    }

    fn cut(&mut self, network_cut: u8) {
        self.cut.insert(network_cut);
        self.flying.retain(|Reverse((_, _, _, to, _))| network(*to) != network_cut);
    }

    fn path(&self, at: usize, to: usize) -> PathChoice {
        self.nodes[at].paths.path(self.nodes[to].id, self.now)
    }

    fn direct(&self, at: usize, to: usize) -> Option<SocketAddr> {
        match self.path(at, to) {
            PathChoice::Direct { addr, .. } => Some(addr),
            PathChoice::Carrier => None,
        }
    }

    fn both_direct(&self) -> bool {
        self.direct(0, 1).is_some() && self.direct(1, 0).is_some()
    }
}

fn public_pair() -> Net {
    Net::pair(
        Node::new(1, Nat::None, &["203.0.113.1:41641"]),
        Node::new(2, Nat::None, &["203.0.113.2:41641"]),
        (true, true),
    )
}

#[test]
fn a_path_that_works_both_ways_is_confirmed_within_two_round_trips() {
    let mut net = public_pair();
    assert_eq!(net.path(0, 1), PathChoice::Carrier, "nothing counts before it was probed");
    assert!(net.run(S + 80 * MS, Net::both_direct));
    let PathChoice::Direct { addr, rtt } = net.path(0, 1) else { unreachable!() };
    assert_eq!((addr, rtt), ("203.0.113.2:41641".parse().unwrap(), 40 * MS));
    assert_eq!(net.nodes[0].paths.peer_at("203.0.113.2:41641".parse().unwrap()), Some(net.nodes[1].id));
    assert_eq!(net.nodes[0].paths.observed(), ["203.0.113.1:41641".parse().unwrap()]);
}

#[test]
fn one_side_that_knows_the_other_is_enough() {
    for know in [(true, false), (false, true)] {
        let mut net =
            Net::pair(Node::new(1, Nat::None, &["203.0.113.1:1"]), Node::new(2, Nat::None, &["203.0.113.2:1"]), know);
        assert!(net.run(2 * S, Net::both_direct));
    }
}

#[test]
fn a_cut_is_noticed_within_three_seconds_and_a_healed_path_is_taken_again() {
    for after in [0, 130, 500, 999, 1040, 4321] {
        let mut net = public_pair();
        assert!(net.run(3 * S, Net::both_direct));
        net.run(net.now + after * MS, |_| false);
        net.cut(203);
        let cut = net.now;
        assert!(
            net.run(cut + LOST_AFTER, |n| n.direct(0, 1).is_none() && n.direct(1, 0).is_none()),
            "cut {after} ms later"
        );
        assert_eq!(net.nodes[0].changes.last().map(|c| c.path), Some(PathChoice::Carrier));
        net.run(net.now + 60 * S, |_| false);
        net.cut.clear();
        assert!(net.run(net.now + 6 * S, Net::both_direct), "healed");
        assert_eq!(net.nodes[0].changes.len(), 3);
    }
}

#[test]
fn an_idle_path_costs_little_and_its_loss_is_noticed_too() {
    let mut net = public_pair();
    net.busy = false;
    assert!(net.run(3 * S, Net::both_direct));
    let before = net.sent;
    net.run(net.now + 600 * S, |_| false);
    assert!(net.both_direct());
    assert!(net.sent - before < 600, "{} probes in ten minutes", net.sent - before);
    net.cut(203);
    assert!(net.run(net.now + 15 * S, |n| n.direct(0, 1).is_none() && n.direct(1, 0).is_none()));
}

#[test]
fn a_path_that_works_one_way_only_is_never_used() {
    let mut net = public_pair();
    net.mute = Some(1);
    assert!(!net.run(60 * S, |n| n.direct(0, 1).is_some() || n.direct(1, 0).is_some()));
    net.mute = None;
    assert!(net.run(net.now + 6 * S, Net::both_direct));
    net.mute = Some(1);
    assert!(net.run(net.now + LOST_AFTER + 100 * MS, |n| n.direct(0, 1).is_none() && n.direct(1, 0).is_none()));
}

#[test]
fn a_machine_behind_a_symmetric_nat_meets_a_public_one() {
    let mut net = Net::pair(
        Node::new(1, Nat::Symmetric, &["10.0.0.1:41641"]),
        Node::new(2, Nat::None, &["203.0.113.2:41641"]),
        (true, true),
    );
    assert!(net.run(3 * S, Net::both_direct));
    assert_eq!(net.direct(1, 0), Some("203.0.113.1:40000".parse().unwrap()), "learnt from its probes");
    net.run(net.now + 60 * S, |_| false);
    assert!(net.both_direct());
    assert!(net.nodes.iter().all(|n| n.changes.len() == 1), "no flapping");
}

#[test]
fn a_new_nat_mapping_is_learnt_and_the_old_one_forgotten() {
    let mut net = Net::pair(
        Node::new(1, Nat::Restricted, &["10.0.0.1:41641"]),
        Node::new(2, Nat::None, &["203.0.113.2:41641"]),
        (true, false),
    );
    assert!(net.run(3 * S, Net::both_direct));
    let old = net.direct(1, 0).unwrap();
    net.nodes[0].opened.clear();
    net.nodes[0].mappings.insert(None, 45_000);
    let (now, new) = (net.now, "203.0.113.1:45000".parse().unwrap());
    assert!(net.run(now + 4 * S, |n| n.direct(1, 0) == Some(new)), "the peer's probes show the new one");
    assert!(net.direct(0, 1).is_some());
    net.run(now + 400 * S, |_| false);
    assert_eq!(net.nodes[1].paths.peer_at(old), None);
    assert_eq!(net.nodes[1].paths.peer_at(new), Some(net.nodes[0].id));
}

#[test]
fn two_nats_with_stable_ports_are_punched_from_both_sides() {
    let mut net = Net::new(vec![
        Node::new(1, Nat::Restricted, &["10.0.0.1:41641"]),
        Node::new(2, Nat::Restricted, &["10.0.0.2:41641"]),
    ]);
    let outside: Vec<SocketAddr> =
        net.nodes.iter_mut().map(|n| n.source("198.51.100.1:1".parse().unwrap()).unwrap()).collect();
    net.introduce(0, 1, &outside[1..]);
    net.introduce(1, 0, &outside[..1]);
    assert!(net.run(5 * S, Net::both_direct));
}

#[test]
fn two_symmetric_nats_stay_on_the_carrier() {
    let mut net = Net::new(vec![
        Node::new(1, Nat::Symmetric, &["10.0.0.1:41641"]),
        Node::new(2, Nat::Symmetric, &["10.0.0.2:41641"]),
    ]);
    net.introduce(0, 1, &["203.0.113.2:50000".parse().unwrap()]);
    net.introduce(1, 0, &["203.0.113.1:50000".parse().unwrap()]);
    assert!(!net.run(120 * S, |n| n.direct(0, 1).is_some() || n.direct(1, 0).is_some()));
}

#[test]
fn a_much_faster_path_replaces_a_slow_one_and_similar_ones_do_not_alternate() {
    let node = |n| {
        Node::new(
            n,
            Nat::None,
            &[&format!("203.0.113.{n}:1") as &str, &format!("10.0.0.{n}:1"), &format!("198.51.100.{n}:1")],
        )
    };
    let mut net = Net::pair(node(1), node(2), (true, true));
    net.cut(10);
    assert!(net.run(3 * S, Net::both_direct));
    net.cut.clear();
    assert!(net.run(90 * S, |n| n.direct(0, 1).map(network) == Some(10)), "the LAN is taken");
    let changes = net.nodes[0].changes.len();
    net.run(net.now + 300 * S, |_| false);
    net.cut(10);
    assert!(net.run(net.now + LOST_AFTER, |n| n.direct(0, 1).map(network) != Some(10)));
    assert!(net.run(net.now + S, Net::both_direct), "another address takes over");
    for round in 0..300 {
        // Two paths whose times wander around one another.
        net.latency.insert(198, 20 * MS + (round % 7) * MS);
        net.latency.insert(203, 20 * MS + (round % 5) * MS);
        net.run(net.now + S, |_| false);
    }
    assert!(net.nodes[0].changes.len() <= changes + 3, "{:?}", net.nodes[0].changes);
}

#[test]
fn a_tenth_of_the_packets_lost_does_not_lose_the_path() {
    let mut net = public_pair();
    net.lose_every = 10;
    assert!(net.run(10 * S, Net::both_direct));
    let changes = net.nodes[0].changes.len() + net.nodes[1].changes.len();
    net.run(net.now + 600 * S, |_| false);
    assert_eq!(net.nodes[0].changes.len() + net.nodes[1].changes.len(), changes);
}

#[test]
fn replayed_probes_never_move_a_path_or_take_an_address() {
    let mut net = Net::new(vec![
        Node::new(1, Nat::None, &["203.0.113.1:1"]),
        Node::new(2, Nat::None, &["203.0.113.2:1"]),
        Node::new(3, Nat::None, &["203.0.113.3:1"]),
    ]);
    let addrs: Vec<_> = net.nodes.iter().map(|n| n.addrs.clone()).collect();
    for (a, b) in [(0, 1), (1, 0), (0, 2), (2, 0)] {
        net.introduce(a, b, &addrs[b]);
    }
    net.run(30 * S, |_| false);
    let before = (net.direct(0, 1), net.direct(0, 2));
    assert!(before.0.is_some() && before.1.is_some());
    let recorded = net.recorded.clone();
    for (i, bytes) in recorded.iter().enumerate() {
        let spoofed = match i % 3 {
            0 => addrs[1][0],
            1 => addrs[2][0],
            _ => SocketAddr::from(([192, 0, 2, (i % 200) as u8], 7)),
        };
        net.deliver(0, spoofed, bytes);
    }
    assert_eq!((net.direct(0, 1), net.direct(0, 2)), before);
    assert_eq!(net.nodes[0].paths.peer_at(addrs[1][0]), Some(net.nodes[1].id));
    assert_eq!(net.nodes[0].paths.peer_at(addrs[2][0]), Some(net.nodes[2].id));
    net.run(net.now + 60 * S, |_| false);
    assert_eq!((net.direct(0, 1), net.direct(0, 2)), before);
}

#[test]
fn a_removed_peer_gets_no_probe_and_no_answer() {
    let mut net = public_pair();
    assert!(net.run(3 * S, Net::both_direct));
    let (id, now) = (net.nodes[0].id, net.now);
    net.nodes[1].paths.remove_peer(id);
    assert_eq!(net.path(1, 0), PathChoice::Carrier);
    assert_eq!(net.nodes[1].paths.peer_at("203.0.113.1:1".parse().unwrap()), None);
    assert_eq!(net.nodes[1].paths.next_timeout(), None);
    assert!(net.run(now + LOST_AFTER + S, |n| n.direct(0, 1).is_none()));
}

#[test]
fn the_number_of_addresses_is_bounded() {
    let many: Vec<SocketAddr> = (1..2000u16).map(|p| SocketAddr::from(([203, 0, 113, 2], p))).collect();
    let mut net =
        Net::new(vec![Node::new(1, Nat::None, &["203.0.113.1:1"]), Node::new(2, Nat::None, &["203.0.113.2:1"])]);
    net.introduce(0, 1, &many);
    net.run(2 * S, |_| false);
    assert!(net.sent <= 64, "{} probes", net.sent);
}

#[derive(Debug, Clone)]
enum Step {
    Cut,
    Heal,
    Replay(usize, u8),
    Garbage(Vec<u8>),
    Flip(usize, usize, u8),
    Wait(u64),
    Traffic(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Cut),
        Just(Step::Heal),
        (any::<usize>(), any::<u8>()).prop_map(|(i, a)| Step::Replay(i, a)),
        prop::collection::vec(any::<u8>(), 0..120).prop_map(Step::Garbage),
        (any::<usize>(), 0..PROBE_LEN, 1u8..).prop_map(|(i, at, by)| Step::Flip(i, at, by)),
        (0u64..8000).prop_map(Step::Wait),
        any::<bool>().prop_map(Step::Traffic),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn whatever_happens_paths_follow_the_network_alone(steps in prop::collection::vec(step(), 0..60)) {
        let mut net = public_pair();
        net.run(3 * S, Net::both_direct);
        for step in steps {
            let before = (net.direct(0, 1), net.direct(1, 0));
            match step {
                Step::Cut => net.cut(203),
                Step::Heal => net.cut.clear(),
                Step::Replay(i, a) => {
                    let bytes = net.recorded[i % net.recorded.len()].clone();
                    net.deliver(i % 2, SocketAddr::from(([203, 0, 113, a], 41641)), &bytes);
                }
                Step::Garbage(bytes) => net.deliver(0, "203.0.113.2:41641".parse().unwrap(), &bytes),
                Step::Flip(i, at, by) => {
                    let mut bytes = net.recorded[i % net.recorded.len()].clone();
                    bytes[at] ^= by;
                    let now = net.now;
                    let reply = net.nodes[i % 2].paths.handle_probe("203.0.113.9:1".parse().unwrap(), &bytes, now);
                    prop_assert_eq!(reply, None, "a forged probe gets no reply");
                }
                Step::Wait(ms) => { net.run(net.now + ms as u32 * MS, |_| false); continue }
                Step::Traffic(busy) => { net.busy = busy; continue }
            }
            prop_assert_eq!((net.direct(0, 1), net.direct(1, 0)), before, "nothing but time and answers moves a path");
        }
        net.busy = true;
        net.cut(203);
        prop_assert!(net.run(net.now + LOST_AFTER + 100 * MS, |n| n.direct(0, 1).is_none() && n.direct(1, 0).is_none()));
        net.cut.clear();
        prop_assert!(net.run(net.now + 6 * S, Net::both_direct), "a healed network is used again");
    }
}

#[test]
fn a_machine_that_moved_is_reached_at_its_new_address_within_two_round_trips() {
    let mut net = Net::pair(
        Node::new(1, Nat::Restricted, &["10.0.0.1:9"]),
        Node::new(2, Nat::None, &["203.0.113.200:9"]),
        (true, false),
    );
    assert!(net.run(20 * S, |net| net.direct(0, 1).is_some() && net.direct(1, 0).is_some()));
    let old = net.direct(1, 0).unwrap();
    let recorded = net.recorded.clone();

    // Another router, another address: nothing reaches the old one any more.
    net.nodes[0].outside = Ipv4Addr::new(203, 0, 113, 77);
    net.nodes[0].mappings.clear();
    net.nodes[0].opened.clear();
    let now = net.now;
    net.nodes[0].paths.moved(now);
    assert_eq!(net.direct(0, 1), None, "nothing is proven in the new network");
    let moved = |net: &Net| net.direct(1, 0).is_some_and(|at| at.ip() == Ipv4Addr::new(203, 0, 113, 77));
    assert!(net.run(now + 80 * MS, |net| moved(net) && net.direct(0, 1).is_some()), "too slow");

    // Whoever recorded what was said before cannot send it back there.
    for bytes in recorded {
        net.deliver(1, old, &bytes);
    }
    assert!(moved(&net));
}

#[test]
fn whoever_speaks_through_the_carrier_is_answered_there_until_the_direct_path_proves_itself_again() {
    let mut net = Net::pair(
        Node::new(1, Nat::None, &["203.0.113.1:9"]),
        Node::new(2, Nat::None, &["203.0.113.2:9"]),
        (true, true),
    );
    assert!(net.run(20 * S, |net| net.direct(0, 1).is_some() && net.direct(1, 0).is_some()));
    let (peer, now) = (net.nodes[0].id, net.now);
    assert!(!net.nodes[1].paths.note_carried(peer, now), "sent before the direct path was proven");
    assert!(net.direct(1, 0).is_some());

    net.run(now + 5 * S, |_| false);
    net.cut.insert(203);
    // Past the last answer that may still be on its way.
    let now = net.now;
    net.run(now + 300 * MS, |_| false);
    let now = net.now;
    assert!(net.nodes[1].paths.note_carried(peer, now));
    assert_eq!(net.direct(1, 0), None, "at once, not only when probes have gone unanswered for seconds");
    assert!(!net.nodes[1].paths.note_carried(peer, now), "once is enough");

    net.cut.clear();
    assert!(net.run(now + 2 * S, |net| net.direct(1, 0).is_some()), "a path that still works is used again");
}
