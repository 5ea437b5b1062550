//! A terminal on a machine of the clan, or a command there.

use std::io::IsTerminal as _;

use clan_api::{Console, TerminalQuery};
use clan_wire::{
    codec,
    helm::{INPUT_WINDOW, Input, MAX_FRAME, Output, Refusal, Size},
};
use rustix::termios::tcgetwinsize;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::steer::Which;
use crate::{commands::vm::RawTerminal, context::Context, error::CliError, printer::harmless};

/// Frames that wait to be shown.
const QUEUE: usize = 16;

/// Arguments of `clan machine terminal`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  clan machine terminal desk                        a shell
  clan machine terminal desk -- journalctl -n 20    a command; ends with its exit status
A virtual machine gives a shell of its root, a computer that is a machine itself one of the user who lets the admins in.
That you were there, and how long, is in the machine's journal; not what you typed.")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Which,
    /// What to run, instead of a shell
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs it to its end, and ends as it did.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.which.clan).await?;
    // Where a person sees it, it is a terminal there too.
    let screen = std::io::stdin().is_terminal() && context.printer.stdout_is_terminal();
    if !screen && args.command.is_empty() {
        return Err(CliError::refused("terminal", "a shell needs a terminal")
            .why("the input or the output is none")
            .hint("name what to run: `clan machine terminal NAME -- COMMAND`"));
    }
    let size = if screen { size() } else { None };
    let query = TerminalQuery {
        command: (!args.command.is_empty()).then(|| serde_json::json!(args.command).to_string()),
        rows: size.map(|s| s.rows),
        columns: size.map(|s| s.columns),
        term: size.and(std::env::var("TERM").ok()),
    };
    let opened = context.ask(context.client.machine_terminal(&clan, &args.which.name, &query)).await?;
    let raw = if size.is_some() { RawTerminal::new() } else { None };
    let ended = converse(opened, size.is_some(), context).await;
    drop(raw);
    match ended? {
        Output::Exit(0) => Ok(()),
        Output::Exit(status) => Err(CliError::passed_on(status)),
        Output::Cut(refusal) => Err(cut(&refusal, &args.which.name)),
        Output::Data(_) | Output::Aside(_) | Output::Taken(_) => Err(broken("it did not say how it ended")),
    }
}

fn size() -> Option<Size> {
    let window = tcgetwinsize(std::io::stdout()).ok()?;
    Some(Size { rows: window.ws_row, columns: window.ws_col })
}

fn broken(why: impl std::fmt::Display) -> CliError {
    CliError::refused("terminal", "the terminal broke off").why(why)
}

fn cut(refusal: &Refusal, name: &str) -> CliError {
    let name = harmless(name);
    CliError::refused("not_allowed", format!("the terminal on {name} was cut off")).why(match refusal {
        Refusal::Local => "its user steers it alone now: its control mode is local".to_owned(),
        Refusal::Remote => "the clan's admins steer it now: its control mode is remote".to_owned(),
        Refusal::NotAdmin => "you are no admin of the clan any more".to_owned(),
        other => other.to_string(),
    })
}

/// Passes everything on until the end, which is given.
async fn converse(console: Console, screen: bool, context: &Context) -> Result<Output, CliError> {
    let (from, mut to) = tokio::io::split(console);
    let (shown, mut frames) = mpsc::channel(QUEUE);
    // Whole frames are received in a task of their own, whatever happens here meanwhile.
    let receiver = tokio::spawn(receive(from, shown));
    let mut stdin = tokio::io::stdin();
    let mut typed = vec![0u8; 16 << 10];
    // What the machine has no room for yet is left in the pipe, so that nothing here ever waits for the program there.
    let mut room = INPUT_WINDOW;
    let mut resized = signal(SignalKind::window_change()).map_err(broken)?;
    let mut open = true;
    let ended = loop {
        tokio::select! {
            frame = frames.recv() => match frame {
                Some(Ok(Output::Data(bytes))) => context.printer.raw(&bytes)?,
                Some(Ok(Output::Aside(bytes))) => aside(&bytes),
                Some(Ok(Output::Taken(count))) => {
                    room = room.saturating_add(usize::try_from(count).unwrap_or(usize::MAX)).min(INPUT_WINDOW);
                }
                Some(Ok(last)) => break Ok(last),
                Some(Err(why)) => break Err(broken(why)),
                None => break Err(broken("the connection is gone")),
            },
            count = stdin.read(head(&mut typed, room)), if open && room > 0 => {
                let count = count.map_err(broken)?;
                open = count > 0;
                room -= count;
                let input = if open { Input::Data(typed[..count].to_vec()) } else { Input::End };
                send(&mut to, &input).await?;
            }
            _ = resized.recv(), if screen => {
                if let Some(size) = size() {
                    send(&mut to, &Input::Resize(size)).await?;
                }
            }
        }
    };
    receiver.abort();
    ended
}

fn head(bytes: &mut [u8], most: usize) -> &mut [u8] {
    let count = bytes.len().min(most);
    bytes.split_at_mut(count).0
}

fn aside(bytes: &[u8]) {
    use std::io::Write as _;
    // Nobody reads it: the command goes on all the same.
    let _ = std::io::stderr().write_all(bytes);
}

async fn receive(mut from: ReadHalf<Console>, shown: mpsc::Sender<Result<Output, String>>) {
    loop {
        let frame = next::<Output>(&mut from).await;
        let over = frame.is_err();
        if shown.send(frame).await.is_err() || over {
            return;
        }
    }
}

async fn next<T: DeserializeOwned>(from: &mut ReadHalf<Console>) -> Result<T, String> {
    let mut prefix = [0; codec::PREFIX];
    from.read_exact(&mut prefix).await.map_err(|_| "the connection is gone".to_owned())?;
    let length = codec::body_length(prefix, MAX_FRAME).map_err(|e| e.to_string())?;
    let mut body = vec![0; length];
    from.read_exact(&mut body).await.map_err(|_| "the connection is gone".to_owned())?;
    codec::decode(&body).map_err(|e| e.to_string())
}

async fn send<T: Serialize>(to: &mut WriteHalf<Console>, frame: &T) -> Result<(), CliError> {
    let bytes = codec::encode(frame, MAX_FRAME).map_err(broken)?;
    to.write_all(&bytes).await.map_err(broken)?;
    to.flush().await.map_err(broken)
}
