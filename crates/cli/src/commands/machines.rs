//! `clan machines`: a clan's machines and how they are reached.

use clan_api::MachineInfo;
use clan_types::Timestamp;

use crate::{
    context::Context,
    error::CliError,
    printer::Tone,
    table::{Cell, Table},
    words,
};

/// Arguments of `clan machines`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which clan, if you are in several
    clan: Option<String>,
}

/// Prints the machines.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let machines = context.ask(context.client.machines(&clan)).await?;
    if context.printer.is_json() {
        return context.printer.json(&machines);
    }
    table(&machines, words::now()).print(&context.printer)
}

/// Machines with their paths, and why they are what they are.
pub(crate) fn table(machines: &[MachineInfo], now: Timestamp) -> Table {
    let mut table = Table::new(&["MACHINE", "OWNER", "CONTROL", "PATH", "WHY"]);
    for machine in machines {
        let (tone, path) = match (&machine.path, machine.last_seen) {
            (Some(path), _) => words::path(path),
            (None, Some(then)) => (Tone::Faint, format!("seen {}", words::ago(now, then))),
            (None, None) => (Tone::Faint, "never seen".to_owned()),
        };
        let why = machine.path.as_ref().filter(|_| !machine.this).map_or("", |p| p.why.as_str());
        let behind = machine.behind.as_ref().map(|front| format!("standard WireGuard, behind {front}"));
        let why = behind.as_deref().unwrap_or(why);
        let owner = machine.owner_name.as_ref().map_or_else(|| machine.owner.short(), ToString::to_string);
        let control = machine.control_mode.map_or("-", words::control);
        table.row([machine.name.as_str().into(), owner.into(), control.into(), Cell::toned(tone, path), why.into()]);
    }
    table
}
