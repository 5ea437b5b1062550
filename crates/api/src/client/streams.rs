//! Answers that go on.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{ClientError, protocol};
use crate::TaskEvent;

/// Longest line of an event stream.
const MAX_LINE: usize = 4 << 20;

/// Bytes of an answer, as they arrive.
#[derive(Debug)]
pub struct ByteStream {
    body: Incoming,
}

impl ByteStream {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body }
    }

    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Option<Result<Bytes, ClientError>> {
        loop {
            match self.body.frame().await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => return Some(Ok(data)),
                    Err(_trailers) => {}
                },
                Err(error) => return Some(Err(protocol(error))),
            }
        }
    }
}

/// A task's events, as they arrive.
#[derive(Debug)]
pub struct EventStream {
    body: ByteStream,
    buffer: Vec<u8>,
    ready: VecDeque<TaskEvent>,
}

impl EventStream {
    pub(super) fn new(body: Incoming) -> Self {
        Self { body: ByteStream::new(body), buffer: Vec::new(), ready: VecDeque::new() }
    }

    /// The next event; `None` after the one that tells of the task's end.
    pub async fn next(&mut self) -> Option<Result<TaskEvent, ClientError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            match self.body.next().await? {
                Ok(bytes) => {
                    self.buffer.extend_from_slice(bytes.chunk());
                    if let Err(error) = self.take_lines() {
                        return Some(Err(error));
                    }
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Server-sent events: only `data:` lines matter here, each holds one event whole.
    fn take_lines(&mut self) -> Result<(), ClientError> {
        while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            if let Some(data) = line.strip_prefix(b"data:") {
                self.ready.push_back(serde_json::from_slice(data).map_err(protocol)?);
            }
        }
        if self.buffer.len() > MAX_LINE { Err(protocol("an event without end")) } else { Ok(()) }
    }
}

/// A connection that was turned into something else, such as a VM's console: raw bytes both ways.
#[derive(Debug)]
pub struct Console {
    io: TokioIo<hyper::upgrade::Upgraded>,
}

impl Console {
    pub(super) fn new(upgraded: hyper::upgrade::Upgraded) -> Self {
        Self { io: TokioIo::new(upgraded) }
    }
}

impl AsyncRead for Console {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Console {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
