//! Multiplexed streams ([`clan_wire::mux`]) over one byte stream, driven by tokio: a virtio-serial port in the guest, the
//! socket that is its other end on the base OS; or a Unix socket, where the controller runs on the base OS itself.
//!
//! The driver is the only one that touches the byte stream. Streams meet it in one mutex, held for copies only.

mod local;
mod message;
mod port;
#[cfg(test)]
mod tests;

pub use local::{LocalError, LocalListener};
pub use message::{MessageError, recv_message, recv_page, send_message, send_pages};
pub use port::{VirtioPort, open_virtio_port};

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Instant,
};

use clan_wire::mux::{Event, Mux, Role, StreamId};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

/// Moves the bytes of one channel. The caller spawns, names and joins it. It ends when the token is cancelled (`Ok`) and
/// when the byte stream ends or breaks (`Err`).
pub type Driver = Pin<Box<dyn Future<Output = Result<(), ChannelError>> + Send>>;

/// Bytes read, and written, at a time.
const CHUNK: usize = 64 << 10;

/// Why a channel has no streams to give.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChannelError {
    /// It was cancelled, or its driver is gone.
    #[error("the channel is closed")]
    Closed,
    /// The other side closed the byte stream.
    #[error("the other side closed the channel")]
    Ended,
    /// The byte stream broke.
    #[error("the channel broke")]
    Io(#[source] Arc<io::Error>),
    /// The other side speaks another version.
    #[error("the other side speaks version {0} of the channel's protocol")]
    Incompatible(u8),
}

/// One side of a byte stream that carries many streams. Clones share it.
#[derive(Clone)]
pub struct Channel {
    shared: Arc<Shared>,
}

/// The streams that the other side opens. Dropping it refuses them from then on.
pub struct Incoming {
    shared: Arc<Shared>,
}

/// One stream. `shutdown` ends the writing direction: what was written before it is delivered, even if the stream is then
/// dropped. Dropping a stream without it resets the stream, and what was written but not yet sent is lost.
pub struct Stream {
    shared: Arc<Shared>,
    id: StreamId,
}

struct Shared {
    state: Mutex<State>,
    /// Something waits to be transmitted.
    transmit: Notify,
    /// The session began or ended, a stream may have ended, the channel closed.
    changed: Notify,
}

struct State {
    mux: Mux,
    slots: HashMap<StreamId, Slot>,
    accepts: bool,
    accept_queue: VecDeque<StreamId>,
    accept_waker: Option<Waker>,
    peer_version: Option<String>,
    closed: Option<ChannelError>,
}

/// What the driver and a [`Stream`] share.
#[derive(Default)]
struct Slot {
    inbox: VecDeque<u8>,
    ended: bool,
    lost: Option<Lost>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    fin: bool,
}

#[derive(Debug, Clone, Copy)]
enum Lost {
    Reset,
    Restarted,
    Closed,
}

impl From<Lost> for io::Error {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Reset => Self::new(io::ErrorKind::ConnectionReset, "the other side dropped the stream"),
            Lost::Restarted => Self::new(io::ErrorKind::ConnectionAborted, "the other side started anew"),
            Lost::Closed => Self::new(io::ErrorKind::NotConnected, "the channel is closed"),
        }
    }
}

impl Slot {
    fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }
}

impl Channel {
    /// The manager's side: begins a session. Streams that the guest opens are refused.
    pub fn host<I>(io: I, version: &str, cancel: CancellationToken) -> (Self, Driver)
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        let shared = Shared::new(Role::Host, version);
        (Self { shared: shared.clone() }, Box::pin(drive(io, shared, cancel)))
    }

    /// The guest's side: answers sessions, one after the other.
    pub fn guest<I>(io: I, version: &str, cancel: CancellationToken) -> (Self, Incoming, Driver)
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        let shared = Shared::new(Role::Guest, version);
        (Self { shared: shared.clone() }, Incoming { shared: shared.clone() }, Box::pin(drive(io, shared, cancel)))
    }

    /// Waits for the handshake; gives the program version of the other side (its word only).
    pub async fn started(&self) -> Result<String, ChannelError> {
        self.shared.wait(|state| state.peer_version.clone()).await
    }

    /// Opens a stream: once the handshake is done, and while fewer than [`clan_wire::mux::MAX_STREAMS`] are open.
    pub async fn open(&self) -> Result<Stream, ChannelError> {
        let id = self
            .shared
            .wait(|state| {
                let id = state.mux.open()?;
                state.slots.insert(id, Slot::default());
                Some(id)
            })
            .await?;
        self.shared.transmit.notify_one();
        Ok(Stream { shared: self.shared.clone(), id })
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").finish_non_exhaustive()
    }
}

impl Incoming {
    /// The next stream; `None` once the channel has ended.
    pub async fn accept(&mut self) -> Option<Stream> {
        let id = poll_fn(|cx| {
            let mut state = self.shared.lock();
            if let Some(id) = state.accept_queue.pop_front() {
                return Poll::Ready(Some(id));
            }
            if state.closed.is_some() {
                return Poll::Ready(None);
            }
            state.accept_waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await?;
        Some(Stream { shared: self.shared.clone(), id })
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.accepts = false;
        for id in std::mem::take(&mut state.accept_queue) {
            state.mux.reset(id);
            state.slots.remove(&id);
        }
        self.shared.transmit.notify_one();
    }
}

impl Shared {
    fn new(role: Role, version: &str) -> Arc<Self> {
        // A random number that is never used as a secret; without randomness the time must do.
        let nonce = getrandom::u64().unwrap_or_else(|_| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap_or(1)
        });
        Arc::new(Self {
            state: Mutex::new(State {
                mux: Mux::new(role, nonce, version, Instant::now()),
                slots: HashMap::new(),
                accepts: role == Role::Guest,
                accept_queue: VecDeque::new(),
                accept_waker: None,
                peer_version: None,
                closed: None,
            }),
            transmit: Notify::new(),
            changed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `get` gives something.
    async fn wait<T>(&self, mut get: impl FnMut(&mut State) -> Option<T>) -> Result<T, ChannelError> {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.lock();
                if let Some(error) = &state.closed {
                    return Err(error.clone());
                }
                if let Some(got) = get(&mut state) {
                    return Ok(got);
                }
            }
            changed.await;
        }
    }

    /// Hands the mux's events to the streams.
    fn deliver(&self) -> Result<(), ChannelError> {
        let mut state = self.lock();
        let state = &mut *state;
        while let Some(event) = state.mux.poll_event() {
            match event {
                Event::Started { peer_version } => {
                    tracing::debug!(peer_version, "channel session started");
                    state.peer_version = Some(peer_version);
                }
                Event::Restarted => {
                    tracing::debug!("channel session ended");
                    state.peer_version = None;
                    state.lose_all(Lost::Restarted);
                }
                // A guest waits for a better host; this one may be a stale one.
                Event::Incompatible { protocol } if state.accepts => {
                    tracing::warn!(protocol, "the base OS speaks another version of the channel's protocol");
                }
                Event::Incompatible { protocol } => return Err(ChannelError::Incompatible(protocol)),
                Event::Opened(id) if state.accepts => {
                    state.slots.insert(id, Slot::default());
                    state.accept_queue.push_back(id);
                    state.accept_waker.take().into_iter().for_each(Waker::wake);
                }
                Event::Opened(id) => state.mux.reset(id),
                Event::Data(id, data) => {
                    if let Some(slot) = state.slots.get_mut(&id) {
                        slot.inbox.extend(data);
                        slot.reader.take().into_iter().for_each(Waker::wake);
                    }
                }
                Event::Fin(id) => {
                    if let Some(slot) = state.slots.get_mut(&id) {
                        slot.ended = true;
                        slot.reader.take().into_iter().for_each(Waker::wake);
                    }
                }
                Event::Writable(id) => {
                    if let Some(slot) = state.slots.get_mut(&id) {
                        slot.writer.take().into_iter().for_each(Waker::wake);
                    }
                }
                Event::Reset(id) => {
                    if state.forget_unaccepted(id) {
                        state.slots.remove(&id);
                    } else if let Some(slot) = state.slots.get_mut(&id) {
                        slot.lost = Some(Lost::Reset);
                        slot.wake();
                    }
                }
                Event::Pong(_) => {}
            }
        }
        // Any event, and any frame sent before this, may have made place for a stream.
        self.changed.notify_waiters();
        Ok(())
    }

    fn close(&self, error: ChannelError) {
        let mut state = self.lock();
        state.closed = Some(error);
        state.lose_all(Lost::Closed);
        state.accept_waker.take().into_iter().for_each(Waker::wake);
        drop(state);
        self.changed.notify_waiters();
    }
}

impl State {
    fn forget_unaccepted(&mut self, id: StreamId) -> bool {
        let before = self.accept_queue.len();
        self.accept_queue.retain(|queued| *queued != id);
        self.accept_queue.len() < before
    }

    fn lose_all(&mut self, lost: Lost) {
        for id in std::mem::take(&mut self.accept_queue) {
            self.slots.remove(&id);
        }
        for slot in self.slots.values_mut() {
            slot.lost.get_or_insert(lost);
            slot.wake();
        }
    }
}

/// Closes the channel however the driver ends.
struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if self.0.lock().closed.is_none() {
            self.0.close(ChannelError::Closed);
        }
    }
}

async fn drive<I>(io: I, shared: Arc<Shared>, cancel: CancellationToken) -> Result<(), ChannelError>
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let guard = CloseOnDrop(shared);
    let shared = &guard.0;
    let end = tokio::select! {
        biased;
        () = cancel.cancelled() => return Ok(()),
        end = transfer(io, shared) => end,
    };
    if let Err(error) = &end {
        shared.close(error.clone());
    }
    end
}

async fn transfer<I: AsyncRead + AsyncWrite>(io: I, shared: &Arc<Shared>) -> Result<(), ChannelError> {
    let broken = |error: io::Error| ChannelError::Io(Arc::new(error));
    let (reader, writer) = tokio::io::split(io);
    let (mut reader, mut writer) = (std::pin::pin!(reader), std::pin::pin!(writer));
    let mut inbound = vec![0; CHUNK];
    let mut outbound: Vec<u8> = Vec::with_capacity(2 * CHUNK);
    let mut written = 0;
    loop {
        let timeout = {
            let mut state = shared.lock();
            state.mux.handle_timeout(Instant::now());
            if written == outbound.len() {
                outbound.clear();
                written = 0;
                while outbound.len() < CHUNK
                    && let Some(frame) = state.mux.poll_transmit()
                {
                    outbound.extend_from_slice(&frame);
                }
            }
            state.mux.next_timeout()
        };
        // Sending makes room, which is an event.
        shared.deliver()?;
        tokio::select! {
            count = writer.write(&outbound[written..]), if written < outbound.len() => match count.map_err(broken)? {
                0 => return Err(ChannelError::Ended),
                count => written += count,
            },
            count = reader.read(&mut inbound) => {
                let count = count.map_err(broken)?;
                if count == 0 {
                    return Err(ChannelError::Ended);
                }
                shared.lock().mux.handle_bytes(&inbound[..count]);
                shared.deliver()?;
            }
            () = shared.transmit.notified(), if written == outbound.len() => {}
            () = sleep_until(timeout), if written == outbound.len() => {}
        }
    }
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        let State { mux, slots, .. } = &mut *state;
        let Some(slot) = slots.get_mut(&self.id) else { return Poll::Ready(Err(Lost::Closed.into())) };
        // What arrived before the end of the channel is still good; a reset drops it.
        if let Some(lost @ Lost::Reset) = slot.lost {
            return Poll::Ready(Err(lost.into()));
        }
        let (front, _) = slot.inbox.as_slices();
        let count = front.len().min(buf.remaining());
        if count > 0 {
            buf.put_slice(&front[..count]);
            slot.inbox.drain(..count);
            mux.consumed(self.id, count);
            drop(state);
            self.shared.transmit.notify_one();
            return Poll::Ready(Ok(()));
        }
        if slot.ended || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if let Some(lost) = slot.lost {
            return Poll::Ready(Err(lost.into()));
        }
        slot.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        let State { mux, slots, .. } = &mut *state;
        let Some(slot) = slots.get_mut(&self.id) else { return Poll::Ready(Err(Lost::Closed.into())) };
        if let Some(lost) = slot.lost {
            return Poll::Ready(Err(lost.into()));
        }
        if slot.fin {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        match mux.send(self.id, bytes) {
            0 => {
                slot.writer = Some(cx.waker().clone());
                Poll::Pending
            }
            count => {
                drop(state);
                self.shared.transmit.notify_one();
                Poll::Ready(Ok(count))
            }
        }
    }

    /// What was written needs no flush to be sent.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let state = self.shared.lock();
        Poll::Ready(match state.slots.get(&self.id).and_then(|slot| slot.lost) {
            Some(lost) => Err(lost.into()),
            None => Ok(()),
        })
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        let State { mux, slots, .. } = &mut *state;
        let Some(slot) = slots.get_mut(&self.id) else { return Poll::Ready(Err(Lost::Closed.into())) };
        if let Some(lost) = slot.lost {
            return Poll::Ready(Err(lost.into()));
        }
        slot.fin = true;
        mux.fin(self.id);
        drop(state);
        self.shared.transmit.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.slots.remove(&self.id);
        state.mux.release(self.id);
        drop(state);
        self.shared.transmit.notify_one();
        self.shared.changed.notify_waiters();
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stream").field(&self.id).finish()
    }
}
