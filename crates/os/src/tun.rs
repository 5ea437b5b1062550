//! A TUN device with segmentation offload: the kernel hands over and takes TCP super-packets, which are split and
//! joined here, so that one system call moves many packets.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use bytes::BytesMut;
use gotatun::{
    packet::{Ip, Packet, PacketBufPool},
    tun::{IpRecv, IpSend, MtuWatcher},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tracing::{Instrument, debug, debug_span};
use tun_rs::{AsyncDevice, GROTable, VIRTIO_NET_HDR_LEN};

/// How many packets one read may yield, and one write may take.
const BATCH: usize = 128;
/// Packets that wait to be written to the device; beyond that the sender waits.
const WRITE_QUEUE: usize = 4096;
const CLAN_PREFIX: u8 = 48;
/// Pause after a read error that may pass, such as the device being down.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// A TUN device with its address and the route to the clan's /48. Dropping it removes the device, and with it
/// address and route.
pub struct Tun {
    device: Arc<AsyncDevice>,
    name: String,
    mtu: u16,
    address: Ipv6Addr,
}

/// Why a TUN device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// The device could not be created or configured.
    #[error("cannot set up the network device `{name}`")]
    Create {
        /// Its name.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Tun {
    /// Creates and raises the device `name` with `address` in the clan's /48. Needs the right to administer this
    /// network namespace, and a tokio runtime.
    pub async fn create(name: &str, mtu: u16, address: Ipv6Addr) -> Result<Self, TunError> {
        let failed = |source| TunError::Create { name: name.to_owned(), source };
        let device = tun_rs::DeviceBuilder::new()
            .name(name)
            .mtu(mtu)
            .ipv6(address, CLAN_PREFIX)
            .offload(true)
            .build_async()
            .map_err(failed)?;
        let name = device.name().map_err(failed)?;
        debug!(device = %name, %address, mtu, tcp_offload = device.tcp_gso(), udp_offload = device.udp_gso(), "network device is up");
        Ok(Self { device: Arc::new(device), name, mtu, address })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's mesh address.
    pub fn address(&self) -> Ipv6Addr {
        self.address
    }

    /// Reader and writer for WireGuard. The device lives until both are dropped and the writer task has ended.
    pub(crate) fn into_halves(self) -> (TunReader, TunWriter, JoinHandle<()>) {
        let buffer = usize::from(self.mtu) + 256;
        let reader = TunReader {
            device: self.device.clone(),
            mtu: self.mtu,
            raw: vec![0; VIRTIO_NET_HDR_LEN + 65_536],
            packets: (0..BATCH).map(|_| BytesMut::zeroed(buffer.max(2048))).collect(),
            sizes: vec![0; BATCH],
            batch: Vec::with_capacity(BATCH),
        };
        let (queue, packets) = mpsc::channel(WRITE_QUEUE);
        let task = tokio::spawn(
            write_packets(self.device, packets).instrument(debug_span!("tun_writer", device = %self.name)),
        );
        (reader, TunWriter { queue, address: self.address }, task)
    }
}

/// Packets that applications send.
pub(crate) struct TunReader {
    device: Arc<AsyncDevice>,
    mtu: u16,
    raw: Vec<u8>,
    packets: Vec<BytesMut>,
    sizes: Vec<usize>,
    batch: Vec<Packet<Ip>>,
}

impl IpRecv for TunReader {
    async fn recv<'a>(
        &'a mut self,
        _pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        let count = loop {
            match self.device.recv_multiple(&mut self.raw, &mut self.packets, &mut self.sizes, 0).await {
                Ok(count) => break count,
                Err(error) if is_gone(&error) => return Err(error),
                Err(error) => {
                    // A packet that cannot be split, or a device that is down: neither ends the tunnel.
                    debug!(%error, "a packet could not be read");
                    tokio::time::sleep(READ_PAUSE).await;
                }
            }
        };
        for (packet, size) in self.packets.iter().zip(&self.sizes).take(count) {
            let bytes = packet.get(..*size).unwrap_or_default();
            if let Ok(packet) = Packet::from_bytes(BytesMut::from(bytes)).try_into_ip() {
                self.batch.push(packet);
            }
        }
        Ok(self.batch.drain(..))
    }

    fn mtu(&self) -> MtuWatcher {
        MtuWatcher::new(self.mtu)
    }
}

/// Packets for applications.
pub(crate) struct TunWriter {
    queue: mpsc::Sender<Packet<Ip>>,
    address: Ipv6Addr,
}

impl IpSend for TunWriter {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        // INVARIANT: only packets for this machine come out of the tunnel, so no member can use it as a way elsewhere.
        if packet.destination() != Some(IpAddr::V6(self.address)) {
            return Ok(());
        }
        self.queue.send(packet).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

async fn write_packets(device: Arc<AsyncDevice>, mut queue: mpsc::Receiver<Packet<Ip>>) {
    let mut joiner = GROTable::default();
    let mut batch = Vec::with_capacity(BATCH);
    let mut buffers: Vec<BytesMut> = (0..BATCH).map(|_| BytesMut::with_capacity(VIRTIO_NET_HDR_LEN + 65_536)).collect();
    loop {
        let count = queue.recv_many(&mut batch, BATCH).await;
        if count == 0 {
            return;
        }
        for (buffer, packet) in buffers.iter_mut().zip(batch.drain(..)) {
            buffer.clear();
            buffer.resize(VIRTIO_NET_HDR_LEN, 0);
            buffer.extend_from_slice(&packet.into_bytes());
        }
        if let Err(error) = device.send_multiple(&mut joiner, &mut buffers[..count], VIRTIO_NET_HDR_LEN).await {
            if is_gone(&error) {
                return;
            }
            debug!(%error, "a packet could not be written");
        }
    }
}

/// The device was deleted under us.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EBADFD | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(to: Ipv6Addr) -> Packet<Ip> {
        let mut bytes = BytesMut::zeroed(48);
        bytes[0] = 0x60;
        bytes[5] = 8;
        bytes[24..40].copy_from_slice(&to.octets());
        Packet::from_bytes(bytes).try_into_ip().unwrap()
    }

    #[tokio::test]
    async fn packets_for_others_do_not_come_out() {
        let address: Ipv6Addr = "fd01::1".parse().unwrap();
        let (queue, mut written) = mpsc::channel(8);
        let mut writer = TunWriter { queue, address };
        for to in ["fd01::2", "::1", "ff02::1", "2001:db8::1"] {
            writer.send(packet(to.parse().unwrap())).await.unwrap();
        }
        assert!(written.try_recv().is_err());
        writer.send(packet(address)).await.unwrap();
        assert_eq!(written.try_recv().unwrap().destination(), Some(IpAddr::V6(address)));
    }
}
