//! TCP streams between two computers of a clan: one that says how long it stood still, and one that carries a heap of bytes.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{LabError, nat::Site};

/// What is no service of a clan takes a rule: this one lets the streams in.
pub(super) const PORTS: &str = "tcp/7000-7099";
/// How often something is written into an exchange.
const EVERY: Duration = Duration::from_millis(20);
const CONNECT: Duration = Duration::from_secs(20);
/// How often threads look whether they shall end.
const LOOK: Duration = Duration::from_millis(100);
/// Each number that goes round.
const NUMBER: usize = 8;

/// One end writes a number every 20 ms, the other sends it back; until it is dropped.
#[derive(Debug)]
pub(super) struct Exchange {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    written: Vec<Instant>,
    back: Vec<Instant>,
}

impl Exchange {
    /// Connects, on a port of its own.
    ///
    /// # Errors
    /// When the stream does not come about.
    pub(super) fn start(from: &Site, to: &Site, address: Ipv6Addr, port: u16) -> Result<Self, LabError> {
        let (near, far) = connect(from, to, address, port)?;
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let writing = near.try_clone().map_err(LabError::io("share a stream"))?;
        let threads = vec![
            ended(&stop, far, echo),
            ended(&stop, writing, {
                let seen = seen.clone();
                move |stop, stream| write(stop, stream, &seen)
            }),
            ended(&stop, near, {
                let seen = seen.clone();
                move |stop, stream| read(stop, stream, &seen)
            }),
        ];
        Ok(Self { seen, stop, threads })
    }

    /// Whether something that was written after `since` has come back.
    pub(super) fn goes_on_after(&self, since: Instant) -> bool {
        let seen = self.seen();
        let first = seen.written.partition_point(|at| *at < since);
        seen.back.len() > first
    }

    /// The longest time without an answer that touches what comes after `since`, less the usual time between two.
    pub(super) fn longest_pause(&self, since: Instant) -> Duration {
        let seen = self.seen();
        let first = seen.back.partition_point(|at| *at < since).saturating_sub(1);
        let times = seen.back.get(first..).unwrap_or_default();
        let still = times.last().map(Instant::elapsed);
        let pauses = times.windows(2).map(|two| two[1] - two[0]);
        pauses.chain(still).max().unwrap_or_default().saturating_sub(EVERY)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Sends `bytes` bytes from one computer to the other, which compares them, and says how long it took.
///
/// # Errors
/// When they do not arrive in time, or not as they were sent.
pub(super) fn carry(
    from: &Site,
    to: &Site,
    address: Ipv6Addr,
    port: u16,
    bytes: usize,
    limit: Duration,
) -> Result<Duration, LabError> {
    let (mut near, mut far) = connect(from, to, address, port)?;
    let began = Instant::now();
    let sent: Vec<u8> = (0..bytes).map(|at| (at.wrapping_mul(0x9E37_79B1) >> 24) as u8).collect();
    let expected = sent.clone();
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(limit)).map_err(LabError::io("limit a stream"))?;
        stream.set_write_timeout(Some(limit)).map_err(LabError::io("limit a stream"))?;
    }
    let sending = thread::spawn(move || near.write_all(&sent).map(|()| near));
    let mut received = vec![0; bytes];
    let failed = |source: io::Error| {
        LabError::Promise(format!("{bytes} bytes from {} to {} do not arrive: {source}", from.name(), to.name()))
    };
    far.read_exact(&mut received).map_err(failed)?;
    match sending.join() {
        Ok(sent) => drop(sent.map_err(failed)?),
        Err(_) => return Err(LabError::Promise("a thread panicked".into())),
    }
    if received != expected {
        return Err(LabError::Promise(format!("what {} received is not what {} sent", to.name(), from.name())));
    }
    Ok(began.elapsed())
}

/// Both ends of a stream between two computers.
fn connect(from: &Site, to: &Site, address: Ipv6Addr, port: u16) -> Result<(TcpStream, TcpStream), LabError> {
    let listener = to.enter(move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))?;
    let near = from.enter(move || TcpStream::connect_timeout(&(address, port).into(), CONNECT))?;
    let (far, _) = listener.accept().map_err(LabError::io("accept a stream"))?;
    for stream in [&near, &far] {
        stream.set_nodelay(true).map_err(LabError::io("hurry a stream"))?;
    }
    Ok((near, far))
}

fn ended(
    stop: &Arc<AtomicBool>,
    stream: TcpStream,
    work: impl FnOnce(&AtomicBool, TcpStream) -> io::Result<()> + Send + 'static,
) -> JoinHandle<()> {
    let stop = stop.clone();
    // A stream that ends early is told by what does not come back.
    thread::spawn(move || drop(work(&stop, stream)))
}

fn echo(stop: &AtomicBool, mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(LOOK))?;
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => stream.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(error) if is_wait(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write(stop: &AtomicBool, mut stream: TcpStream, seen: &Mutex<Seen>) -> io::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        seen.lock().unwrap_or_else(PoisonError::into_inner).written.push(Instant::now());
        stream.write_all(&[7; NUMBER])?;
        thread::sleep(EVERY);
    }
    Ok(())
}

fn read(stop: &AtomicBool, mut stream: TcpStream, seen: &Mutex<Seen>) -> io::Result<()> {
    stream.set_read_timeout(Some(LOOK))?;
    let (mut buffer, mut bytes) = ([0; 4096], 0);
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                bytes += count;
                let now = Instant::now();
                seen.lock().unwrap_or_else(PoisonError::into_inner).back.resize(bytes / NUMBER, now);
            }
            Err(error) if is_wait(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_wait(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
