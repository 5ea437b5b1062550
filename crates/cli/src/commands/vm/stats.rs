//! What a VM uses.

use std::time::Duration;

use clan_api::{StatsPoint, UnitInfo};

use super::Which;
use crate::{context::Context, error::CliError, printer::harmless, table::Table, words};

/// Shows it.
pub(crate) async fn run(which: Which, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(which.clan).await?;
    let stats = context.ask(context.client.vm_stats(&vm)).await?;
    if context.printer.is_json() {
        return context.printer.json(&stats);
    }
    let Some(latest) = &stats.latest else {
        context.printer.talk("It has told nothing yet: it does not run, or has just been started.");
        return Ok(());
    };
    show(latest, &stats.units, context)
}

/// What a machine uses, and how its services are.
pub(crate) fn show(latest: &StatsPoint, units: &[UnitInfo], context: &Context) -> Result<(), CliError> {
    let mut table = Table::new(&["CPU", "MEMORY", "DISK", "RECEIVED", "SENT", "UP"]);
    table.row([
        format!("{} %", latest.cpu_permille / 10).into(),
        format!("{} / {}", latest.memory_used, latest.memory_total).into(),
        format!("{} / {}", latest.disk_used, latest.disk_total).into(),
        latest.net_received.to_string().into(),
        latest.net_sent.to_string().into(),
        words::span(Duration::from_secs(latest.uptime_s)).into(),
    ]);
    table.print(&context.printer)?;
    if !units.is_empty() {
        let mut table = Table::new(&["SERVICE", "STATE"]);
        for unit in units {
            table.row([harmless(&unit.name).as_ref().into(), harmless(&unit.state).as_ref().into()]);
        }
        table.print(&context.printer)?;
    }
    Ok(())
}
