//! The virtio-serial port, and the loop that serves it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use clan_wire::agent::PORT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    log,
    machine::{Guest, Machine},
    serve::Server,
    start::Start,
};

/// While no one holds the host's end, the port reads as ended and polls as ready without pause.
const AWAY_PAUSE: Duration = Duration::from_millis(50);
/// Right after the manager has gone, or this guest went on from a saved state, a manager comes soon. While the guest is
/// started, whether that is over is looked for as often.
const SOON_PAUSE: Duration = Duration::from_millis(4);
const SOON: Duration = Duration::from_secs(1);
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// The conversation with the manager. It goes on in a copy of this process.
pub(crate) struct Conversation {
    server: Server<Guest>,
    start: Arc<Start>,
    port: Option<File>,
    /// One line per kind of failure is logged, not one per attempt.
    last: String,
}

impl Conversation {
    pub(crate) fn new(start: Arc<Start>) -> Self {
        let server = Server::new(nonce(), Guest::new(start.clone()), Instant::now());
        Self { server, start, port: None, last: String::new() }
    }

    /// Serves the manager while the guest is started; gives the conversation back when that is over.
    pub(crate) fn while_starting(mut self) -> Self {
        while !self.start.is_over() {
            self.attempt(true);
        }
        self
    }

    /// Serves the manager for ever.
    pub(crate) fn for_ever(mut self) -> ! {
        loop {
            self.attempt(false);
        }
    }

    /// Until the port is gone, or the start of the guest is over.
    fn attempt(&mut self, starting: bool) {
        let over = || starting && self.start.is_over();
        let opened = self.port.take().map_or_else(open, Ok);
        let end = opened.and_then(|port| {
            transfer(&port, &mut self.server, starting, over)?;
            self.port = Some(port);
            Ok(())
        });
        if let Err(error) = end {
            if std::mem::replace(&mut self.last, error.to_string()) != self.last {
                log::info(&format!("port {PORT}: {}", self.last));
            }
            thread::sleep(if starting { SOON_PAUSE } else { RETRY_PAUSE });
        }
    }
}

fn nonce() -> u64 {
    let mut bytes = [0; 8];
    // Never blocks, unlike the system call this early. A poor number only weakens the detection of a restart.
    match File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => std::process::id().into(),
    }
}

fn open() -> io::Result<File> {
    let ports = fs::read_dir("/sys/class/virtio-ports")?;
    let port = ports
        .flatten()
        .find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim_end() == PORT))
        .ok_or_else(|| io::Error::new(ErrorKind::NotFound, "not there"))?;
    let path = PathBuf::from("/dev").join(port.file_name());
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)
}

/// Moves bytes until the port is gone, which is an error, or until it is over.
fn transfer<M: Machine>(
    mut port: &File,
    server: &mut Server<M>,
    starting: bool,
    over: impl Fn() -> bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut away_since: Option<Instant> = None;
    while !over() {
        server.handle_timeout(Instant::now());
        let mut moved = false;
        let mut away = false;
        match port.read(&mut buffer) {
            Ok(0) => away = true,
            Ok(count) => {
                server.handle_bytes(&buffer[..count]);
                moved = true;
            }
            Err(error) => pass(error, &mut away)?,
        }
        let outbound = server.outbound();
        let waiting = !outbound.is_empty();
        if waiting {
            match port.write(outbound) {
                Ok(0) => away = true,
                Ok(count) => {
                    server.written(count);
                    moved = true;
                }
                Err(error) => pass(error, &mut away)?,
            }
        }
        if away {
            let since = away_since.get_or_insert_with(Instant::now);
            thread::sleep(if since.elapsed() < SOON { SOON_PAUSE } else { AWAY_PAUSE });
            continue;
        }
        away_since = None;
        if !moved {
            let soon = starting.then(|| Instant::now() + SOON_PAUSE);
            wait(port, waiting, server.next_timeout().into_iter().chain(soon).min())?;
        }
    }
    Ok(())
}

/// Sorts out which errors are none.
fn pass(error: io::Error, away: &mut bool) -> io::Result<()> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(()),
        ErrorKind::BrokenPipe => {
            *away = true;
            Ok(())
        }
        _ => Err(error),
    }
}

fn wait(port: &File, writable: bool, until: Option<Instant>) -> io::Result<()> {
    let interest = if writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut [PollFd::new(port, interest)], timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
