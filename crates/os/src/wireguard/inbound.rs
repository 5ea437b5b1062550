//! From peers to applications, and between a standard peer and everybody else.

use std::{io, net::IpAddr, os::fd::AsFd, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use clan_tunnel::{ip, multicast, offload::Joiner};
use clan_types::MachineId;
use gotatun::{
    noise::TunnResult,
    packet::{Packet, WgKind},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, trace};

use super::{
    engine::{Engine, Source},
    peers::{Member, Table},
    socket::Received,
};
use crate::tun::is_gone;

/// How many of the carrier's packets are taken at once.
const BATCH: usize = 128;
/// The longest packet that a carrier may bring: a WireGuard packet is never longer than a UDP datagram.
const MAX_PACKET: usize = 65_535;
/// Pause after an error that may pass.
const PAUSE: Duration = Duration::from_millis(100);
/// The first byte of a WireGuard packet with data (section 5.4.6 of its paper).
const DATA: u8 = 4;
/// Header and tag of a packet with data, which is the least it can be.
const DATA_OVERHEAD: usize = 32;

/// Moves packets from the socket until the engine stops or the device is gone.
pub(super) fn run(engine: &Engine) {
    let mut received = Received::new();
    let mut inbound = Inbound::new(engine);
    while engine.wait(engine.socket.as_fd()) {
        match received.receive(&engine.socket) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                debug!(%error, "receiving failed");
                std::thread::sleep(PAUSE);
                continue;
            }
        }
        inbound.begin();
        for (from, datagram, stride) in received.drain() {
            inbound.datagram(from, datagram, stride);
        }
        if inbound.finish().is_err() {
            return;
        }
    }
}

/// Moves packets from the carrier until cancelled.
pub(super) async fn run_carrier(
    engine: Arc<Engine>,
    mut incoming: mpsc::Receiver<(MachineId, Bytes)>,
    cancel: CancellationToken,
) {
    let mut inbound = Inbound::new(&engine);
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            count = incoming.recv_many(&mut batch, BATCH) => if count == 0 { return },
        }
        inbound.begin();
        let mut speaker = None;
        for (peer, packet) in batch.drain(..) {
            if speaker.replace(peer) != Some(peer) && engine.directory.note_carried(peer) {
                engine.wake.notify_one();
            }
            let source = Source::Carrier(peer);
            // Probes have no business on the carrier.
            if packet.len() <= MAX_PACKET
                && !clan_tunnel::is_probe(&packet)
                && engine.may_come_from(source, &inbound.table)
            {
                inbound.packet(BytesMut::from(packet), source);
            }
        }
        if inbound.finish().is_err() {
            return;
        }
    }
}

struct Inbound<'a> {
    engine: &'a Engine,
    table: Arc<Table>,
    joiner: Joiner,
    /// Packets that came out, for this machine, not judged yet.
    opened: Vec<BytesMut>,
    /// Of these, what may answer a question to the group.
    answers: Vec<BytesMut>,
    /// The session that the last packet belonged to, and the address it came from inside.
    session: Option<(u32, Arc<Member>)>,
    inside: Option<IpAddr>,
    /// Packets for other peers, sealed.
    forwarded: Vec<(Arc<Member>, WgKind)>,
}

impl<'a> Inbound<'a> {
    fn new(engine: &'a Engine) -> Self {
        Self {
            engine,
            table: engine.table(),
            joiner: Joiner::default(),
            opened: Vec::new(),
            answers: Vec::new(),
            session: None,
            inside: None,
            forwarded: Vec::new(),
        }
    }

    /// Looks at who the peers are now.
    fn begin(&mut self) {
        let table = self.engine.table();
        if !Arc::ptr_eq(&table, &self.table) {
            // INVARIANT: after a change of the peers nothing of a removed one comes out.
            (self.session, self.inside) = (None, None);
            self.table = table;
        }
    }

    /// Writes what came out. An error: the device is gone.
    fn finish(&mut self) -> io::Result<()> {
        let mut gone = Ok(());
        let tun = &self.engine.tun;
        if !self.opened.is_empty() {
            let now = self.engine.directory.now();
            let mut filters = self.engine.filters();
            for packet in self.opened.drain(..) {
                if filters.inbound(None, &packet, now) {
                    self.joiner.push(packet);
                } else if ip::udp_source(&packet) == Some(multicast::PORT) {
                    self.answers.push(packet);
                } else {
                    trace!("a packet that no rule allows");
                }
            }
            drop(filters);
            for packet in self.answers.drain(..) {
                match self.engine.multicast().inbound_alone(&packet, now) {
                    Some(answer) => self.joiner.push(answer),
                    None => trace!("an answer that nobody asked for"),
                }
            }
        }
        self.joiner.drain(|group| match tun.write(group) {
            Err(error) if is_gone(&error) => gone = Err(error),
            Err(error) => debug!(%error, "a packet could not be written"),
            Ok(()) => {}
        });
        for (member, packet) in self.forwarded.drain(..) {
            self.engine.send(&member, packet);
        }
        gone
    }

    /// Packets from one address, each `stride` bytes long but the last.
    fn datagram(&mut self, from: std::net::SocketAddr, mut datagram: BytesMut, stride: usize) {
        let source = Source::Udp(from);
        let mut allowed = None;
        while !datagram.is_empty() {
            let packet = datagram.split_to(stride.clamp(1, datagram.len()));
            if clan_tunnel::is_probe(&packet) {
                self.probe(from, &packet);
                // It may have told who sends from there.
                allowed = None;
            } else if *allowed.get_or_insert_with(|| self.engine.may_come_from(source, &self.table)) {
                self.packet(packet, source);
            }
        }
    }

    fn probe(&self, from: std::net::SocketAddr, packet: &[u8]) {
        let engine = self.engine;
        let now = engine.directory.now();
        let reply = engine.directory.lock().handle_probe(from, packet, now);
        if let Some(reply) = reply {
            if let Err(error) = engine.socket.send(&reply.bytes, reply.to) {
                trace!(%error, to = %reply.to, "a probe was not answered");
            }
            engine.wake.notify_one();
        }
    }

    fn packet(&mut self, packet: BytesMut, source: Source) {
        if packet.first() != Some(&DATA) {
            self.engine.handle_handshake(Packet::from_bytes(packet), source, &self.table);
            return;
        }
        if packet.len() < DATA_OVERHEAD {
            return;
        }
        let index = u32::from_le_bytes([packet[4], packet[5], packet[6], packet[7]]);
        let mut fresh = false;
        let member = match &self.session {
            Some((known, member)) if *known == index => member.clone(),
            _ => {
                fresh = true;
                let Some(member) = self.engine.member_of_index(index) else { return };
                self.session = Some((index, member.clone()));
                self.inside = None;
                member
            }
        };
        let Ok(packet) = Packet::from_bytes(packet).try_into_wg() else { return };
        let result = member.tunnel().handle_incoming_packet(packet);
        let TunnResult::WriteToTunnel(mut opened) = result else {
            trace!(peer = %member.id, ?result, "a packet was refused");
            // The index may belong to somebody else by now.
            self.session = None;
            return;
        };
        if let (true, Source::Udp(addr)) = (member.standard, source)
            && member.endpoint() != Some(addr)
        {
            debug!(peer = %member.id, %addr, "a standard peer moved");
            member.moved_to(addr);
        }
        if fresh || opened.is_empty() {
            // The first packet of a session, mostly a keepalive, confirms it; others may have waited for that.
            let queued = self.engine.with_queued(&mut member.tunnel(), None);
            self.forwarded.extend(queued.into_iter().map(|packet| (member.clone(), packet)));
        }
        if opened.is_empty() {
            return;
        }
        let bytes = std::mem::take(opened.buf_mut());
        self.deliver(bytes, &member);
    }

    /// Takes an opened packet to where it belongs.
    fn deliver(&mut self, mut packet: BytesMut, member: &Arc<Member>) {
        let Some(addresses) = ip::addresses(&packet) else { return };
        if packet.len() < addresses.length {
            return;
        }
        packet.truncate(addresses.length);
        if self.inside != Some(addresses.source) {
            if !self.engine.is_from(&self.table, member, addresses.source) {
                trace!(peer = %member.id, source = %addresses.source, "a packet from a foreign address");
                return;
            }
            self.inside = Some(addresses.source);
        }
        // INVARIANT: only packets for this machine come out of the tunnel, so no member can use it as a way elsewhere.
        if self.engine.tun.is_own(addresses.destination) {
            self.opened.push(packet);
        } else if multicast::is_group(addresses.destination) {
            self.hear(&packet, member);
        } else {
            self.forward(packet, addresses.destination, member);
        }
    }

    /// Hands on what a machine says to the group of multicast DNS, if it may say that.
    fn hear(&mut self, packet: &[u8], member: &Arc<Member>) {
        // Whom a standard peer's packets are from, nobody but the machine in front of it knows.
        if member.standard {
            return;
        }
        let now = self.engine.directory.now();
        match self.engine.multicast().inbound(&member.id, packet, now) {
            Some(heard) => self.joiner.push(heard),
            None => trace!(peer = %member.id, "what was said to the group is not handed on"),
        }
    }

    /// Between a standard peer behind this machine and everybody else; nobody else's packets are passed on.
    fn forward(&mut self, mut packet: BytesMut, destination: IpAddr, from: &Arc<Member>) {
        let Some(to) = self.table.by_address.get(&destination) else { return };
        if !(from.standard || to.standard) || Arc::ptr_eq(from, to) || !ip::hop(&mut packet) {
            return;
        }
        let now = self.engine.directory.now();
        {
            let mut filters = self.engine.filters();
            if from.standard {
                filters.outbound(Some(from.id), &packet, now);
            }
            if to.standard && !filters.inbound(Some(to.id), &packet, now) {
                trace!(peer = %to.id, "a packet that no rule allows");
                return;
            }
        }
        let sealed = to.tunnel().handle_outgoing_packet(Packet::from_bytes(packet), None);
        self.forwarded.extend(sealed.map(|sealed| (to.clone(), sealed)));
    }
}
