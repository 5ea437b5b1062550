//! Length-prefixed messages on any stream: of a channel, of a QUIC connection.

use std::io;

use clan_wire::{
    codec,
    peer::{EncodedEntry, EntryPage, MAX_PAGE, PAGE_BYTES},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Memory taken for a body before any of it has arrived.
const CHUNK: usize = 64 << 10;

/// Why a message was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The stream ended where a message could have begun.
    #[error("the stream ended")]
    Ended,
    /// The stream broke, or ended within a message.
    #[error("the stream broke")]
    Io(#[from] io::Error),
    /// The bytes are no message of the expected kind and size.
    #[error("not an acceptable message")]
    Codec(#[from] codec::CodecError),
}

/// Sends one length-prefixed message (see [`clan_wire::codec`]) and flushes.
pub async fn send_message<T, W>(stream: &mut W, message: &T, limit: usize) -> Result<(), MessageError>
where
    T: Serialize,
    W: AsyncWrite + Unpin + ?Sized,
{
    stream.write_all(&codec::encode(message, limit)?).await?;
    stream.flush().await?;
    Ok(())
}

/// Receives one length-prefixed message of at most `limit` bytes. Not cancel safe.
pub async fn recv_message<T, R>(stream: &mut R, limit: usize) -> Result<T, MessageError>
where
    T: DeserializeOwned,
    R: AsyncRead + Unpin + ?Sized,
{
    let mut prefix = [0; codec::PREFIX];
    let first = stream.read(&mut prefix).await?;
    if first == 0 {
        return Err(MessageError::Ended);
    }
    stream.read_exact(&mut prefix[first..]).await?;
    let length = codec::body_length(prefix, limit)?;
    // Memory is taken as bytes arrive, not on the word of the other side.
    let mut body = Vec::with_capacity(length.min(CHUNK));
    (&mut *stream).take(length as u64).read_to_end(&mut body).await?;
    if body.len() < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(codec::decode(&body)?)
}

/// Sends entries in [`EntryPage`]s, an empty one if there are none.
pub async fn send_pages<W>(stream: &mut W, entries: &[EncodedEntry]) -> Result<(), MessageError>
where
    W: AsyncWrite + Unpin + ?Sized,
{
    let mut rest = entries;
    loop {
        let mut bytes = 0;
        let full = rest.iter().position(|entry| {
            let full = bytes >= PAGE_BYTES;
            bytes += entry.len();
            full
        });
        let (page, after) = rest.split_at(full.unwrap_or(rest.len()));
        send_message(stream, &EntryPage { entries: page.to_vec(), more: !after.is_empty() }, MAX_PAGE).await?;
        if after.is_empty() {
            return Ok(());
        }
        rest = after;
    }
}

/// Receives the next [`EntryPage`]. Not cancel safe.
pub async fn recv_page<R>(stream: &mut R) -> Result<EntryPage, MessageError>
where
    R: AsyncRead + Unpin + ?Sized,
{
    recv_message(stream, MAX_PAGE).await
}
