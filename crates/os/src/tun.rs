//! A TUN device with segmentation offload: the kernel hands over and takes super-packets, so that one system call moves
//! many packets. [`clan_tunnel::offload`] splits and joins them.

use std::{
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use clan_tunnel::offload::{Group, HEADER_LEN, Offload};
use clan_types::IPV4_PREFIX;
use tracing::debug;
use tun_rs::SyncDevice;

const CLAN_PREFIX: u8 = 48;
/// The longest packet that the kernel hands over.
const SUPER_PACKET: usize = 65_536;

/// A TUN device with its addresses and the routes to the clan's networks. Dropping it removes the device, and with it
/// addresses and routes.
pub struct Tun {
    device: SyncDevice,
    name: String,
    mtu: u16,
    address: Ipv6Addr,
    /// The second address; 0: none.
    ipv4: AtomicU32,
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
            .build_sync()
            .map_err(failed)?;
        device.set_nonblocking(true).map_err(failed)?;
        let name = device.name().map_err(failed)?;
        debug!(device = %name, %address, mtu, tcp_offload = device.tcp_gso(), udp_offload = device.udp_gso(), "network device is up");
        Ok(Self { device, name, mtu, address, ipv4: AtomicU32::new(0) })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's mesh address.
    pub fn address(&self) -> Ipv6Addr {
        self.address
    }

    /// Gives the device a second address, with the route to 100.64.0.0/10, or takes it away.
    pub(crate) fn set_ipv4(&self, ipv4: Option<Ipv4Addr>) -> io::Result<()> {
        let wanted = ipv4.map_or(0, Ipv4Addr::to_bits);
        let had = self.ipv4.swap(wanted, Ordering::Relaxed);
        if had == wanted {
            return Ok(());
        }
        if had != 0 {
            self.device.remove_address(Ipv4Addr::from_bits(had).into())?;
        }
        ipv4.map_or(Ok(()), |address| self.device.add_address_v4(address, IPV4_PREFIX.1))
    }

    pub(crate) fn mtu(&self) -> usize {
        usize::from(self.mtu)
    }

    /// Whether a packet to `destination` is for this machine.
    pub(crate) fn is_own(&self, destination: IpAddr) -> bool {
        match destination {
            IpAddr::V6(destination) => destination == self.address,
            IpAddr::V4(destination) => {
                let own = self.ipv4.load(Ordering::Relaxed);
                own != 0 && destination.to_bits() == own
            }
        }
    }

    /// The next packet that an application sends, without waiting.
    pub(crate) fn read<'a>(&self, buffer: &'a mut ReadBuffer) -> io::Result<(Offload, &'a mut [u8])> {
        let length = rustix::io::read(&self.device, &mut buffer.0[..])?;
        let (header, packet) = buffer.0[..length].split_at_mut_checked(HEADER_LEN).ok_or(io::ErrorKind::InvalidData)?;
        let header = <&[u8; HEADER_LEN]>::try_from(&*header).map_err(|_| io::ErrorKind::InvalidData)?;
        Ok((Offload::decode(header), packet))
    }

    /// Hands packets to applications.
    pub(crate) fn write(&self, group: &mut Group) -> io::Result<()> {
        const PARTS: usize = 72;
        let (offload, parts) = group.finish();
        let header = offload.encode();
        let mut slices = [IoSlice::new(&[]); PARTS];
        slices[0] = IoSlice::new(&header);
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let count = (1 + parts.len()).min(PARTS);
        rustix::io::writev(&self.device, &slices[..count])?;
        Ok(())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Room for what one read may yield.
pub(crate) struct ReadBuffer(Box<[u8]>);

impl ReadBuffer {
    pub(crate) fn new() -> Self {
        Self(vec![0; HEADER_LEN + SUPER_PACKET].into())
    }
}

/// The device was deleted under us.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADF | libc::EBADFD | libc::ENODEV))
}
