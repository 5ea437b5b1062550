//! A wire that takes its time: frames are read from one end, kept a while, and put out at the other. For kernels without netem.

use std::{
    collections::VecDeque,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::Command,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{LabError, net::Namespace};

/// INVARIANT: no more bytes than this are under way in one direction; what comes beyond is lost, as in any queue.
const UNDER_WAY: usize = 4 << 20;
/// The longest frame: offloads, which would make longer ones, are switched off.
const FRAME: usize = 1 << 14;
/// How often it is looked whether the wire is to be removed.
const LOOK: Duration = Duration::from_millis(50);
/// `SOL_PACKET` and `PACKET_IGNORE_OUTGOING` of <linux/if_packet.h>, which the C library does not name everywhere.
const SOL_PACKET: libc::c_int = 263;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
/// What makes frames that are no frames yet.
const OFFLOADS: [&str; 6] = ["tso", "gso", "gro", "tx-udp-segmentation", "tx", "rx"];

/// A delay on a wire, until it is dropped.
#[derive(Debug)]
pub struct Delay {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
    internet: Namespace,
    port: String,
    outer: Namespace,
    device: String,
    destination: String,
}

impl Delay {
    /// Delays what goes through `port` of the internet, each way. The port leads to `device` of `outer`, whose address is
    /// `destination`.
    pub(crate) fn lay(
        internet: &Namespace,
        port: &str,
        (outer, device): (&Namespace, &str),
        destination: &str,
        delay: Duration,
    ) -> Result<Self, LabError> {
        // The internet's own end from now on, and the far one of the forwarder.
        let (near, far) = (format!("near-{port}"), format!("far-{port}"));
        let mut this = Self {
            stop: Arc::default(),
            threads: Vec::new(),
            internet: internet.clone(),
            port: port.to_owned(),
            outer: outer.clone(),
            device: device.to_owned(),
            destination: destination.to_owned(),
        };
        internet.ip(&["link", "add", &near, "type", "veth", "peer", "name", &far])?;
        for (namespace, device) in [(internet, near.as_str()), (internet, &far), (internet, port), (outer, device)] {
            plain_frames(namespace, device)?;
            namespace.ip(&["link", "set", device, "up"])?;
        }
        // What the forwarder has read is not for the system to take as well.
        internet.nft(&format!(
            "table netdev {table} {{\n chain near {{ type filter hook ingress device \"{port}\" priority 0; policy drop; }}\n \
             chain far {{ type filter hook ingress device \"{far}\" priority 0; policy drop; }}\n}}\n",
            table = this.table()
        ))?;
        let open = |device: &str| {
            let device = device.to_owned();
            internet.enter(move || frames(&device))
        };
        for (from, to) in [(open(port)?, open(&far)?), (open(&far)?, open(port)?)] {
            let stop = this.stop.clone();
            let thread = thread::Builder::new().name("lab-delay".into());
            let forwarding = thread.spawn(move || forward(&from, &to, delay, &stop));
            this.threads.push(forwarding.map_err(LabError::io("start a thread"))?);
        }
        internet.ip(&["route", "replace", destination, "dev", &near])?;
        this.forget_next_hop()?;
        Ok(this)
    }

    /// It has another hardware address now.
    fn forget_next_hop(&self) -> Result<(), LabError> {
        self.outer.ip(&["neighbour", "flush", "dev", &self.device])
    }

    fn table(&self) -> String {
        format!("delay_{}", self.port)
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // What fails goes with the namespace.
        let _ = self.internet.ip(&["route", "replace", &self.destination, "dev", &self.port]);
        let _ = self.internet.ip(&["link", "delete", &format!("near-{}", self.port)]);
        let _ = self.internet.nft(&format!("delete table netdev {}\n", self.table()));
        let _ = self.forget_next_hop();
    }
}

fn plain_frames(namespace: &Namespace, device: &str) -> Result<(), LabError> {
    let mut command = Command::new("ethtool");
    command.args(["-K", device]).args(OFFLOADS.map(|feature| [feature, "off"]).as_flattened());
    namespace.inside(&mut command)?;
    let output = command.output().map_err(LabError::io("run ethtool"))?;
    if output.status.success() {
        return Ok(());
    }
    let output_text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(LabError::Command { command: "ethtool".into(), status: output.status.to_string(), output: output_text })
}

/// A socket for whole frames of a device in this thread's network (packet(7)).
fn frames(device: &str) -> io::Result<OwnedFd> {
    let every = (libc::ETH_P_ALL as u16).to_be();
    let name = std::ffi::CString::new(device)?;
    // SAFETY: plain calls; the name ends with zero, structures and their sizes outlive the calls, and the descriptor is
    // owned before anything can fail.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // With no protocol nothing is heard before it is bound.
        let fd = libc::socket(libc::AF_PACKET, kind, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let on: libc::c_int = 1;
        let size = mem::size_of_val(&on) as libc::socklen_t;
        if libc::setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, ptr::from_ref(&on).cast(), size) < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut address: libc::sockaddr_ll = mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as libc::c_int;
        let size = mem::size_of_val(&address) as libc::socklen_t;
        if address.sll_ifindex == 0 || libc::bind(fd, ptr::from_ref(&address).cast(), size) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

fn forward(from: &OwnedFd, to: &OwnedFd, delay: Duration, stop: &AtomicBool) {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut bytes = 0;
    let mut buffer = vec![0; FRAME];
    while !stop.load(Ordering::Relaxed) {
        let wait = under_way.front().map_or(LOOK, |(due, _)| due.saturating_duration_since(Instant::now()).min(LOOK));
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        // An interruption is no reason to end.
        let _ = poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&wait));
        while let Ok(length) = rustix::io::read(from, &mut buffer[..]) {
            if bytes + length <= UNDER_WAY {
                bytes += length;
                under_way.push_back((Instant::now() + delay, buffer[..length].to_vec()));
            }
        }
        while under_way.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            let Some((_, frame)) = under_way.pop_front() else { break };
            bytes -= frame.len();
            // What the other end does not take is lost.
            // SAFETY: the frame outlives the call, which only reads it.
            let _ = unsafe { libc::send(to.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_DONTWAIT) };
        }
    }
}
