//! A clean place to run the executable in, and a manager that gives canned answers.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
};

use clan_types::{ClanId, InviteLink, InviteSecret, MachineId, PeerAddr, Purpose};
use data_encoding::BASE64URL_NOPAD;
use snapbox::{
    Assert, Redactions,
    cmd::{Command, cargo_bin},
};

/// A well-formed invitation link.
pub(crate) fn link() -> String {
    let peer = PeerAddr { machine: MachineId::from_bytes([3; 32]), addrs: vec!["192.0.2.1:41640".parse().unwrap()] };
    let (clan, secret) = (ClanId::from_bytes([1; 32]), InviteSecret::from_bytes([2; 32]));
    InviteLink { purpose: Purpose::Join, clan, secret, peers: vec![peer], relays: Vec::new() }.to_string()
}

/// A link that is whole, but of another format version.
pub(crate) fn link_of_version(version: u8) -> String {
    let mut bytes = vec![version, 1, 2, 3];
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(&checksum.as_bytes()[..4]);
    format!("clan://join/{}", BASE64URL_NOPAD.encode(&bytes))
}

/// A person's computer: an empty home, no terminal, no desktop.
pub(crate) struct Computer {
    home: tempfile::TempDir,
}

impl Computer {
    pub(crate) fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// `clan` with nothing in its environment but a home, a person and a data folder.
    pub(crate) fn clan(&self, args: &[&str]) -> Command {
        let mut redactions = Redactions::new();
        redactions.insert("[DATA]", self.data()).unwrap();
        Command::new(cargo_bin!("clan"))
            .with_assert(Assert::new().action_env(snapbox::assert::DEFAULT_ACTION_ENV).redact_with(redactions))
            .env_clear()
            .env("HOME", self.home.path())
            .env("USER", "anna")
            .env("CLAN_DATA", self.data())
            .args(args)
    }

    /// A manager that answers each path, method in front, with a status and a body; any other with 404.
    pub(crate) fn manager(&self, answers: &[(&'static str, u16, String)]) -> Asked {
        let run = self.data().join("run");
        std::fs::create_dir_all(&run).unwrap();
        let listener = UnixListener::bind(run.join("manager.sock")).unwrap();
        let asked = Asked::default();
        let (log, answers) = (asked.clone(), answers.to_vec());
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &answers, &log);
            }
        });
        asked
    }

    /// A manager that accepts and never says a word.
    pub(crate) fn silent_manager(&self) -> UnixListener {
        let run = self.data().join("run");
        std::fs::create_dir_all(&run).unwrap();
        UnixListener::bind(run.join("manager.sock")).unwrap()
    }
}

/// What a canned manager was asked: method, path and body of each request.
#[derive(Clone, Default)]
pub(crate) struct Asked(Arc<Mutex<Vec<String>>>);

impl Asked {
    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

fn answer(mut stream: UnixStream, answers: &[(&'static str, u16, String)], log: &Asked) {
    let mut request = Vec::new();
    let mut chunk = [0u8; 4096];
    let body_at = loop {
        if let Some(at) = request.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        match stream.read(&mut chunk).unwrap() {
            0 => return,
            n => request.extend_from_slice(&chunk[..n]),
        }
    };
    let head = String::from_utf8(request[..body_at].to_vec()).unwrap();
    let length = head
        .lines()
        .find_map(|l| {
            l.to_ascii_lowercase().strip_prefix("content-length:").map(|v| v.trim().parse::<usize>().unwrap())
        })
        .unwrap_or(0);
    while request.len() < body_at + length {
        let n = stream.read(&mut chunk).unwrap();
        request.extend_from_slice(&chunk[..n]);
    }
    let asked = head.lines().next().unwrap().trim_end_matches(" HTTP/1.1").to_owned();
    let body = String::from_utf8(request[body_at..].to_vec()).unwrap();
    log.0.lock().unwrap().push(format!("{asked} {body}").trim_end().to_owned());
    let missing = (404, r#"{"type":"urn:clan:problem:not_found","code":"not_found","message":"there is no such path","hints":[],"status":404}"#.to_owned());
    let (status, body) =
        answers.iter().find(|(path, ..)| *path == asked).map_or(missing, |(_, status, body)| (*status, body.clone()));
    let _ = write!(stream, "HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
}
