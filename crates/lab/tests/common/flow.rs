//! A TCP stream between two machines.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clan_lab::{LabError, fleet::Fleet, story::until};

const LIMIT: Duration = Duration::from_secs(30);
/// A stream that carried nothing for so long is dead: a living one never pauses for so long on an idle wire.
const DEAD: Duration = Duration::from_secs(5);

/// A TCP stream through the mesh that is written to without pause.
pub(crate) struct Flow {
    heard: Arc<Mutex<Heard>>,
    stop: Arc<AtomicBool>,
}

#[derive(Clone, Copy)]
struct Heard {
    last: Instant,
    bytes: u64,
    pause: Duration,
}

impl Flow {
    /// Opens it, and returns once it flows.
    pub(crate) fn start(fleet: &mut Fleet, from: &str, to: &str, port: u16) -> Result<Self, LabError> {
        let address = address_of(fleet, from, to)?;
        let listener = fleet.world().site(to).enter(move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))?;
        let sender = fleet.world().site(from).enter(move || TcpStream::connect((address, port)))?;
        let (receiver, _) = listener.accept().map_err(|source| LabError::Io { what: "accept".into(), source })?;
        let heard = Heard { last: Instant::now(), bytes: 0, pause: Duration::ZERO };
        let flow = Self { heard: Arc::new(Mutex::new(heard)), stop: Arc::default() };
        let (heard, stop) = (flow.heard.clone(), flow.stop.clone());
        thread::spawn(move || {
            let (mut receiver, mut buffer) = (receiver, vec![0; 1 << 16]);
            receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            while !stop.load(Ordering::Relaxed) {
                match receiver.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(bytes) => {
                        let mut heard = heard.lock().unwrap();
                        heard.pause = heard.pause.max(heard.last.elapsed());
                        heard.last = Instant::now();
                        heard.bytes += bytes as u64;
                    }
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                    Err(_) => return,
                }
            }
        });
        let stop = flow.stop.clone();
        thread::spawn(move || {
            let mut sender = sender;
            sender.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
            let chunk = vec![7; 1 << 14];
            while !stop.load(Ordering::Relaxed) {
                match sender.write(&chunk) {
                    Ok(_) => thread::sleep(Duration::from_millis(5)),
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                    Err(_) => return,
                }
            }
        });
        flow.flows()?;
        Ok(flow)
    }

    /// Returns once more has come.
    pub(crate) fn flows(&self) -> Result<(), LabError> {
        let before = self.heard().bytes;
        until(LIMIT, "the stream flowing", || Ok((self.heard().bytes > before).then_some(())))
    }

    /// When the last byte came, once none has for long.
    pub(crate) fn died(&self) -> Option<Instant> {
        let last = self.heard().last;
        (last.elapsed() > DEAD).then_some(last)
    }

    /// How many bytes came, and the longest pause between two of them, since this was last asked.
    pub(crate) fn since(&self) -> (u64, Duration) {
        let mut heard = self.heard();
        let pause = heard.pause.max(heard.last.elapsed());
        heard.pause = Duration::ZERO;
        (std::mem::take(&mut heard.bytes), pause)
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn address_of(fleet: &mut Fleet, asked: &str, name: &str) -> Result<Ipv6Addr, LabError> {
    let machines = fleet.computer(asked).clan_json(&["machines"])?;
    let all = machines.as_array().map(Vec::as_slice).unwrap_or_default();
    let address = all.iter().find(|m| m["name"] == name).and_then(|m| m["address"].as_str()?.parse().ok());
    address.ok_or_else(|| LabError::Promise(format!("{asked} knows no address of {name}")))
}
