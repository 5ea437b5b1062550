//! Connections, and what is on its way over them.

use std::rc::Rc;

use clan_replica::LinkId;
use clan_types::PeerAddr;
use clan_wire::peer::PeerMessage;

use crate::{
    network::{self, end_of, link_of},
    world::{Event, World},
};

const CONNECT_LIMIT: u64 = 10_000;

impl World {
    pub(crate) fn connections_of(&self, number: usize) -> Vec<(u64, usize)> {
        let ends =
            self.network.connections.iter().flat_map(|(connection, known)| {
                known.ends.iter().enumerate().map(move |(end, at)| (*connection, end, at))
            });
        ends.filter(|(_, _, at)| at.node == number && at.open).map(|(connection, end, _)| (connection, end)).collect()
    }

    /// Connections across a partition time out, sooner or later.
    pub(crate) fn cut_across(&mut self) {
        let across: Vec<_> = self
            .network
            .connections
            .iter()
            .filter(|(_, known)| !self.network.reaches(known.ends[0].node, known.ends[1].node))
            .map(|(connection, _)| *connection)
            .collect();
        for connection in across {
            for end in 0..2 {
                let timeout = self.dice.range(1000..30_000);
                self.after(timeout, Event::Over { connection, end });
            }
        }
    }

    pub(crate) fn dial(&mut self, number: usize, peer: &PeerAddr) {
        let life = self.nodes[number].life;
        let reached = self.nodes.iter().position(|node| node.id == peer.machine && peer.addrs.contains(&node.address));
        match reached.filter(|to| self.network.reaches(number, *to)) {
            Some(to) => {
                let delay = self.latency();
                self.after(delay, Event::Dialled { from: number, life, to });
            }
            None => self.after(CONNECT_LIMIT, Event::DialFailed { node: number, life, machine: peer.machine }),
        }
    }

    pub(crate) fn dialled(&mut self, from: usize, life: u64, to: usize) {
        if self.nodes[from].life != life || self.nodes[from].running.is_none() {
            return;
        }
        let (machine, dialler) = (self.nodes[to].id, self.nodes[from].id);
        let lost = !self.network.reaches(from, to) || (self.faulty && self.dice.permille(self.plan.loss));
        let Some(running) = self.nodes[to].running.as_ref().filter(|_| !lost) else {
            return self.after(CONNECT_LIMIT, Event::DialFailed { node: from, life, machine });
        };
        if !running.replica.welcomes(&dialler) {
            let delay = self.latency();
            return self.after(delay, Event::DialFailed { node: from, life, machine });
        }
        let connection = self.network.connect((from, life), (to, self.nodes[to].life));
        for end in 0..2 {
            let node = self.network.connections[&connection].ends[end].node;
            if let Some(hello) = self.nodes[node].running.as_ref().map(|running| running.replica.hello()) {
                self.send(link_of(connection, end), hello);
            }
        }
    }

    pub(crate) fn send(&mut self, link: LinkId, message: PeerMessage) {
        let (connection, end) = end_of(link);
        if !self.network.takes(connection, end) {
            return;
        }
        let mut delay = self.latency();
        let greets = network::greets(&message);
        let message = Rc::new(message);
        let arrive = || Event::Arrive { connection, to: 1 - end, message: message.clone() };
        let disturbed = self.faulty && !greets;
        if disturbed && self.dice.permille(self.plan.duplication) {
            let later = delay + self.dice.range(0..5000);
            if self.network.takes(connection, end) {
                self.after(later, arrive());
            }
        }
        let lost = disturbed && self.dice.permille(self.plan.loss);
        let overtaken = disturbed && self.dice.permille(self.plan.reordering);
        if overtaken {
            delay += self.dice.range(0..3000);
        }
        let Some(known) = self.network.connections.get_mut(&connection) else { return };
        let from = &mut known.ends[end];
        if lost {
            from.in_flight -= 1;
            return;
        }
        let mut at = self.now + delay;
        if !overtaken {
            at = at.max(from.last_arrival);
            from.last_arrival = at;
        }
        self.at(at, arrive());
    }

    pub(crate) fn arrive(&mut self, connection: u64, to: usize, message: &PeerMessage) {
        let Some(known) = self.network.connections.get_mut(&connection) else { return };
        let from = known.ends[1 - to].node;
        known.ends[1 - to].in_flight -= 1;
        let (node, life, open, linked) =
            (known.ends[to].node, known.ends[to].life, known.ends[to].open, known.ends[to].linked);
        let (machine, link) = (self.nodes[from].id, link_of(connection, to));
        if !open || self.nodes[node].life != life || !self.network.reaches(from, node) {
            return;
        }
        if let Some(known) = self.network.connections.get_mut(&connection) {
            known.ends[to].linked |= network::greets(message);
        }
        self.messages += 1;
        match message {
            PeerMessage::Hello { vector, .. } if !linked => {
                let vector = vector.clone();
                self.with(node, |replica, now| replica.handle_linked(machine, link, vector, now));
            }
            message if linked => {
                self.with(node, |replica, now| replica.handle_message(link, machine, message.clone(), now));
            }
            _ => {}
        }
    }

    pub(crate) fn close(&mut self, link: LinkId) {
        let (connection, end) = end_of(link);
        self.after(0, Event::Over { connection, end });
    }

    pub(crate) fn over(&mut self, connection: u64, end: usize) {
        let Some(known) = self.network.connections.get_mut(&connection) else { return };
        let at = &mut known.ends[end];
        let was_open = std::mem::replace(&mut at.open, false);
        let was_linked = std::mem::replace(&mut at.linked, false);
        let (node, life) = (at.node, at.life);
        if !was_open && !known.ends[1 - end].open {
            self.network.connections.remove(&connection);
            return;
        }
        let other = known.ends[1 - end].node;
        if was_open {
            let delay = self.latency();
            if self.network.reaches(node, other) {
                self.after(delay, Event::Over { connection, end: 1 - end });
            }
            if self.nodes[node].life == life {
                if was_linked {
                    self.with(node, |replica, now| replica.handle_unlinked(link_of(connection, end), now));
                }
                if end == 0 {
                    let machine = self.nodes[other].id;
                    self.with(node, |replica, now| replica.handle_dial_ended(machine, now));
                }
            }
        }
    }
}
