//! A client of QEMU's monitor protocol: <https://www.qemu.org/docs/master/interop/qmp-spec.html>.
//!
//! Values stay untyped: the schema differs between the QEMU versions that people have.

mod message;

use std::{future::Future, io, time::Duration};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{broadcast, mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_util::{
    codec::{Framed, LinesCodec, LinesCodecError},
    sync::CancellationToken,
};

use message::Message;

/// INVARIANT: a longer line ends the connection before more of it is kept.
const MAX_LINE: usize = 1 << 20;
const DEFAULT_LIMIT: Duration = Duration::from_secs(5);
/// For the greeting, its answer, and every write.
const STEP_LIMIT: Duration = Duration::from_secs(5);
/// QEMU listens a few hundredths of a second after its start, and everybody waits for that: the pauses between attempts grow.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
const EVENTS_KEPT: usize = 64;
const REQUESTS_KEPT: usize = 32;

/// Why the monitor did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused the command.
    #[error("QEMU refuses `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's sentence.
        description: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer `{command}` within {} ms", limit.as_millis())]
    TimedOut {
        /// The command.
        command: String,
        /// How long it had.
        limit: Duration,
    },
    /// The connection was lost before the answer came; the command may have had its effect.
    #[error("QEMU closed the connection before it answered `{command}`")]
    Disconnected {
        /// The command.
        command: String,
    },
    /// The virtual machine has ended.
    #[error("the virtual machine has ended")]
    Ended,
    /// What came is not the protocol.
    #[error("QEMU's monitor does not speak the protocol: {0}")]
    Malformed(&'static str),
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// Such as `SHUTDOWN`.
    pub name: String,
    /// Details; `Null` if there are none.
    pub data: Value,
}

/// A connection to the monitor that comes back when it is lost. Clones share it.
#[derive(Debug, Clone)]
pub struct Qmp {
    requests: mpsc::Sender<Request>,
    events: broadcast::Sender<QmpEvent>,
    /// Sessions greeted so far.
    greeted: watch::Receiver<u64>,
    /// The reason in the last SHUTDOWN event.
    shutdown: watch::Receiver<Option<String>>,
}

#[derive(Debug)]
struct Request {
    command: String,
    arguments: Value,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

impl Qmp {
    /// Executes a command; five seconds. `arguments` is an object or `Null`. While the connection is down, the command
    /// waits for it.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, DEFAULT_LIMIT).await
    }

    /// Executes a command with a limit of its own. After the limit, the command may still have its effect.
    pub async fn execute_within(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        let (answer, answered) = oneshot::channel();
        let request = Request { command: command.to_owned(), arguments, answer };
        let exchange = async {
            self.requests.send(request).await.map_err(|_| QmpError::Ended)?;
            answered.await.map_err(|_| QmpError::Ended)?
        };
        let too_late = |_| QmpError::TimedOut { command: command.to_owned(), limit };
        timeout(limit, exchange).await.map_err(too_late)?
    }

    /// Events from now on. A receiver that lags by more than 64 loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }

    /// Waits until QEMU has answered once. Never, if it does not.
    pub(crate) async fn ready(&self) {
        if self.greeted.clone().wait_for(|&sessions| sessions > 0).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Why the guest was shut down, if QEMU said so.
    pub(crate) fn shutdown_reason(&self) -> Option<String> {
        self.shutdown.borrow().clone()
    }
}

/// A client over one connection, and what serves it until that ends: for whoever has a connection, and needs no other.
pub fn over<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
) -> (Qmp, impl Future<Output = Result<(), QmpError>> + use<S>) {
    let (qmp, mut driver) = Driver::new();
    (qmp, async move { driver.session(stream).await })
}

/// The client and the task behind it, which the caller spawns. The task reconnects through `connect` until `ended` is
/// cancelled; then it reads what is left, and returns.
pub(crate) fn client<S, C, F>(connect: C, ended: CancellationToken) -> (Qmp, impl Future<Output = ()> + use<S, C, F>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    C: Fn() -> F,
    F: Future<Output = io::Result<S>>,
{
    let (qmp, mut driver) = Driver::new();
    let task = async move {
        let mut pause = FIRST_PAUSE;
        loop {
            let connected = tokio::select! {
                biased;
                () = ended.cancelled() => break,
                connected = timeout(STEP_LIMIT, connect()) => connected,
            };
            if let Ok(Ok(stream)) = connected {
                match driver.session(stream).await {
                    Ok(()) => {}
                    Err(error) => tracing::debug!(%error, "QEMU's monitor is disconnected"),
                }
            }
            tokio::select! {
                biased;
                () = ended.cancelled() => break,
                () = sleep(pause) => pause = (pause + pause / 4).min(LONGEST_PAUSE),
            }
        }
    };
    (qmp, task)
}

struct Driver {
    requests: mpsc::Receiver<Request>,
    events: broadcast::Sender<QmpEvent>,
    greeted: watch::Sender<u64>,
    shutdown: watch::Sender<Option<String>>,
}

/// A command that QEMU has not answered yet.
struct Pending {
    id: u64,
    command: String,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

impl Driver {
    fn new() -> (Qmp, Self) {
        let (requests, received) = mpsc::channel(REQUESTS_KEPT);
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (greeted, greeted_receiver) = watch::channel(0);
        let (shutdown, shutdown_receiver) = watch::channel(None);
        let qmp = Qmp { requests, events: events.clone(), greeted: greeted_receiver, shutdown: shutdown_receiver };
        (qmp, Self { requests: received, events, greeted, shutdown })
    }

    /// Serves one connection until it ends.
    async fn session<S: AsyncRead + AsyncWrite + Unpin>(&mut self, stream: S) -> Result<(), QmpError> {
        let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE));
        match timeout(STEP_LIMIT, lines.next()).await {
            Ok(Some(line)) => match Message::parse(&line.map_err(unreadable)?)? {
                Message::Greeting => {}
                _ => return Err(QmpError::Malformed("no greeting")),
            },
            // QEMU is busy with another client, or ends.
            Ok(None) => return Ok(()),
            Err(_) => return Err(QmpError::Malformed("no greeting")),
        }
        let mut pending = Vec::new();
        let mut next_id = 0;
        let (answer, mut negotiated) = oneshot::channel();
        let capabilities = Request { command: "qmp_capabilities".into(), arguments: Value::Null, answer };
        send(&mut lines, capabilities, &mut next_id, &mut pending).await?;

        let mut open = false;
        let result = loop {
            tokio::select! {
                line = lines.next() => match line {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(unreadable(error)),
                    Some(Ok(line)) => match Message::parse(&line) {
                        Ok(message) => self.receive(message, &mut pending),
                        Err(error) => break Err(error),
                    },
                },
                result = &mut negotiated, if !open => match result {
                    Ok(Ok(_)) => {
                        open = true;
                        self.greeted.send_modify(|sessions| *sessions += 1);
                    }
                    Ok(Err(error)) => break Err(error),
                    Err(_) => break Ok(()),
                },
                Some(request) = self.requests.recv(), if open => {
                    // Those whose caller gave up need not be remembered; their late answers match nothing.
                    pending.retain(|p: &Pending| !p.answer.is_closed());
                    if let Err(error) = send(&mut lines, request, &mut next_id, &mut pending).await {
                        break Err(error);
                    }
                }
            }
        };
        for Pending { command, answer, .. } in pending {
            // Whoever asked may have stopped waiting.
            let _ = answer.send(Err(QmpError::Disconnected { command }));
        }
        result
    }

    fn receive(&mut self, message: Message, pending: &mut Vec<Pending>) {
        let (id, result) = match message {
            Message::Greeting => return,
            Message::Event(event) => {
                if event.name == "SHUTDOWN" {
                    let reason = event.data.get("reason").and_then(Value::as_str).unwrap_or_default();
                    self.shutdown.send_replace(Some(reason.to_owned()));
                }
                tracing::debug!(event = event.name, "QEMU event");
                // Nobody may be listening.
                let _ = self.events.send(event);
                return;
            }
            Message::Return { id, value } => (id, Ok(value)),
            Message::Error { id, class, description } => (id, Err((class, description))),
        };
        let Some(at) = pending.iter().position(|p| Some(p.id) == id) else {
            return;
        };
        let Pending { command, answer, .. } = pending.swap_remove(at);
        let result = result.map_err(|(class, description)| QmpError::Refused { command, class, description });
        // Whoever asked may have stopped waiting.
        let _ = answer.send(result);
    }
}

async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    lines: &mut Framed<S, LinesCodec>,
    request: Request,
    next_id: &mut u64,
    pending: &mut Vec<Pending>,
) -> Result<(), QmpError> {
    let Request { command, arguments, answer } = request;
    if answer.is_closed() {
        return Ok(());
    }
    let id = *next_id;
    *next_id += 1;
    let mut line = json!({ "execute": command, "id": id });
    if !arguments.is_null() {
        line["arguments"] = arguments;
    }
    pending.push(Pending { id, command, answer });
    match timeout(STEP_LIMIT, lines.get_mut().write_all(format!("{line}\n").as_bytes())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(QmpError::Malformed("the connection broke")),
        Err(_) => Err(QmpError::Malformed("it does not read")),
    }
}

fn unreadable(error: LinesCodecError) -> QmpError {
    match error {
        LinesCodecError::MaxLineLengthExceeded => QmpError::Malformed("a line is too long"),
        LinesCodecError::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
            QmpError::Malformed("a line is no text")
        }
        LinesCodecError::Io(_) => QmpError::Malformed("the connection broke"),
    }
}

#[cfg(test)]
mod tests;
