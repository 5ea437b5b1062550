//! Answers requests: bytes in, bytes out.

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use clan_wire::{
    agent::{AgentRequest, AgentResponse, MAX_MESSAGE},
    codec,
    mux::{Event, Mux, Role, StreamId},
};

use crate::{log, machine::Machine};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// All problems together fit into one answer.
const MAX_PROBLEMS: usize = 50;
const MAX_PROBLEM: usize = 500;

/// The agent's side of the port.
pub(crate) struct Server<M> {
    mux: Mux,
    /// Requests of which a part has arrived.
    requests: HashMap<StreamId, Vec<u8>>,
    outbound: VecDeque<u8>,
    /// To be done once the answer is on its way.
    pending: Option<AgentRequest>,
    machine: M,
    /// Of this program itself.
    problems: Vec<String>,
}

impl<M: Machine> Server<M> {
    pub(crate) fn new(nonce: u64, machine: M, now: Instant) -> Self {
        let mux = Mux::new(Role::Guest, nonce, VERSION, now);
        Self { mux, requests: HashMap::new(), outbound: VecDeque::new(), pending: None, machine, problems: Vec::new() }
    }

    pub(crate) fn handle_bytes(&mut self, bytes: &[u8]) {
        self.mux.handle_bytes(bytes);
        while let Some(event) = self.mux.poll_event() {
            self.handle_event(event);
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.mux.handle_timeout(now);
        self.machine.handle_timeout(now);
    }

    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.mux.next_timeout().into_iter().chain(self.machine.next_timeout()).min()
    }

    /// Bytes to write; empty when there is nothing to say.
    pub(crate) fn outbound(&mut self) -> &[u8] {
        if self.outbound.is_empty()
            && let Some(frame) = self.mux.poll_transmit()
        {
            self.outbound.extend(frame);
        }
        self.outbound.as_slices().0
    }

    /// So many of them were written.
    pub(crate) fn written(&mut self, count: usize) {
        self.outbound.drain(..count.min(self.outbound.len()));
        if self.pending.is_some() && self.outbound().is_empty() {
            self.do_pending();
        }
    }

    fn handle_event(&mut self, event: Event) {
        match event {
            Event::Started { peer_version } => log::info(&format!("the manager is connected, version {peer_version}")),
            Event::Restarted => self.requests.clear(),
            Event::Incompatible { protocol } => log::error(&format!("the manager speaks version {protocol}")),
            Event::Opened(id) => {
                self.requests.insert(id, Vec::new());
            }
            Event::Data(id, data) => self.handle_data(id, &data),
            Event::Fin(id) | Event::Reset(id) => {
                // An unfinished request is none.
                if self.requests.remove(&id).is_some() {
                    self.mux.reset(id);
                }
            }
            Event::Writable(_) | Event::Pong(_) => {}
        }
    }

    fn handle_data(&mut self, id: StreamId, data: &[u8]) {
        self.mux.consumed(id, data.len());
        let Some(request) = self.requests.get_mut(&id) else { return };
        request.extend_from_slice(data);
        let Some((prefix, body)) = request.split_first_chunk() else { return };
        let decoded = match codec::body_length(*prefix, MAX_MESSAGE) {
            Ok(length) if body.len() < length => return,
            Ok(length) => codec::decode::<AgentRequest>(&body[..length]),
            Err(error) => Err(error),
        };
        self.requests.remove(&id);
        let answer = decoded.and_then(|request| codec::encode(&self.answer(request), MAX_MESSAGE));
        match answer {
            // An answer is far smaller than what a new stream takes at once.
            Ok(bytes) if self.mux.send(id, &bytes) == bytes.len() => {
                self.mux.fin(id);
                self.mux.release(id);
            }
            Ok(_) => self.mux.reset(id),
            Err(error) => {
                log::error(&format!("not a request: {error}"));
                self.mux.reset(id);
            }
        }
    }

    fn answer(&mut self, request: AgentRequest) -> AgentResponse {
        match request {
            AgentRequest::Ping => AgentResponse::Pong {
                version: VERSION.to_owned(),
                uptime_ms: self.machine.uptime_ms(),
                boot_id: self.machine.boot_id(),
                problems: self.problems(),
            },
            AgentRequest::SetClock(now) => match self.machine.set_clock(now) {
                Ok(()) => AgentResponse::Done,
                Err(error) => AgentResponse::Failed(format!("the clock was not set: {error}")),
            },
            AgentRequest::Seal => match self.machine.seal() {
                Ok(()) => AgentResponse::Done,
                Err(error) => AgentResponse::Failed(error.to_string()),
            },
            AgentRequest::Sync => {
                self.machine.sync();
                AgentResponse::Done
            }
            AgentRequest::GrowDisk(least) => match self.machine.grow_disk(least.as_bytes()) {
                Ok(()) => AgentResponse::Done,
                Err(error) => AgentResponse::Failed(format!("the file system does not grow: {error}")),
            },
            // The clock first: what is made anew has the right time.
            AgentRequest::Renew(renewal) => {
                match self.machine.set_clock(renewal.now).and_then(|()| self.machine.renew(&renewal.entropy)) {
                    Ok(()) => AgentResponse::Done,
                    Err(error) => AgentResponse::Failed(format!("the guest was not renewed: {error}")),
                }
            }
            AgentRequest::PowerOff | AgentRequest::PowerOffNow => {
                self.pending = Some(request);
                AgentResponse::Done
            }
        }
    }

    fn problems(&self) -> Vec<String> {
        let all = self.problems.iter().cloned().chain(self.machine.problems());
        all.take(MAX_PROBLEMS).map(|line| line.chars().take(MAX_PROBLEM).collect()).collect()
    }

    fn do_pending(&mut self) {
        let done = match self.pending.take() {
            Some(AgentRequest::PowerOff) => {
                log::info("powering off");
                self.machine.power_off()
            }
            Some(AgentRequest::PowerOffNow) => self.machine.power_off_now(),
            _ => return,
        };
        if let Err(error) = done {
            let problem = format!("the guest does not power off: {error}");
            log::error(&problem);
            self.problems.truncate(MAX_PROBLEMS - 1);
            self.problems.push(problem);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use clan_types::{ByteSize, Timestamp};
    use clan_wire::agent::Renewal;

    use super::*;

    #[derive(Default)]
    struct Fake {
        problems: Vec<String>,
        due: Option<Instant>,
        clock: Option<Timestamp>,
        renewed: Vec<Vec<u8>>,
        off: u32,
        off_now: u32,
    }

    impl Machine for Fake {
        fn uptime_ms(&self) -> u64 {
            1234
        }

        fn boot_id(&self) -> String {
            "boot".into()
        }

        fn problems(&self) -> Vec<String> {
            self.problems.clone()
        }

        fn next_timeout(&self) -> Option<Instant> {
            self.due
        }

        fn handle_timeout(&mut self, now: Instant) {
            self.due = self.due.filter(|due| *due > now);
        }

        fn set_clock(&mut self, now: Timestamp) -> io::Result<()> {
            self.clock = Some(now);
            Ok(())
        }

        fn sync(&mut self) {}

        fn grow_disk(&mut self, _least: u64) -> io::Result<()> {
            Err(io::Error::other("no room"))
        }

        fn seal(&mut self) -> io::Result<()> {
            Err(io::Error::other("not yet"))
        }

        fn renew(&mut self, entropy: &[u8]) -> io::Result<()> {
            self.renewed.push(entropy.to_vec());
            Ok(())
        }

        fn power_off(&mut self) -> io::Result<()> {
            self.off += 1;
            Ok(())
        }

        fn power_off_now(&mut self) -> io::Result<()> {
            self.off_now += 1;
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }

    /// An agent and the manager that talks to it.
    struct Pair {
        server: Server<Fake>,
        host: Mux,
    }

    impl Pair {
        fn new(problems: &[&str]) -> Self {
            let now = Instant::now();
            let problems = problems.iter().map(|text| (*text).to_owned()).collect();
            let server = Server::new(1, Fake { problems, ..Fake::default() }, now);
            let mut pair = Self { server, host: Mux::new(Role::Host, 2, "manager", now) };
            assert!(matches!(pair.settle()[..], [Event::Started { .. }]));
            pair
        }

        fn settle(&mut self) -> Vec<Event> {
            loop {
                let mut moved = false;
                while let Some(bytes) = self.host.poll_transmit() {
                    self.server.handle_bytes(&bytes);
                    moved = true;
                }
                while !self.server.outbound().is_empty() {
                    let bytes: Vec<u8> = self.server.outbound().iter().take(1000).copied().collect();
                    self.host.handle_bytes(&bytes);
                    self.server.written(bytes.len());
                    moved = true;
                }
                if !moved {
                    return std::iter::from_fn(|| self.host.poll_event()).collect();
                }
            }
        }

        fn ask(&mut self, request: &AgentRequest) -> AgentResponse {
            let bytes = codec::encode(request, MAX_MESSAGE).unwrap();
            let id = self.host.open().unwrap();
            for byte in bytes {
                self.host.send(id, &[byte]);
            }
            self.host.fin(id);
            match &self.settle()[..] {
                [Event::Data(_, data), Event::Fin(_)] => codec::decode(&data[codec::PREFIX..]).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_ping_tells_what_went_wrong() {
        let mut pair = Pair::new(&["no disk"]);
        let expected = AgentResponse::Pong {
            version: VERSION.into(),
            uptime_ms: 1234,
            boot_id: "boot".into(),
            problems: vec!["no disk".into()],
        };
        for _ in 0..200 {
            assert_eq!(pair.ask(&AgentRequest::Ping), expected);
        }
    }

    #[test]
    fn problems_that_come_later_are_told_and_bounded() {
        let mut pair = Pair::new(&[]);
        pair.server.machine.problems = vec!["é".repeat(MAX_PROBLEM + 1); MAX_PROBLEMS + 1];
        let AgentResponse::Pong { problems, .. } = pair.ask(&AgentRequest::Ping) else { panic!("no answer") };
        assert_eq!(problems.len(), MAX_PROBLEMS);
        assert!(problems.iter().all(|problem| problem.chars().count() == MAX_PROBLEM));
    }

    #[test]
    fn what_the_machine_does_later_is_waited_for() {
        let mut pair = Pair::new(&[]);
        let due = Instant::now() + std::time::Duration::from_millis(1);
        pair.server.machine.due = Some(due);
        assert!(pair.server.next_timeout().is_some_and(|next| next <= due));
        pair.server.handle_timeout(due);
        assert_eq!(pair.server.machine.due, None);
    }

    #[test]
    fn the_clock_is_set() {
        let mut pair = Pair::new(&[]);
        let now = Timestamp::from_millis(1_800_000_000_123);
        assert_eq!(pair.ask(&AgentRequest::SetClock(now)), AgentResponse::Done);
        assert_eq!(pair.server.machine.clock, Some(now));
    }

    #[test]
    fn renewing_sets_the_clock_too_and_sealing_says_why_not() {
        let mut pair = Pair::new(&[]);
        let now = Timestamp::from_millis(1_800_000_000_123);
        let renewal = Renewal { now, entropy: vec![7; 64] };
        assert_eq!(pair.ask(&AgentRequest::Renew(renewal.into())), AgentResponse::Done);
        assert_eq!((pair.server.machine.clock, pair.server.machine.renewed.len()), (Some(now), 1));
        assert_eq!(pair.ask(&AgentRequest::Seal), AgentResponse::Failed("not yet".into()));
        let grown = pair.ask(&AgentRequest::GrowDisk(ByteSize::from_mib(1)));
        assert_eq!(grown, AgentResponse::Failed("the file system does not grow: no room".into()));
    }

    #[test]
    fn power_goes_off_after_the_answer_is_out() {
        let mut pair = Pair::new(&[]);
        let id = pair.host.open().unwrap();
        pair.host.send(id, &codec::encode(&AgentRequest::PowerOff, MAX_MESSAGE).unwrap());
        while let Some(bytes) = pair.host.poll_transmit() {
            pair.server.handle_bytes(&bytes);
        }
        assert_eq!(pair.server.machine.off, 0);
        pair.settle();
        assert_eq!(pair.server.machine.off, 1);
    }

    #[test]
    fn a_power_off_that_fails_is_a_problem() {
        let mut pair = Pair::new(&[]);
        assert_eq!(pair.ask(&AgentRequest::PowerOffNow), AgentResponse::Done);
        assert_eq!(pair.server.machine.off_now, 1);
        assert!(matches!(pair.ask(&AgentRequest::Ping), AgentResponse::Pong { problems, .. } if problems.len() == 1));
    }

    #[test]
    fn what_is_no_request_is_reset_and_the_next_one_is_answered() {
        let mut pair = Pair::new(&[]);
        for garbage in [&[255, 255, 255, 255][..], &[1, 0, 0, 0, 99]] {
            let id = pair.host.open().unwrap();
            pair.host.send(id, garbage);
            assert_eq!(pair.settle(), [Event::Reset(id)]);
        }
        let cut = pair.host.open().unwrap();
        pair.host.send(cut, &[5, 0, 0, 0, 1]);
        pair.host.fin(cut);
        assert_eq!(pair.settle(), [Event::Reset(cut)]);
        assert!(matches!(pair.ask(&AgentRequest::Ping), AgentResponse::Pong { .. }));
    }
}
