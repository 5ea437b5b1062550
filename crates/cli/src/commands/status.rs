//! `clan status`: clans, machines, services, what needs attention.

use std::time::Duration;

use clan_api::{ClanInfo, ClanPhase, Severity, Status, TaskState, VmInfo};

use crate::{
    commands::{machines, service},
    context::Context,
    error::CliError,
    printer::{Printer, Tone, harmless},
    words,
};

/// Arguments of `clan status`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Prints everything in one.
pub(crate) async fn run(context: &Context) -> Result<(), CliError> {
    let status = context.ask(context.client.status()).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&status);
    }
    if status.clans.is_empty() {
        printer
            .talk("You are in no clan yet. Found one: `clan create NAME`. Or accept an invitation: `clan join LINK`.");
    }
    for (at, clan) in status.clans.iter().enumerate() {
        if at > 0 {
            printer.data("")?;
        }
        show(clan, status.vms.iter().find(|vm| vm.id == clan.id), &status, printer)?;
    }
    show_rest(&status, printer)
}

fn show(clan: &ClanInfo, vm: Option<&VmInfo>, status: &Status, printer: &Printer) -> Result<(), CliError> {
    let role = clan.role.map_or_else(String::new, |r| format!(", you are {r}"));
    let phase = match clan.phase {
        ClanPhase::Ready => "",
        ClanPhase::Creating => ", being founded",
        ClanPhase::Joining => ", being joined",
        ClanPhase::Leaving => ", being left",
    };
    let name = printer.out_style(Tone::Strong, clan.name.as_str());
    printer.data(&format!("{name}{role}{phase}  {}", printer.out_style(Tone::Faint, &harmless(&clan.fingerprint))))?;
    if let Some(vm) = vm {
        printer.data(&format!("  {}", vm_line(vm, status, printer)))?;
        if let Some(published) = words::published(vm) {
            printer.data(&format!("  {}", printer.out_style(Tone::Warn, &published)))?;
        }
    }
    if let (false, Some(then)) = (clan.online, clan.as_of) {
        printer.data(&format!(
            "  {}",
            printer.out_style(Tone::Warn, &format!("as of {}:", words::ago(status.now, then)))
        ))?;
    }
    let waiting: Vec<String> =
        clan.people.iter().filter(|p| p.waiting).map(|p| harmless(p.name.as_str()).into_owned()).collect();
    if !waiting.is_empty() {
        let who = format!("waiting for `clan approve`: {}", waiting.join(", "));
        printer.data(&format!("  {}", printer.out_style(Tone::Warn, &who)))?;
    }
    let width = printer.width().map(|w| w.saturating_sub(2));
    let tables = [
        (!clan.machines.is_empty()).then(|| machines::table(&clan.machines, status.now)),
        (!clan.services.is_empty()).then(|| service::table(&clan.services)),
    ];
    for table in tables.into_iter().flatten() {
        printer.data("")?;
        for line in table.lines(width, &|tone, text| printer.out_style(tone, text)) {
            printer.data(&format!("  {line}"))?;
        }
    }
    Ok(())
}

fn vm_line(vm: &VmInfo, status: &Status, printer: &Printer) -> String {
    let (tone, state) = words::vm_state(vm.state);
    let mut line = format!("{} is {}", vm.machine, printer.out_style(tone, state));
    if let Some(reason) = &vm.reason {
        line.push_str(&format!(": {}", harmless(reason)));
    }
    line.push_str(&format!(" for {}", words::span(Duration::from_secs(status.now.since(vm.since).as_secs()))));
    line.push_str(&format!(", control {}", words::control(vm.control_mode)));
    if let Some(stats) = &vm.stats {
        line.push_str(&format!(
            ", CPU {} %, memory {} of {}",
            stats.cpu_permille / 10,
            stats.memory_used,
            stats.memory_total
        ));
    }
    line
}

fn show_rest(status: &Status, printer: &Printer) -> Result<(), CliError> {
    let running: Vec<_> = status.tasks.iter().filter(|t| t.state == TaskState::Running).collect();
    if !running.is_empty() {
        printer.data("")?;
    }
    for task in running {
        let step = task
            .steps
            .iter()
            .find(|s| s.state == clan_api::StepState::Running)
            .map_or_else(String::new, |s| format!(": {}", harmless(&s.title)));
        printer.data(&format!("{} {}{step}", printer.out_style(Tone::Faint, "running:"), harmless(&task.title)))?;
    }
    let own = status.problems.iter().map(|p| {
        let clan = p.clan.as_ref().map_or_else(String::new, |c| format!("{c}: "));
        (p.severity, format!("{clan}{}", p.message), p.hints.as_slice())
    });
    let told = status
        .clans
        .iter()
        .flat_map(|c| c.problems.iter().map(move |p| (Severity::Warning, format!("{}: {p}", c.name), [].as_slice())));
    let mut said = std::collections::BTreeSet::new();
    // The manager passes on what the controllers say.
    let all = own.chain(told).filter(|(_, message, _)| said.insert(message.clone()));
    for (at, (severity, message, hints)) in all.enumerate() {
        if at == 0 {
            printer.data("")?;
        }
        let label = match severity {
            Severity::Warning => printer.out_style(Tone::Warn, "warning:"),
            Severity::Error => printer.out_style(Tone::Bad, "error:"),
        };
        printer.data(&format!("{label} {}", harmless(&message)))?;
        for hint in hints {
            printer.data(&format!("{} {}", printer.out_style(Tone::Good, "hint:"), harmless(hint)))?;
        }
    }
    Ok(())
}
