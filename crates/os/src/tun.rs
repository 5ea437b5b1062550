//! A TUN device with segmentation offload: the kernel hands over and takes super-packets, so that one system call moves
//! many packets. [`clan_tunnel::offload`] splits and joins them.

use std::{
    collections::BTreeSet,
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use clan_tunnel::offload::{Group, HEADER_LEN, Offload};
use rtnetlink::{RouteMessageBuilder, packet_route::route::RouteScope};
use tokio::sync::Mutex;
use tracing::{debug, warn};
use tun_rs::SyncDevice;

const CLAN_PREFIX: u8 = 48;
const HOST_PREFIX: u8 = 32;
/// The longest packet that the kernel hands over.
const SUPER_PACKET: usize = 65_536;

/// A TUN device with its addresses and the routes to the clan's machines. Dropping it removes the device, and with it
/// addresses and routes.
pub struct Tun {
    device: SyncDevice,
    name: String,
    mtu: u16,
    address: Ipv6Addr,
    /// The second address; 0: none.
    ipv4: AtomicU32,
    seconds: Mutex<Seconds>,
}

/// Second addresses, as the kernel knows them.
#[derive(Default)]
struct Seconds {
    own: Option<Ipv4Addr>,
    others: BTreeSet<Ipv4Addr>,
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
        Ok(Self { device, name, mtu, address, ipv4: AtomicU32::new(0), seconds: Mutex::default() })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine's mesh address.
    pub fn address(&self) -> Ipv6Addr {
        self.address
    }

    /// Gives the device a second address, or takes it away, and leads the second addresses of others to it.
    ///
    /// One by one: every clan has its addresses from 100.64.0.0/10, so that a computer in two clans, or behind a carrier that
    /// numbers its network like this, has use for all of it. Where two lead to one address the first keeps it.
    pub(crate) async fn set_ipv4(&self, own: Option<Ipv4Addr>, others: &BTreeSet<Ipv4Addr>) -> io::Result<()> {
        let mut known = self.seconds.lock().await;
        if known.own != own {
            if let Some(had) = known.own.take() {
                // The kernel takes away what names it as the source, too.
                known.others.clear();
                self.ipv4.store(0, Ordering::Relaxed);
                self.device.remove_address(had.into())?;
            }
            if let Some(address) = own {
                self.device.add_address_v4(address, HOST_PREFIX)?;
                self.ipv4.store(address.to_bits(), Ordering::Relaxed);
                known.own = own;
            }
        }
        let Some(own) = own else { return Ok(()) };
        if known.others == *others {
            return Ok(());
        }
        let index = self.device.if_index()?;
        let (connection, kernel, _) = rtnetlink::new_connection()?;
        // Ends by itself when the handle is dropped.
        tokio::spawn(connection);
        let route = |to: Ipv4Addr| {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, HOST_PREFIX);
            route.output_interface(index).pref_source(own).scope(RouteScope::Link).build()
        };
        let gone: Vec<Ipv4Addr> = known.others.difference(others).copied().collect();
        for address in gone {
            known.others.remove(&address);
            if let Err(error) = kernel.route().del(route(address)).execute().await {
                debug!(%error, %address, "a route was gone already");
            }
        }
        let new: Vec<Ipv4Addr> = others.difference(&known.others).copied().collect();
        for address in new {
            match kernel.route().add(route(address)).execute().await {
                Ok(()) => drop(known.others.insert(address)),
                Err(error) => warn!(%error, device = %self.name, %address, "nothing leads to this IPv4 address here"),
            }
        }
        Ok(())
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
