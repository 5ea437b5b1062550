//! Copies of a VM's disk, and its size.

use clan_api::{MakeSnapshot, ResizeVm, SnapshotInfo};
use clan_types::ByteSize;

use super::{Which, follow};
use crate::{context::Context, error::CliError, printer::harmless, table::Table, words};

/// A copy to make.
#[derive(Debug, clap::Args)]
pub(crate) struct Make {
    #[command(flatten)]
    which: Which,
    /// What to call it [default: one that tells the time]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// A copy that there is.
#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    /// Which copy, as `clan vm snapshots` shows them
    name: String,
    #[command(flatten)]
    which: Which,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Another size.
#[derive(Debug, clap::Args)]
#[group(id = "sizes", required = true, multiple = true, args = ["memory", "cpus", "disk"])]
pub(crate) struct Resize {
    #[command(flatten)]
    which: Which,
    /// Memory, such as 512M or 1G
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Processors
    #[arg(long, value_name = "COUNT")]
    cpus: Option<u32>,
    /// Disk, such as 4G; it only grows
    #[arg(long, value_name = "SIZE")]
    disk: Option<ByteSize>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Makes a copy.
pub(crate) async fn make(args: Make, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(args.which.clan).await?;
    let request = MakeSnapshot { name: args.name };
    follow(context, context.ask(context.client.make_snapshot(&vm, &request)).await?).await
}

/// Shows the copies.
pub(crate) async fn list(which: Which, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(which.clan).await?;
    let snapshots = context.ask(context.client.snapshots(&vm)).await?;
    if context.printer.is_json() {
        return context.printer.json(&snapshots);
    }
    if snapshots.is_empty() {
        context.printer.talk("There is no copy of its disk yet: `clan vm snapshot` makes one.");
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "AGE", "SIZE", "TAKES", "VM WAS"]);
    for snapshot in &snapshots {
        table.row([
            harmless(&snapshot.name).as_ref().into(),
            age(snapshot).into(),
            snapshot.size.to_string().into(),
            snapshot.used.to_string().into(),
            if snapshot.running { "running" } else { "stopped" }.into(),
        ]);
    }
    table.print(&context.printer)
}

fn age(snapshot: &SnapshotInfo) -> String {
    words::span(std::time::Duration::from_secs(words::now().since(snapshot.made).as_secs().max(1)))
}

/// The copy that was named, as the manager knows it; what was shown is what is meant from then on.
async fn find(vm: &str, name: &str, context: &Context) -> Result<SnapshotInfo, CliError> {
    let known = context.ask(context.client.snapshots(vm)).await?;
    known.into_iter().find(|s| s.name == name).ok_or_else(|| {
        CliError::refused("not_found", "there is no such copy of its disk").hint("see them: `clan vm snapshots`")
    })
}

/// Puts a copy back.
pub(crate) async fn restore(args: Named, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(args.which.clan).await?;
    let snapshot = find(&vm, &args.name, context).await?;
    let question = format!(
        "Put the disk back as it was {} ago ({})? What was written since is lost.",
        age(&snapshot),
        harmless(&snapshot.name)
    );
    if args.dry_run {
        return would(&snapshot, &question, context);
    }
    context.confirm(&question, "restore without being asked")?;
    follow(context, context.ask(context.client.restore_snapshot(&vm, &snapshot.name)).await?).await
}

/// Removes a copy.
pub(crate) async fn discard(args: Named, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(args.which.clan).await?;
    let snapshot = find(&vm, &args.name, context).await?;
    let question = format!("Remove the copy {} of the disk, {} old?", harmless(&snapshot.name), age(&snapshot));
    if args.dry_run {
        return would(&snapshot, &question, context);
    }
    context.confirm(&question, "remove it without being asked")?;
    follow(context, context.ask(context.client.discard_snapshot(&vm, &snapshot.name)).await?).await
}

fn would(snapshot: &SnapshotInfo, question: &str, context: &Context) -> Result<(), CliError> {
    if context.printer.is_json() {
        return context.printer.json(snapshot);
    }
    context.printer.talk(&format!("Would ask: {question}"));
    Ok(())
}

/// Gives it another size.
pub(crate) async fn resize(args: Resize, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(args.which.clan).await?;
    let request = ResizeVm { memory: args.memory, cpus: args.cpus, disk: args.disk, dry_run: args.dry_run };
    let size = context.ask(context.client.resize_vm(&vm, &request)).await?;
    if context.printer.is_json() {
        return context.printer.json(&size);
    }
    let verb = if args.dry_run { "It would have" } else { "It has" };
    let cpus = words::count(usize::try_from(size.cpus).unwrap_or(usize::MAX), "processor");
    context.printer.talk(&format!("{verb} {} of memory, {cpus}, and a disk of {}.", size.memory, size.disk));
    if size.restart_needed {
        context.printer.talk("Memory and processors from its next start on: `clan vm restart`.");
    }
    Ok(())
}
