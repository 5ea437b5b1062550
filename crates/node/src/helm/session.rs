//! A terminal of somebody who steers: bytes both ways, for as long as they may.

use clan_os::{
    channel::{recv_message, send_message},
    terminal::{Program, Said, Terminal},
};
use clan_wire::helm::{Answer, Deed, Input, MAX_ANSWER, MAX_FRAME, OpenTerminal, Output, Refusal, Request};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::timeout,
};

use super::{Caller, FAREWELL, Failure, Helm, PATIENCE, refuse};
use crate::{
    core::{CoreHandle, now},
    host::Host,
};

/// Frames that wait for a slow network; the program waits then.
const QUEUE: usize = 4;

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
        let Ok(_room) = self.terminals.try_acquire() else { return refuse(send, Refusal::Busy).await };
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
        let session = async {
            let last = tokio::select! {
                biased;
                refusal = self.lapsed(caller, request, core) => {
                    tracing::info!(?caller, %refusal, "a terminal is cut");
                    Some(Output::Cut(refusal))
                }
                status = say(&terminal, &out) => status.map(Output::Exit),
                // They hung up.
                () = hear(&terminal, recv) => None,
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

/// Passes on what is typed, until they hang up.
async fn hear<R: AsyncRead + Unpin>(terminal: &Terminal, recv: &mut R) {
    while let Ok(input) = recv_message::<Input, _>(recv, MAX_FRAME).await {
        let taken = match input {
            Input::Data(bytes) => terminal.write(&bytes).await,
            Input::Resize(size) => terminal.resize(size.rows, size.columns),
            Input::End => terminal.end_input().await,
        };
        if let Err(error) = taken {
            // A program that has closed its input takes nothing more, and may go on.
            tracing::debug!(%error, "a program does not take what is typed");
        }
    }
}
