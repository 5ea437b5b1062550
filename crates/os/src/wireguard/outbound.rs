//! From applications to peers.

use std::{io, os::fd::AsFd, sync::Arc};

use bytes::BytesMut;
use clan_tunnel::{
    ip, multicast,
    offload::{self, Offload},
};
use gotatun::packet::{Packet, WgKind};
use tracing::{debug, trace};

use super::{engine::Engine, peers::Member};
use crate::tun::{ReadBuffer, is_gone};

/// How many packets may wait to be sent in one go.
const BATCH: usize = 64;
/// How many reads may pass before everything is sent, while applications are faster than the network.
const READS: usize = 64;

/// Moves packets until the engine stops or the device is gone.
pub(super) fn run(engine: &Engine) {
    let mut buffer = ReadBuffer::new();
    let mut outbound =
        Outbound { engine, arena: BytesMut::new(), lengths: Vec::new(), sealed: Vec::with_capacity(BATCH), to: None };
    while engine.wait(engine.tun.as_fd()) {
        for _ in 0..READS {
            match engine.tun.read(&mut buffer) {
                Ok((offload, packet)) => outbound.take(offload, packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if is_gone(&error) => return,
                Err(error) => {
                    debug!(%error, "a packet could not be read");
                    break;
                }
            }
        }
        outbound.flush();
    }
}

struct Outbound<'a> {
    engine: &'a Engine,
    /// Packets that are split but not sealed yet; its memory is used again and again.
    arena: BytesMut,
    lengths: Vec<usize>,
    /// Packets to `to` that are ready to send.
    sealed: Vec<Packet>,
    to: Option<Arc<Member>>,
}

impl Outbound<'_> {
    fn take(&mut self, offload: Offload, packet: &mut [u8]) {
        let Some(destination) = ip::addresses(packet).map(|addresses| addresses.destination) else { return };
        let source_port = ip::udp_source(packet);
        if self.engine.is_carrier(source_port) {
            return;
        }
        let Some(member) = self.engine.table().by_address.get(&destination).cloned() else {
            if multicast::is_group(destination) {
                self.engine.say(packet);
            }
            return;
        };
        let now = self.engine.directory.now();
        if !(source_port == Some(multicast::PORT) && self.engine.is_answer_to_group(packet, now)) {
            self.engine.filters().outbound(None, packet, now);
        }
        if self.to.as_ref().is_none_or(|to| !Arc::ptr_eq(to, &member)) {
            self.flush();
        }
        self.lengths.clear();
        self.arena.clear();
        if offload::split(packet, &offload, self.engine.tun.mtu(), &mut self.arena, &mut self.lengths).is_err() {
            trace!("a packet that cannot be split");
            return;
        }
        let mut handshake = None;
        {
            let mut tunnel = member.tunnel();
            for length in self.lengths.drain(..) {
                let packet = Packet::from_bytes(self.arena.split_to(length));
                match tunnel.handle_outgoing_packet(packet, None) {
                    Some(WgKind::Data(packet)) => self.sealed.push(packet.into()),
                    // The packet waits for a session.
                    Some(other) => handshake = Some(other),
                    None => {}
                }
            }
        }
        if let Some(handshake) = handshake {
            self.engine.send(&member, handshake);
        }
        self.to = Some(member);
        if self.sealed.len() >= BATCH {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if let Some(to) = &self.to
            && !self.sealed.is_empty()
        {
            self.engine.send_all(to, &self.sealed);
        }
        self.sealed.clear();
    }
}
