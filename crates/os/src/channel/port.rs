//! The guest's end of a virtio-serial port.
//!
//! The kernel's port device does not fit into an event loop: while no one holds the host's end it reads as ended, takes no
//! bytes, and polls as hung up without pause. So a thread passes the bytes to a socket pair, which does.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// How often to look whether the host came back.
const AWAY_INTERVAL: Duration = Duration::from_millis(100);
const PORTS: &str = "/sys/class/virtio-ports";

/// The guest's end of a port, as a byte stream that never ends: while no one holds the host's end it is merely silent.
#[derive(Debug)]
pub struct VirtioPort {
    socket: tokio::net::UnixStream,
}

/// Opens the port of this name, waiting for it to appear for as long as `patience`.
pub async fn open_virtio_port(name: &str, patience: Duration) -> io::Result<VirtioPort> {
    let deadline = Instant::now() + patience;
    let path = loop {
        if let Some(path) = find(name) {
            break path;
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(ErrorKind::NotFound, format!("no virtio-serial port named {name}")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let port = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    bridged(port)
}

fn find(name: &str) -> Option<PathBuf> {
    let entry = fs::read_dir(PORTS)
        .ok()?
        .flatten()
        .find(|entry| fs::read_to_string(entry.path().join("name")).is_ok_and(|found| found.trim_end() == name))?;
    Some(PathBuf::from("/dev").join(entry.file_name())).filter(|path| path.exists())
}

pub(super) fn bridged(port: File) -> io::Result<VirtioPort> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    let socket = tokio::net::UnixStream::from_std(theirs)?;
    std::thread::Builder::new().name("virtio-port".into()).spawn(move || {
        if let Err(error) = bridge(port, ours) {
            tracing::warn!(%error, "the port to the base OS broke");
        }
    })?;
    Ok(VirtioPort { socket })
}

/// Bytes on their way in one direction.
struct Chunk {
    bytes: Box<[u8]>,
    from: usize,
    to: usize,
}

enum Step {
    Moved,
    Blocked,
    Ended,
}

impl Chunk {
    fn new() -> Self {
        Self { bytes: vec![0; 64 << 10].into(), from: 0, to: 0 }
    }

    fn is_empty(&self) -> bool {
        self.from == self.to
    }

    fn fill(&mut self, source: &mut impl Read) -> io::Result<Step> {
        step(source.read(&mut self.bytes), |count| (self.from, self.to) = (0, count))
    }

    fn drain(&mut self, sink: &mut impl Write) -> io::Result<Step> {
        step(sink.write(&self.bytes[self.from..self.to]), |count| self.from += count)
    }
}

fn step(result: io::Result<usize>, moved: impl FnOnce(usize)) -> io::Result<Step> {
    match result {
        Ok(0) => Ok(Step::Ended),
        Ok(count) => {
            moved(count);
            Ok(Step::Moved)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(Step::Moved),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Step::Blocked),
        Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(Step::Ended),
        Err(error) => Err(error),
    }
}

/// Runs until the socket's other end is closed or the port is unplugged.
fn bridge(mut port: File, mut socket: UnixStream) -> io::Result<()> {
    let (mut inbound, mut outbound) = (Chunk::new(), Chunk::new());
    loop {
        let mut moved = false;
        let mut away = false;
        if inbound.is_empty() {
            match inbound.fill(&mut port)? {
                Step::Moved => moved = true,
                Step::Blocked => {}
                Step::Ended => away = true,
            }
        }
        if !inbound.is_empty() {
            match inbound.drain(&mut socket)? {
                Step::Moved => moved = true,
                Step::Blocked => {}
                Step::Ended => return Ok(()),
            }
        }
        if outbound.is_empty() {
            match outbound.fill(&mut socket)? {
                Step::Moved => moved = true,
                Step::Blocked => {}
                Step::Ended => return Ok(()),
            }
        }
        if !outbound.is_empty() {
            match outbound.drain(&mut port)? {
                Step::Moved => moved = true,
                Step::Blocked => {}
                Step::Ended => away = true,
            }
        }
        if !moved && !wait(port.as_fd(), socket.as_fd(), inbound.is_empty(), outbound.is_empty(), away)? {
            return Ok(());
        }
    }
}

/// Sleeps until something can move; `false` if the socket's other end is gone.
fn wait(port: BorrowedFd<'_>, socket: BorrowedFd<'_>, hungry: bool, sated: bool, away: bool) -> io::Result<bool> {
    let interest = |read, write| {
        let read = if read { PollFlags::IN } else { PollFlags::empty() };
        read | if write { PollFlags::OUT } else { PollFlags::empty() }
    };
    let mut fds = [
        PollFd::from_borrowed_fd(socket, interest(sated, !hungry)),
        PollFd::from_borrowed_fd(port, interest(hungry, !sated)),
    ];
    let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(AWAY_INTERVAL.subsec_nanos()) };
    let polled = if away { poll(&mut fds[..1], Some(&pause)) } else { poll(&mut fds, None) };
    match polled {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = fds[0].revents();
    // A port whose host has just left polls as ready for ever; the next read or write tells.
    if !away && fds[1].revents().contains(PollFlags::HUP) && !fds[1].revents().contains(PollFlags::IN) {
        std::thread::sleep(AWAY_INTERVAL);
    }
    Ok(gone.contains(PollFlags::IN) || !gone.intersects(PollFlags::HUP | PollFlags::ERR))
}

impl AsyncRead for VirtioPort {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for VirtioPort {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
