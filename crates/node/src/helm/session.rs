//! A terminal of somebody who steers: bytes both ways, for as long as they may.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use clan_os::{
    channel::{recv_message, send_message},
    terminal::{Program, Said, Terminal},
};
use clan_wire::helm::{
    Answer, Deed, INPUT_WINDOW, Input, MAX_ANSWER, MAX_FRAME, OpenTerminal, Output, Refusal, Request,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{Caller, FAREWELL, Failure, Helm, PATIENCE, refuse};
use crate::{
    core::{CoreHandle, now},
    host::Host,
};

/// Frames that wait for a slow network; the program waits then.
const QUEUE: usize = 4;
/// Bytes given to the program at a time, after which there is room for as many.
const CHUNK: usize = 16 << 10;

impl Helm {
    /// Runs a terminal to its end.
    pub(super) async fn terminal<W, R>(
        &self,
        caller: &Caller,
        open: OpenTerminal,
        send: &mut W,
        recv: &mut R,
        core: &CoreHandle,
    ) where
        W: AsyncWrite + Unpin + Send,
        R: AsyncRead + Unpin + Send,
    {
        let Ok(_room) = self.terminals.try_acquire() else {
            let _ = refuse(send, Refusal::Busy).await;
            return;
        };
        let request = Request::Terminal(open.clone());
        let answer = match self.start(caller, open, &request, core) {
            Ok((terminal, number)) => {
                if send_message(send, &Answer::Terminal, MAX_ANSWER).await.is_ok() {
                    self.pass(caller, &request, terminal, send, recv, core).await;
                } else {
                    drop(terminal);
                }
                let ended = self.write(|kept| {
                    kept.note_end(number, now());
                    Ok(())
                });
                if ended.is_err() {
                    tracing::warn!(number, "that a terminal ended could not be written down");
                }
                return;
            }
            Err(failure) => Answer::from(failure),
        };
        let _ = timeout(PATIENCE, send_message(send, &answer, MAX_ANSWER)).await;
    }

    /// The terminal, and the number of its entry, which is on disk before anything runs.
    fn start(
        &self,
        caller: &Caller,
        open: OpenTerminal,
        request: &Request,
        core: &CoreHandle,
    ) -> Result<(Terminal, u64), Failure> {
        let done = self.change(caller, request, false, core, |kept, by| {
            Ok(Some(kept.note(by, Deed::Terminal { ended: None }, now())))
        })?;
        let Answer::Done(entry) = done else { return Err(Failure::Failed("it was not written down".to_owned())) };
        let program = Program {
            screen: open.screen.map(|(size, term)| (size.rows, size.columns, term)),
            command: open.command,
            // INVARIANT: a computer's user gives away what is theirs, and no right of the controller's.
            user: match &self.host {
                Host::Guest | Host::Container(_) => None,
                Host::Computer(computer) => Some(computer.user),
            },
        };
        match Terminal::start(&program) {
            Ok(terminal) => Ok((terminal, entry.number)),
            Err(error) => {
                let what = program.command.first().map_or("a shell", String::as_str);
                let _ = self.write(|kept| {
                    kept.note_end(entry.number, now());
                    Ok(())
                });
                Err(Failure::Failed(format!("{what} cannot be started: {error}")))
            }
        }
    }

    async fn pass<W, R>(
        &self,
        caller: &Caller,
        request: &Request,
        terminal: Terminal,
        send: &mut W,
        recv: &mut R,
        core: &CoreHandle,
    ) where
        W: AsyncWrite + Unpin + Send,
        R: AsyncRead + Unpin + Send,
    {
        let (out, mut frames) = mpsc::channel(QUEUE);
        // On its own, so that no frame is cut in two by what happens meanwhile.
        let writer = async {
            while let Some(frame) = frames.recv().await {
                if send_message(send, &frame, MAX_FRAME).await.is_err() {
                    return;
                }
            }
        };
        let typed = Typed::default();
        let session = async {
            let last = tokio::select! {
                biased;
                refusal = self.lapsed(caller, request, core) => {
                    tracing::info!(?caller, %refusal, "a terminal is cut");
                    Some(Output::Cut(refusal))
                }
                status = say(&terminal, &out) => status.map(Output::Exit),
                // None: they hung up.
                refusal = hear(&terminal, &typed, recv) => refusal.map(Output::Cut),
                () = feed(&terminal, &typed, &out) => None,
            };
            // INVARIANT: nothing runs any more when its end is told.
            drop(terminal);
            if let Some(last) = last {
                let _ = timeout(FAREWELL, out.send(last)).await;
            }
            drop(out);
        };
        let mut writer = std::pin::pin!(writer);
        tokio::select! {
            () = &mut writer => {}
            () = session => {
                let _ = timeout(FAREWELL, writer).await;
            }
        }
    }
}

/// Passes on what the program says, until it ends: with which status; `None` if nobody listens.
async fn say(terminal: &Terminal, out: &mpsc::Sender<Output>) -> Option<u8> {
    loop {
        let frame = match terminal.next().await {
            Ok(Said::Output(bytes)) => Output::Data(bytes),
            Ok(Said::Aside(bytes)) => Output::Aside(bytes),
            Ok(Said::Ended(status)) => return Some(status),
            Err(error) => {
                tracing::warn!(%error, "a terminal broke");
                return None;
            }
        };
        out.send(frame).await.ok()?;
    }
}

/// Keeps what is typed, until they hang up, or send more than there is room for. Waits for no program, so that a hang-up is noticed
/// at once.
async fn hear<R: AsyncRead + Unpin>(terminal: &Terminal, typed: &Typed, recv: &mut R) -> Option<Refusal> {
    while let Ok(input) = recv_message::<Input, _>(recv, MAX_FRAME).await {
        match input {
            Input::Data(bytes) if !typed.add(&bytes) => return Some(Refusal::Malformed),
            Input::Data(_) => {}
            Input::Resize(size) => {
                if let Err(error) = terminal.resize(size.rows, size.columns) {
                    tracing::debug!(%error, "a terminal does not change its size");
                }
            }
            Input::End => typed.end(),
        }
    }
    None
}

/// Gives the program what was typed, as it takes it, and says so. Ends if nobody listens.
async fn feed(terminal: &Terminal, typed: &Typed, out: &mpsc::Sender<Output>) {
    while let Some(bytes) = typed.next().await {
        if let Err(error) = terminal.write(&bytes).await {
            // A program that has closed its input takes nothing more, and may go on.
            tracing::debug!(%error, "a program does not take what is typed");
        }
        let taken = typed.taken(bytes.len());
        if out.send(Output::Taken(taken)).await.is_err() {
            return;
        }
    }
    if let Err(error) = terminal.end_input().await {
        tracing::debug!(%error, "a program's input cannot be ended");
    }
    std::future::pending().await
}

/// What was typed and the program has not taken.
#[derive(Default)]
struct Typed {
    waiting: Mutex<Waiting>,
    more: Notify,
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// Bytes that are being given to the program.
    under_way: usize,
    /// Nothing more will be typed.
    over: bool,
}

impl Typed {
    /// Whether there was room.
    fn add(&self, bytes: &[u8]) -> bool {
        let mut waiting = self.lock();
        // INVARIANT: no more is kept than was said that there is room for.
        if waiting.over || waiting.bytes.len() + waiting.under_way + bytes.len() > INPUT_WINDOW {
            return false;
        }
        waiting.bytes.extend(bytes);
        self.more.notify_one();
        true
    }

    fn end(&self) {
        self.lock().over = true;
        self.more.notify_one();
    }

    /// What is next for the program; `None` after the last.
    async fn next(&self) -> Option<Vec<u8>> {
        loop {
            {
                let mut waiting = self.lock();
                if !waiting.bytes.is_empty() {
                    let count = waiting.bytes.len().min(CHUNK);
                    waiting.under_way = count;
                    return Some(waiting.bytes.drain(..count).collect());
                }
                if waiting.over {
                    return None;
                }
            }
            self.more.notified().await;
        }
    }

    fn taken(&self, count: usize) -> u32 {
        self.lock().under_way = 0;
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Held for a copy at most, never across an await.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
