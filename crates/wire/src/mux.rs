//! Many streams over one byte stream that may lose its place: a virtio-serial port.
//!
//! A port outlives the programs at its ends: after one of them restarts, bytes of the former conversation arrive first, and
//! the last frame of it may be cut short. So every frame names its session, and a session begins with a Hello
//! behind enough zero bytes to complete whatever frame was cut. The host names sessions; the guest answers.
//!
//! ```text
//! host                              guest
//!   zeros, Hello(session s)  ──▶            repeated until answered
//!                            ◀──  zeros, Hello(session s, incarnation g)
//!   Open, Data, …            ◀─▶  …
//!                            ◀──  zeros, Hello(session 0, incarnation g')    the guest's program restarted:
//!   zeros, Hello(session s+1)──▶                                             the host begins anew
//! ```
//!
//! Each stream has a receive window: what nobody reads takes at most [`WINDOW`] bytes and holds up no other stream.
//! After every call, poll [`Mux::poll_event`] and [`Mux::poll_transmit`] until both are empty.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

mod frame;

use frame::{HEADER, Header, Kind, MAX_TEXT, Parser, frame, long, word};
pub use frame::{MAX_PAYLOAD, PROTOCOL};

/// Receive window of a stream, bytes.
pub const WINDOW: usize = 256 << 10;
/// How many streams each side may have open.
pub const MAX_STREAMS: usize = 64;
/// Time between two Hellos while none was answered.
pub const HELLO_INTERVAL: Duration = Duration::from_millis(300);

/// Bytes of a stream that wait for their turn to be sent.
const OUTBOX: usize = 128 << 10;
/// Frames that wait in front of data. Only a peer that floods us without reading reaches it.
const MAX_CONTROL: usize = 4096;

/// Which side of the port this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The manager: begins sessions.
    Host,
    /// The program in the guest: answers them.
    Guest,
}

/// A stream. Never valid again after the session it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    epoch: u32,
    id: u32,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The handshake is done.
    Started {
        /// Program version of the other side; its word only.
        peer_version: String,
    },
    /// The session ended; all its streams are gone without further events.
    Restarted,
    /// The other side speaks another version of this protocol; no session.
    Incompatible {
        /// That version.
        protocol: u8,
    },
    /// The other side opened a stream.
    Opened(StreamId),
    /// Bytes arrived. Say [`Mux::consumed`] once they have been used.
    Data(StreamId, Vec<u8>),
    /// A stream that had refused bytes takes some again.
    Writable(StreamId),
    /// The other side sends nothing more on this stream.
    Fin(StreamId),
    /// The stream is gone, with the data on its way.
    Reset(StreamId),
    /// Answer to [`Mux::ping`].
    Pong(u64),
}

#[derive(Debug, Default)]
struct Stream {
    /// Received, not yet handed out.
    inbox: Vec<u8>,
    /// How much more the other side may send.
    window: usize,
    /// Handed out, not yet consumed.
    delivered: usize,
    /// Consumed, not yet told the other side.
    consumed: usize,
    /// Accepted from the application, not yet framed.
    outbox: VecDeque<u8>,
    /// How much more we may accept: the other side's window.
    credit: usize,
    wants_write: bool,
    writable: bool,
    fin_wanted: bool,
    fin_sent: bool,
    fin_received: bool,
    fin_reported: bool,
    /// The application is not interested any more.
    released: bool,
    in_ready: bool,
    in_sending: bool,
    in_credits: bool,
}

impl Stream {
    fn new() -> Self {
        Self { window: WINDOW, credit: WINDOW, ..Self::default() }
    }

    fn is_open(&self) -> bool {
        !(self.fin_sent && self.fin_received)
    }

    fn room(&self) -> usize {
        self.credit.min(OUTBOX.saturating_sub(self.outbox.len()))
    }
}

/// One side of the port. See the module.
#[derive(Debug)]
pub struct Mux {
    role: Role,
    version: String,
    /// Of the guest's program; 0 for a host.
    incarnation: u64,
    /// 0 while a guest has none.
    session: u64,
    peer_incarnation: u64,
    started: bool,
    epoch: u32,
    hello_wanted: bool,
    zeros_wanted: bool,
    hello_due: Instant,
    parser: Parser,
    streams: BTreeMap<u32, Stream>,
    next_id: u32,
    last_peer_id: u32,
    events: VecDeque<Event>,
    ready: VecDeque<u32>,
    control: VecDeque<Vec<u8>>,
    credits: VecDeque<u32>,
    sending: VecDeque<u32>,
}

impl Mux {
    /// Begins. `nonce` is fresh and random: it names the host's first session, or this run of the guest's program.
    pub fn new(role: Role, nonce: u64, version: &str, now: Instant) -> Self {
        let nonce = nonce.max(1);
        let (session, incarnation) = match role {
            Role::Host => (nonce, 0),
            Role::Guest => (0, nonce),
        };
        let cut = (0..=version.len().min(MAX_TEXT)).rev().find(|end| version.is_char_boundary(*end)).unwrap_or(0);
        Self {
            role,
            version: version[..cut].to_owned(),
            incarnation,
            session,
            peer_incarnation: 0,
            started: false,
            epoch: 0,
            hello_wanted: true,
            zeros_wanted: true,
            hello_due: now + HELLO_INTERVAL,
            parser: Parser::default(),
            streams: BTreeMap::new(),
            next_id: 0,
            last_peer_id: 0,
            events: VecDeque::new(),
            ready: VecDeque::new(),
            control: VecDeque::new(),
            credits: VecDeque::new(),
            sending: VecDeque::new(),
        }
    }

    /// Whether the handshake is done.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// Opens a stream; `None` before the handshake and while [`MAX_STREAMS`] of ours are open.
    pub fn open(&mut self) -> Option<StreamId> {
        let first = Self::first_id(self.role);
        if !self.started || self.count(first) >= MAX_STREAMS {
            return None;
        }
        let id = if self.next_id == 0 { first } else { self.next_id };
        self.next_id = id.checked_add(2)?;
        self.streams.insert(id, Stream::new());
        self.control(Kind::Open, id, &[]);
        Some(StreamId { epoch: self.epoch, id })
    }

    /// Takes bytes to send; says how many. Fewer than given: [`Event::Writable`] follows.
    pub fn send(&mut self, id: StreamId, bytes: &[u8]) -> usize {
        let Some(stream) = self.stream(id).filter(|stream| !stream.fin_wanted) else { return 0 };
        let taken = bytes.len().min(stream.room());
        stream.outbox.extend(&bytes[..taken]);
        stream.credit -= taken;
        stream.wants_write |= taken < bytes.len();
        if taken > 0 {
            self.want_sending(id.id);
        }
        taken
    }

    /// The application used so many bytes of [`Event::Data`]: the other side may send as many more.
    pub fn consumed(&mut self, id: StreamId, bytes: usize) {
        let Some(stream) = self.stream(id) else { return };
        let bytes = bytes.min(stream.delivered);
        stream.delivered -= bytes;
        stream.consumed += bytes;
        if stream.consumed >= WINDOW / 4 && !stream.fin_received && !stream.in_credits {
            stream.in_credits = true;
            self.credits.push_back(id.id);
        }
    }

    /// Sends nothing more on this stream, once what was taken is on its way.
    pub fn fin(&mut self, id: StreamId) {
        let Some(stream) = self.stream(id) else { return };
        stream.fin_wanted = true;
        if !stream.fin_sent {
            self.want_sending(id.id);
        }
    }

    /// Drops the stream on both sides.
    pub fn reset(&mut self, id: StreamId) {
        if self.stream(id).is_some() {
            self.streams.remove(&id.id);
            self.control(Kind::Reset, id.id, &[]);
        }
    }

    /// The application lets go of the stream. After [`Mux::fin`], what was taken still goes out, and what arrives is
    /// thrown away (a peer that goes on for long gets a reset); otherwise the same as [`Mux::reset`].
    pub fn release(&mut self, id: StreamId) {
        match self.stream(id) {
            Some(stream) if stream.fin_wanted => {
                stream.released = true;
                stream.inbox = Vec::new();
                stream.fin_reported = stream.fin_received;
                self.forget_if_done(id.id);
            }
            _ => self.reset(id),
        }
    }

    /// Asks the other side for an [`Event::Pong`] with this token.
    pub fn ping(&mut self, token: u64) {
        if self.started {
            self.control(Kind::Ping, 0, &token.to_le_bytes());
        }
    }

    /// When [`Mux::handle_timeout`] wants to be called.
    pub fn next_timeout(&self) -> Option<Instant> {
        (!self.started).then_some(self.hello_due)
    }

    /// Repeats the Hello if it is time.
    pub fn handle_timeout(&mut self, now: Instant) {
        if !self.started && now >= self.hello_due {
            self.hello_wanted = true;
            self.hello_due = now + HELLO_INTERVAL;
        }
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        while let Some(number) = self.ready.pop_front() {
            let id = StreamId { epoch: self.epoch, id: number };
            let Some(stream) = self.streams.get_mut(&number) else { continue };
            stream.in_ready = false;
            let event = if !stream.inbox.is_empty() {
                let data = std::mem::take(&mut stream.inbox);
                stream.delivered += data.len();
                Event::Data(id, data)
            } else if stream.fin_received && !stream.fin_reported {
                stream.fin_reported = true;
                Event::Fin(id)
            } else if std::mem::take(&mut stream.writable) {
                Event::Writable(id)
            } else {
                continue;
            };
            self.want_ready(number);
            self.forget_if_done(number);
            return Some(event);
        }
        None
    }

    /// The next bytes to write, at most one frame.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        if self.hello_wanted {
            if std::mem::take(&mut self.zeros_wanted) {
                return Some(vec![0; HEADER + MAX_PAYLOAD]);
            }
            self.hello_wanted = false;
            let payload = [&self.incarnation.to_le_bytes()[..], self.version.as_bytes()];
            return Some(frame(Kind::Hello, self.session, 0, &payload));
        }
        if let Some(frame) = self.control.pop_front() {
            return Some(frame);
        }
        while let Some(id) = self.credits.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.in_credits = false;
            let bytes = std::mem::take(&mut stream.consumed);
            stream.window += bytes;
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            return Some(frame(Kind::Credit, self.session, id, &[&bytes.to_le_bytes()]));
        }
        while let Some(id) = self.sending.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.in_sending = false;
            let sent = if stream.outbox.is_empty() {
                if !stream.fin_wanted || std::mem::replace(&mut stream.fin_sent, true) {
                    continue;
                }
                frame(Kind::Fin, self.session, id, &[])
            } else {
                let length = stream.outbox.len().min(MAX_PAYLOAD);
                let (front, back) = stream.outbox.as_slices();
                let front = &front[..front.len().min(length)];
                let sent = frame(Kind::Data, self.session, id, &[front, &back[..length - front.len()]]);
                stream.outbox.drain(..length);
                sent
            };
            if !stream.outbox.is_empty() || (stream.fin_wanted && !stream.fin_sent) {
                self.want_sending(id);
            }
            self.tell_writable(id);
            self.forget_if_done(id);
            return Some(sent);
        }
        None
    }

    /// Bytes from the other side.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.parser.push(chunk);
            while let Some((header, payload)) = self.parser.next() {
                self.handle_lost_place();
                self.handle_frame(&header, payload);
            }
            self.handle_lost_place();
        }
    }

    /// A gap within a session would be a gap in some stream, so the host begins anew. (To the guest, a gap is what
    /// announces the next session.)
    fn handle_lost_place(&mut self) {
        if std::mem::take(&mut self.parser.lost_place) && self.role == Role::Host && self.started {
            self.begin(self.session.wrapping_add(1).max(1));
        }
    }

    fn handle_frame(&mut self, header: &Header, payload: Vec<u8>) {
        if header.version != PROTOCOL {
            // Once is enough, however often the other side repeats itself.
            let event = Event::Incompatible { protocol: header.version };
            if header.is_hello() && !self.events.contains(&event) {
                self.events.push_back(event);
            }
            return;
        }
        let Some(kind) = Kind::from_byte(header.kind) else { return };
        if kind == Kind::Hello {
            return self.handle_hello(header.session, &payload);
        }
        if !self.started || header.session != self.session {
            return;
        }
        let id = StreamId { epoch: self.epoch, id: header.stream };
        match kind {
            Kind::Hello => {}
            Kind::Open => self.handle_open(id),
            Kind::Data => self.handle_data(id, payload),
            Kind::Credit => {
                if let Some(stream) = self.streams.get_mut(&id.id) {
                    let bytes = usize::try_from(word(&payload, 0)).unwrap_or(0);
                    stream.credit = stream.credit.saturating_add(bytes).min(WINDOW);
                    self.tell_writable(id.id);
                }
            }
            Kind::Fin => {
                if let Some(stream) = self.streams.get_mut(&id.id) {
                    stream.fin_received = true;
                    stream.fin_reported |= stream.released;
                    self.want_ready(id.id);
                    self.forget_if_done(id.id);
                }
            }
            Kind::Reset => {
                if self.streams.remove(&id.id).is_some() {
                    self.events.push_back(Event::Reset(id));
                }
            }
            Kind::Ping => self.control(Kind::Pong, 0, &long(&payload, 0).to_le_bytes()),
            Kind::Pong => self.events.push_back(Event::Pong(long(&payload, 0))),
        }
    }

    fn handle_hello(&mut self, session: u64, payload: &[u8]) {
        let incarnation = long(payload, 0);
        let peer_version = String::from_utf8_lossy(payload.get(8..).unwrap_or_default()).into_owned();
        match self.role {
            Role::Host if self.started => {
                // A late answer is fine; another run of the guest's program needs a session of its own.
                if incarnation != self.peer_incarnation && (session == self.session || session == 0) {
                    self.begin(self.session.wrapping_add(1).max(1));
                }
            }
            Role::Host if session == self.session => {
                self.started = true;
                self.peer_incarnation = incarnation;
                self.hello_wanted = false;
                self.events.push_back(Event::Started { peer_version });
            }
            // The guest's program has just started; it did not see our Hello. Stale answers mean nothing.
            Role::Host => self.hello_wanted |= session == 0,
            Role::Guest if session == 0 => {}
            Role::Guest => {
                if session != self.session {
                    self.begin(session);
                    self.started = true;
                    self.events.push_back(Event::Started { peer_version });
                }
                self.hello_wanted = true;
            }
        }
    }

    fn begin(&mut self, session: u64) {
        self.epoch = self.epoch.wrapping_add(1);
        self.session = session;
        self.hello_wanted = true;
        self.zeros_wanted = true;
        self.streams.clear();
        self.next_id = 0;
        self.last_peer_id = 0;
        self.events.clear();
        self.ready.clear();
        self.control.clear();
        self.credits.clear();
        self.sending.clear();
        if std::mem::take(&mut self.started) {
            self.events.push_back(Event::Restarted);
        }
    }

    fn handle_open(&mut self, id: StreamId) {
        let peer = match self.role {
            Role::Host => Role::Guest,
            Role::Guest => Role::Host,
        };
        let first = Self::first_id(peer);
        if id.id % 2 != first % 2 || id.id <= self.last_peer_id {
            return;
        }
        self.last_peer_id = id.id;
        if self.count(first) >= MAX_STREAMS {
            self.control(Kind::Reset, id.id, &[]);
        } else {
            self.streams.insert(id.id, Stream::new());
            self.events.push_back(Event::Opened(id));
        }
    }

    fn handle_data(&mut self, id: StreamId, payload: Vec<u8>) {
        let Some(stream) = self.streams.get_mut(&id.id) else { return };
        // INVARIANT: a stream never holds more than WINDOW bytes that were not consumed.
        if stream.fin_received || payload.len() > stream.window {
            self.reset(id);
            self.events.push_back(Event::Reset(id));
            return;
        }
        stream.window -= payload.len();
        if stream.released {
            if stream.window < WINDOW / 2 {
                self.reset(id);
            }
            return;
        }
        if stream.inbox.is_empty() {
            stream.inbox = payload;
        } else {
            stream.inbox.extend_from_slice(&payload);
        }
        self.want_ready(id.id);
    }

    fn stream(&mut self, id: StreamId) -> Option<&mut Stream> {
        if id.epoch == self.epoch { self.streams.get_mut(&id.id) } else { None }
    }

    fn first_id(role: Role) -> u32 {
        match role {
            Role::Host => 1,
            Role::Guest => 2,
        }
    }

    fn count(&self, first: u32) -> usize {
        self.streams.iter().filter(|(id, stream)| *id % 2 == first % 2 && stream.is_open()).count()
    }

    fn control(&mut self, kind: Kind, stream: u32, payload: &[u8]) {
        if self.control.len() < MAX_CONTROL {
            self.control.push_back(frame(kind, self.session, stream, &[payload]));
        }
    }

    fn want_sending(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !std::mem::replace(&mut stream.in_sending, true)
        {
            self.sending.push_back(id);
        }
    }

    fn want_ready(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            let has_news = !stream.inbox.is_empty() || (stream.fin_received && !stream.fin_reported) || stream.writable;
            if has_news && !std::mem::replace(&mut stream.in_ready, true) {
                self.ready.push_back(id);
            }
        }
    }

    fn tell_writable(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.wants_write
            && stream.room() > 0
        {
            stream.wants_write = false;
            stream.writable = true;
            self.want_ready(id);
        }
    }

    fn forget_if_done(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|stream| stream.fin_sent && stream.fin_reported && stream.inbox.is_empty())
        {
            self.streams.remove(&id);
        }
    }
}
