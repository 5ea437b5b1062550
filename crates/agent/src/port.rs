//! The virtio-serial port, and the loop that serves it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clan_wire::agent::PORT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    log,
    machine::{Guest, Machine},
    serve::Server,
};

/// While no one holds the host's end, the port reads as ended and polls as ready without pause.
const AWAY_PAUSE: Duration = Duration::from_millis(50);
/// Right after the manager has gone, or this guest went on from a saved state, a manager comes soon.
const SOON_PAUSE: Duration = Duration::from_millis(4);
const SOON: Duration = Duration::from_secs(1);
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Serves the manager for ever.
pub(crate) fn serve(problems: Vec<String>) -> ExitCode {
    log::open();
    let mut server = Server::new(nonce(), Guest, problems, Instant::now());
    let mut last = String::new();
    loop {
        let end = match open() {
            Ok(port) => transfer(&port, &mut server),
            Err(error) => Err(error),
        };
        // One line per kind of failure, not one per attempt.
        if let Err(error) = end
            && std::mem::replace(&mut last, error.to_string()) != last
        {
            log::info(&format!("port {PORT}: {last}"));
        }
        thread::sleep(RETRY_PAUSE);
    }
}

fn nonce() -> u64 {
    let mut bytes = [0; 8];
    // Never blocks, unlike the system call this early. A poor number only weakens the detection of a restart.
    match File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => Guest.uptime_ms(),
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

/// Moves bytes until the port is gone.
fn transfer<M: Machine>(mut port: &File, server: &mut Server<M>) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut away_since: Option<Instant> = None;
    loop {
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
            wait(port, waiting, server.next_timeout())?;
        }
    }
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
