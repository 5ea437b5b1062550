//! The transport beneath the WireGuard engine: the engine sends to a peer's virtual address, and here the path is
//! chosen for each packet. The engine never sees a real address, so it has nothing to roam between.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use clan_types::MachineId;
use gotatun::{
    packet::{Packet, PacketBufPool},
    udp::{UdpRecv, UdpSend, UdpTransportFactory, UdpTransportFactoryParams, socket::UdpSocket},
};
use tokio::sync::{Mutex, Notify, mpsc};
use tracing::{debug, trace};

use super::{
    peers::{Directory, Route},
    socket::Socket,
};

/// How many packets the engine may hand over at once.
const BATCH: usize = 128;
/// The longest packet that a carrier may bring: a WireGuard packet is never longer than a UDP datagram.
const MAX_PACKET: usize = 65_535;
const RECEIVE_PAUSE: Duration = Duration::from_millis(100);

pub(crate) struct Shared {
    pub(crate) directory: Directory,
    pub(crate) socket: Socket,
    pub(crate) outgoing: mpsc::Sender<(MachineId, Bytes)>,
    /// Behind a lock because the engine takes a new receiver whenever it starts its tasks anew.
    pub(crate) incoming: Mutex<mpsc::Receiver<(MachineId, Bytes)>>,
    /// Tells the prober that its next moment may have come nearer.
    pub(crate) wake: Notify,
}

/// Makes transports: all of them share one socket, which stays bound while the engine restarts its tasks.
pub(crate) struct Factory(pub(crate) Arc<Shared>);

impl UdpTransportFactory for Factory {
    type Send = Sender;
    type Recv = Receiver;

    async fn bind(&mut self, _params: &UdpTransportFactoryParams) -> io::Result<(Sender, Receiver)> {
        Ok((
            Sender(self.0.clone()),
            Receiver { socket: self.0.socket.receiver(), shared: self.0.clone(), arrived: Vec::new() },
        ))
    }
}

#[derive(Clone)]
pub(crate) struct Sender(Arc<Shared>);

impl Sender {
    fn route(&self, virtual_addr: SocketAddr) -> Option<Route> {
        let now = self.0.directory.now();
        let (route, wake) = self.0.directory.lock().route(virtual_addr, now)?;
        if wake {
            self.0.wake.notify_one();
        }
        Some(route)
    }

    fn carry(&self, peer: MachineId, packet: &[u8]) {
        if self.0.outgoing.try_send((peer, Bytes::copy_from_slice(packet))).is_err() {
            trace!(%peer, "the carrier is full; a packet is dropped");
        }
    }
}

impl UdpSend for Sender {
    type SendManyBuf = ();

    async fn send_to(&self, packet: Packet, destination: SocketAddr) -> io::Result<()> {
        match self.route(destination) {
            Some(Route::Direct(addr, peer)) => {
                // The system may know sooner than the prober that an address is out of reach.
                if let Err(error) = self.0.socket.send(&packet, addr).await {
                    trace!(%error, %addr, "direct sending failed; using the carrier");
                    self.carry(peer, &packet);
                }
            }
            Some(Route::Carrier(peer)) => self.carry(peer, &packet),
            None => {}
        }
        Ok(())
    }

    fn max_number_of_packets_to_send(&self) -> usize {
        BATCH
    }

    async fn send_many_to(&self, _buffer: &mut (), packets: &mut Vec<(Packet, SocketAddr)>) -> io::Result<()> {
        for run in packets.chunk_by(|a, b| a.1 == b.1) {
            let Some((_, destination)) = run.first() else { continue };
            match self.route(*destination) {
                Some(Route::Direct(addr, peer)) => {
                    if let Err(error) = self.0.socket.send_run(run, addr).await {
                        trace!(%error, %addr, "direct sending failed; using the carrier");
                        // WireGuard drops the copies of those that did get through.
                        run.iter().for_each(|(packet, _)| self.carry(peer, packet));
                    }
                }
                Some(Route::Carrier(peer)) => run.iter().for_each(|(packet, _)| self.carry(peer, packet)),
                None => {}
            }
        }
        packets.clear();
        Ok(())
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        self.0.socket.local_addr().map(Some)
    }
}

pub(crate) struct Receiver {
    socket: UdpSocket,
    shared: Arc<Shared>,
    arrived: Vec<(Packet, SocketAddr)>,
}

#[derive(Default)]
pub(crate) struct ReceiveBuffer {
    udp: <UdpSocket as UdpRecv>::RecvManyBuf,
    carried: Vec<(MachineId, Bytes)>,
}

impl Receiver {
    /// Sorts what arrived by UDP: probes are answered, packets of peers pass, everything else is dropped.
    fn sort_arrived(&mut self, packets: &mut Vec<(Packet, SocketAddr)>) {
        let now = self.shared.directory.now();
        let mut replies = Vec::new();
        let mut state = self.shared.directory.lock();
        for (packet, src) in self.arrived.drain(..) {
            if clan_tunnel::is_probe(&packet) {
                replies.extend(state.paths.handle_probe(src, &packet, now));
            } else if let Some(virtual_addr) = state.virtual_at(src) {
                packets.push((packet, virtual_addr));
            }
        }
        drop(state);
        for reply in &replies {
            if let Err(error) = self.shared.socket.try_send(&reply.bytes, reply.to) {
                trace!(%error, to = %reply.to, "a probe was not answered");
            }
        }
        if !replies.is_empty() {
            self.shared.wake.notify_one();
        }
    }
}

impl UdpRecv for Receiver {
    type RecvManyBuf = ReceiveBuffer;

    async fn recv_from(&mut self, pool: &mut PacketBufPool) -> io::Result<(Packet, SocketAddr)> {
        // The engine receives in batches only; this serves completeness.
        let (mut buffer, mut packets) = (ReceiveBuffer::default(), Vec::new());
        loop {
            self.recv_many_from(&mut buffer, pool, &mut packets).await?;
            if let Some(packet) = packets.pop() {
                return Ok(packet);
            }
        }
    }

    async fn recv_many_from(
        &mut self,
        buffer: &mut ReceiveBuffer,
        pool: &mut PacketBufPool,
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> io::Result<()> {
        let shared = self.shared.clone();
        let ReceiveBuffer { udp, carried: batch } = buffer;
        let carried = async {
            let mut incoming = shared.incoming.lock().await;
            if incoming.recv_many(&mut *batch, BATCH).await == 0 {
                // Nobody feeds the carrier any more.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            received = self.socket.recv_many_from(udp, pool, &mut self.arrived) => {
                if let Err(error) = received {
                    // INVARIANT: an error never ends the receiver, because the engine would not start another.
                    debug!(%error, "receiving failed");
                    tokio::time::sleep(RECEIVE_PAUSE).await;
                }
                self.sort_arrived(packets);
            }
            () = carried => {
                let state = shared.directory.lock();
                for (peer, bytes) in batch.drain(..) {
                    // Only peers' packets pass, and probes have no business on the carrier.
                    let Some(virtual_addr) = state.virtual_of(peer) else { continue };
                    if bytes.len() <= MAX_PACKET && !clan_tunnel::is_probe(&bytes) {
                        let mut packet = pool.get();
                        packet.buf_mut().clear();
                        packet.buf_mut().extend_from_slice(&bytes);
                        packets.push((packet, virtual_addr));
                    }
                }
            }
        }
        Ok(())
    }
}
