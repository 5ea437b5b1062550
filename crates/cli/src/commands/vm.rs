//! `clan vm`: this computer's machines: virtual ones, and itself where it is integrated.

use std::{io, time::Duration};

use clan_api::{
    ByteStream, ChangePassphrase, Console, DeleteQuery, Flavour, LogQuery, LogSource, TaskInfo, UnlockVm, UpdateVm,
    VmInfo,
};

mod control;
mod disk;
pub(crate) mod stats;
mod update;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    commands::passphrase,
    context::Context,
    error::CliError,
    printer::is_harmful,
    progress,
    table::{Cell, Table},
    words,
};

/// Ctrl-] ends a console, as in telnet.
const ESCAPE: u8 = 0x1d;

/// Which virtual machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// Its clan, if you are in several
    clan: Option<String>,
}

/// Which part of a log.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct LogPart {
    /// So many lines back
    #[arg(long, short = 'n', default_value_t = 200, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    lines: u32,
    /// Go on as lines appear
    #[arg(long, short)]
    follow: bool,
}

impl LogPart {
    /// The same, asked of one source.
    pub(crate) fn of(self, source: LogSource) -> LogQuery {
        LogQuery { lines: self.lines, follow: self.follow, source }
    }
}

/// Verbs of `clan vm`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Show this computer's machines
    #[command(alias = "ls")]
    List,
    /// Start one
    Start(Which),
    /// Stop one in good order
    Stop(Which),
    /// Stop one in good order and start it again
    Restart(Which),
    /// Halt one; its memory is kept, and nothing in it goes on
    Pause(Which),
    /// Let a paused one go on
    Resume(Which),
    /// Open the encrypted disk of one, which then starts if it is to run
    Unlock {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        from: passphrase::Source,
    },
    /// Have the manager forget the passphrase of one that is stopped
    Lock(Which),
    /// Give its encrypted disk, and the copies of it, another passphrase
    Passphrase {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        change: passphrase::Change,
    },
    /// Make a copy of its disk, to come back to
    Snapshot(disk::Make),
    /// Show the copies of its disk
    Snapshots(Which),
    /// Put a copy of its disk back in its place; what was written since is lost
    Restore(disk::Named),
    /// Remove a copy of its disk
    Discard(disk::Named),
    /// Give one another image; its disk stays, and if it is not well afterwards it gets its previous image back
    Update {
        #[command(flatten)]
        which: Which,
        /// An image on this computer, as `clan image list` shows them [default: what newcomers run; it comes from members]
        #[arg(long, value_name = "ID")]
        image: Option<String>,
        /// The image of this version of clan, built here unless it is there
        #[arg(long, conflicts_with = "image")]
        build: bool,
        /// Only say which image it would be, and how much of it has to come
        #[arg(long)]
        dry_run: bool,
    },
    /// Give one another size: memory and processors from its next start on, a larger disk at once
    Resize(disk::Resize),
    /// Say who may steer one: you, the clan's admins, or both
    Control(control::Args),
    /// Show what one uses, and how its services are
    Stats(Which),
    /// Print its log
    Logs {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        part: LogPart,
        /// What was written to the console instead of the journal; there even when the machine is not
        #[arg(long)]
        console: bool,
    },
    /// Attach the terminal to its console, or to a shell in a container; Ctrl-] detaches
    Console(Which),
    /// Delete one and its disk
    Delete {
        #[command(flatten)]
        which: Which,
        /// Only say what would happen
        #[arg(long)]
        dry_run: bool,
        /// Even if it is still in its clan, which keeps its entry then; `clan leave` is better
        #[arg(long)]
        force: bool,
    },
}

/// Does what the verb says.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    match verb {
        Verb::List => list(context).await,
        Verb::Start(which) => {
            let vm = context.clan(which.clan).await?;
            follow(context, context.ask(context.client.start_vm(&vm)).await?).await
        }
        Verb::Stop(which) => {
            let vm = context.clan(which.clan).await?;
            follow(context, context.ask(context.client.stop_vm(&vm)).await?).await
        }
        Verb::Restart(which) => {
            let vm = context.clan(which.clan).await?;
            follow(context, context.ask(context.client.restart_vm(&vm)).await?).await
        }
        Verb::Update { which, image, build, dry_run } => {
            update::run(which.clan, UpdateVm { image, build }, dry_run, context).await
        }
        Verb::Pause(which) => {
            let vm = context.clan(which.clan).await?;
            follow(context, context.ask(context.client.pause_vm(&vm)).await?).await
        }
        Verb::Resume(which) => {
            let vm = context.clan(which.clan).await?;
            follow(context, context.ask(context.client.resume_vm(&vm)).await?).await
        }
        Verb::Unlock { which, from } => {
            let vm = context.clan(which.clan).await?;
            let request = UnlockVm { passphrase: from.passphrase(context)? };
            told(context.ask(context.client.unlock_vm(&vm, &request)).await?, "is unlocked", context)
        }
        Verb::Lock(which) => {
            let vm = context.clan(which.clan).await?;
            told(context.ask(context.client.lock_vm(&vm)).await?, "is locked", context)
        }
        Verb::Passphrase { which, change } => {
            let vm = context.clan(which.clan).await?;
            let (old, new) = change.passphrases(context)?;
            let task = context.ask(context.client.change_passphrase(&vm, &ChangePassphrase { old, new })).await?;
            follow(context, task).await
        }
        Verb::Snapshot(args) => disk::make(args, context).await,
        Verb::Snapshots(which) => disk::list(which, context).await,
        Verb::Restore(args) => disk::restore(args, context).await,
        Verb::Discard(args) => disk::discard(args, context).await,
        Verb::Resize(args) => disk::resize(args, context).await,
        Verb::Control(args) => control::run(args, context).await,
        Verb::Stats(which) => stats::run(which, context).await,
        Verb::Logs { which, part, console } => {
            let vm = context.clan(which.clan).await?;
            let query = part.of(if console { LogSource::Console } else { LogSource::Journal });
            print_log(context.ask(context.client.vm_logs(&vm, query)).await?, context).await
        }
        Verb::Console(which) => {
            let vm = context.clan(which.clan).await?;
            attach(context.ask(context.client.vm_console(&vm)).await?, context).await
        }
        Verb::Delete { which, dry_run, force } => {
            let named = context.clan(which.clan).await?;
            let vms = context.ask(context.client.vms()).await?;
            let vm = vms.iter().find(|v| v.clan.as_str() == named || v.id.to_string() == named);
            let shown = vm.map_or_else(|| named.clone(), |v| format!("{} ({})", v.machine, v.clan));
            let question = match vm.map(|v| v.flavour) {
                Some(Flavour::Integrated) => {
                    format!("Have this computer forget that it is {shown}, with its keys in the clan?")
                }
                Some(Flavour::Container) => format!("Delete the container {shown} and everything in it?"),
                _ => format!("Delete the virtual machine {shown} and everything on its disk?"),
            };
            if dry_run {
                if context.printer.is_json() {
                    return context.printer.json(&vm);
                }
                context.printer.talk(&format!("Would ask: {question}"));
                return Ok(());
            }
            context.confirm(&question, "delete without being asked")?;
            follow(context, context.ask(context.client.delete_vm(&named, DeleteQuery { force })).await?).await
        }
    }
}

async fn follow(context: &Context, task: TaskInfo) -> Result<(), CliError> {
    let task = progress::follow(context, task).await?;
    if context.printer.is_json() { context.printer.json(&task) } else { Ok(()) }
}

fn told(vm: VmInfo, what: &str, context: &Context) -> Result<(), CliError> {
    if context.printer.is_json() {
        return context.printer.json(&vm);
    }
    context.printer.talk(&format!("The disk of {} ({}) {what}.", vm.machine, vm.clan));
    Ok(())
}

async fn list(context: &Context) -> Result<(), CliError> {
    let vms = context.ask(context.client.vms()).await?;
    if context.printer.is_json() {
        return context.printer.json(&vms);
    }
    if vms.is_empty() {
        context.printer.talk("No machine of a clan is here yet: `clan create NAME` or `clan join LINK` makes one.");
        return Ok(());
    }
    let mut table =
        Table::new(&["CLAN", "MACHINE", "KIND", "CONTROL", "STATE", "SINCE", "CPU", "MEMORY", "DISK", "WHY"]);
    for vm in &vms {
        let (tone, state) = words::vm_state(vm.state);
        let stats = vm.stats.as_ref();
        table.row([
            vm.clan.as_str().into(),
            vm.machine.as_str().into(),
            if vm.encrypted { "VM, encrypted" } else { words::flavour(vm.flavour) }.into(),
            words::control(vm.control_mode).into(),
            Cell::toned(tone, state),
            since(vm).into(),
            stats.map_or_else(String::new, |s| format!("{} %", s.cpu_permille / 10)).into(),
            match (stats, vm.flavour) {
                (Some(stats), _) => format!("{} / {}", stats.memory_used, stats.memory_total).into(),
                (None, Flavour::Vm) => vm.memory.to_string().into(),
                (None, Flavour::Container | Flavour::Integrated) => "".into(),
            },
            match vm.flavour {
                Flavour::Vm => vm.disk_used.to_string().into(),
                Flavour::Container | Flavour::Integrated => "".into(),
            },
            vm.reason.as_deref().unwrap_or_default().into(),
        ]);
    }
    table.print(&context.printer)?;
    for line in vms.iter().filter_map(words::published) {
        context.printer.talk(&line);
    }
    for (vm, exposure) in vms.iter().filter_map(|vm| Some((vm, vm.exposure.as_ref()?))) {
        context.printer.talk(&format!("{}: {exposure}", vm.clan));
    }
    let unlimited: std::collections::BTreeSet<&str> = vms.iter().filter_map(|vm| vm.unlimited.as_deref()).collect();
    for why in unlimited {
        context.printer.talk(&format!("No limits but a lower priority: {why}."));
    }
    Ok(())
}

fn since(vm: &VmInfo) -> String {
    words::span(Duration::from_secs(words::now().since(vm.since).as_secs().max(10)))
}

/// A terminal gets text without control sequences, everything else gets the bytes.
pub(crate) async fn print_log(mut log: ByteStream, context: &Context) -> Result<(), CliError> {
    let terminal = context.printer.stdout_is_terminal();
    let mut text = Vec::new();
    while let Some(bytes) = log.next().await {
        let bytes = bytes?;
        if !terminal {
            context.printer.raw(&bytes)?;
            continue;
        }
        text.extend_from_slice(&bytes);
        // Whole lines only: a character may be cut at the end of what has arrived.
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        context.printer.raw(readable(&text[..whole]).as_bytes())?;
        text.drain(..whole);
    }
    context.printer.raw(readable(&text).as_bytes())
}

fn readable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .replace("\r\n", "\n")
        .chars()
        .map(|c| if matches!(c, '\n' | '\t') || !is_harmful(c) { c } else { '·' })
        .collect()
}

async fn attach(console: Console, context: &Context) -> Result<(), CliError> {
    let failed = |e: io::Error| CliError::refused("console", "the console broke off").why(e);
    let raw = RawTerminal::new();
    if raw.is_some() {
        context.printer.talk("Attached. Ctrl-] detaches.\r");
    }
    let (mut from_guest, mut to_guest) = tokio::io::split(console);
    let mut stdin = tokio::io::stdin();
    let (mut typed, mut shown) = ([0u8; 1024], vec![0u8; 16 << 10]);
    let mut open = true;
    loop {
        tokio::select! {
            count = from_guest.read(&mut shown) => match count.map_err(failed)? {
                0 => break,
                count => context.printer.raw(&shown[..count])?,
            },
            count = stdin.read(&mut typed), if open => {
                let count = count.map_err(failed)?;
                let keys = &typed[..count];
                let end = raw.as_ref().and_then(|_| keys.iter().position(|k| *k == ESCAPE));
                to_guest.write_all(&keys[..end.unwrap_or(count)]).await.map_err(failed)?;
                to_guest.flush().await.map_err(failed)?;
                if end.is_some() {
                    break;
                }
                // Piped input has ended; what the guest still says is worth reading.
                open = count > 0;
            }
        }
    }
    if raw.is_some() {
        context.printer.talk("\r\nDetached.\r");
    }
    Ok(())
}

/// The terminal passes every key on; it is as before when this is dropped.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` if stdin is no terminal.
    pub(crate) fn new() -> Option<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_cannot_steer_the_terminal() {
        assert_eq!(readable(b"one\r\n\x1b]0;title\x07\ttwo\xff\n"), "one\n·]0;title·\ttwo\u{fffd}\n");
    }
}
