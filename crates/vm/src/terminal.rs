//! The serial console, for whoever looks at it now.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::AbortHandle,
};

/// So much is kept for whoever does not keep up; of more, the end.
const KEPT: usize = 256 << 10;

/// A connection to a guest's serial console, as a byte stream. What the guest writes is taken from QEMU at once, also while
/// nobody reads it here: QEMU would stop the console after some 280 bytes, as each is a message of its own to the kernel,
/// and with it the guest's programs and its kernel as they write there. Whoever does not keep up misses the oldest.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Mutex<Heard>>,
    writer: OwnedWriteHalf,
    listener: AbortHandle,
}

#[derive(Debug, Default)]
struct Heard {
    /// INVARIANT: at most [`KEPT`].
    bytes: VecDeque<u8>,
    ended: bool,
    reader: Option<Waker>,
}

impl Console {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        let shared = Arc::default();
        let listener = tokio::spawn(listen(reader, Arc::clone(&shared))).abort_handle();
        Self { shared, writer, listener }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn lock(shared: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(mut port: OwnedReadHalf, shared: Arc<Mutex<Heard>>) {
    let mut buffer = [0; 4096];
    loop {
        let count = port.read(&mut buffer).await.unwrap_or(0);
        let mut heard = lock(&shared);
        heard.bytes.extend(&buffer[..count]);
        let excess = heard.bytes.len().saturating_sub(KEPT);
        heard.bytes.drain(..excess);
        heard.ended = count == 0;
        heard.reader.take().into_iter().for_each(Waker::wake);
        if count == 0 {
            return;
        }
    }
}

impl AsyncRead for Console {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut heard = lock(&self.shared);
        if heard.bytes.is_empty() && !heard.ended {
            heard.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = heard.bytes.as_slices().0.len().min(buf.remaining());
        buf.put_slice(&heard.bytes.as_slices().0[..count]);
        heard.bytes.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Console {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn whoever_does_not_keep_up_gets_the_end_and_holds_nobody_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut console = Console::new(ours);
        theirs.write_all(&vec![b'a'; 3 * KEPT]).await.unwrap();
        theirs.write_all(b"end").await.unwrap();
        drop(theirs);
        let mut heard = Vec::new();
        // Only once all has been heard is it known what was forgotten.
        while !lock(&console.shared).ended {
            tokio::task::yield_now().await;
        }
        console.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard.len(), KEPT);
        assert!(heard.ends_with(b"aend"));
    }

    #[tokio::test]
    async fn what_is_typed_arrives_and_answers_come_back() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut console = Console::new(ours);
        console.write_all(b"question").await.unwrap();
        let mut asked = [0; 8];
        theirs.read_exact(&mut asked).await.unwrap();
        theirs.write_all(&asked).await.unwrap();
        let mut answer = [0; 8];
        console.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"question");
    }
}
