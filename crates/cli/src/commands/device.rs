//! `clan device`: this person's devices.

use clan_api::{AddDevice, DeviceInfo, DeviceKind, DeviceOffer, RemoveDeviceQuery, RemovedDevice};

use crate::{
    context::Context,
    error::CliError,
    printer::{Printer, Tone},
    progress, qr,
    table::{Cell, Table},
    words,
};

/// What to do.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "A device is a key of yours on another computer: what it signs counts as yours.")]
pub(crate) enum Verb {
    /// Make a link that makes another computer one of your devices
    Add(AddArgs),
    /// Show your devices
    List(ListArgs),
    /// Put one of your devices out, such as a lost computer
    Remove(RemoveArgs),
}

/// Arguments of `clan device add`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The link alone goes to stdout; the other computer accepts it, or the four words, with `clan join`. It works once, for ten
minutes. Whoever has it can act for you: show it to nobody.")]
pub(crate) struct AddArgs {
    /// Which clan, if you are in several
    clan: Option<String>,
    /// A new recovery phrase instead, with which `clan recover` brings you back on a new computer
    #[arg(long)]
    recovery: bool,
    /// Show the QR code even where nobody seems to look
    #[arg(long)]
    qr: bool,
}

/// Arguments of `clan device list`.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Which clan, if you are in several
    clan: Option<String>,
    /// Also those that were put out
    #[arg(long)]
    all: bool,
}

/// Arguments of `clan device remove`.
#[derive(Debug, clap::Args)]
pub(crate) struct RemoveArgs {
    /// Name or id, as `clan device list` shows them
    device: String,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Does it.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    match verb {
        Verb::Add(args) => add(args, context).await,
        Verb::List(args) => list(args, context).await,
        Verb::Remove(args) => remove(args, context).await,
    }
}

async fn add(args: AddArgs, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let printer = &context.printer;
    let offer = context.ask(context.client.add_device(&clan, &AddDevice { recovery: args.recovery })).await?;
    if printer.is_json() {
        return printer.json(&offer);
    }
    if let Some(phrase) = &offer.recovery_phrase {
        if printer.stderr_is_terminal() {
            explain_phrase(printer);
        }
        return printer.data(phrase);
    }
    let Some(link) = &offer.link else {
        return Err(CliError::bug("the manager gave no link", "its answer is empty"));
    };
    if printer.stderr_is_terminal() {
        explain_link(&offer, printer);
    }
    if (args.qr || printer.stderr_is_terminal())
        && let Some(lines) = qr::lines(link, printer.stderr_has_colour(), printer.err_width())
    {
        lines.iter().for_each(|line| printer.talk(line));
    }
    printer.data(link)?;
    // A person waits for the other computer; a script has its link.
    let Some(task) = offer.task.filter(|_| printer.stderr_is_terminal()) else { return Ok(()) };
    let task = context.ask(context.client.task(task)).await?;
    progress::follow(context, task).await?;
    printer.talk("The other computer is one of your devices now.");
    Ok(())
}

fn explain_link(offer: &DeviceOffer, printer: &Printer) {
    printer.talk(&format!(
        "On your other computer: `clan join` with this link makes it one of your devices in {}, once, within ten minutes.",
        printer.err_style(Tone::Strong, offer.clan_name.as_str())
    ));
    printer.talk(&format!("It will show the fingerprint {}.", printer.err_style(Tone::Strong, &offer.fingerprint)));
    if let Some(words) = &offer.words {
        printer
            .talk(&format!("On the same network, these words do as well: {}", printer.err_style(Tone::Strong, words)));
        if let Some(relay) = &offer.words_relay {
            printer.talk(&format!("From another one: clan join {words} --relay {relay}"));
        }
    }
}

/// What a phrase is for, before it is shown.
pub(crate) fn explain_phrase(printer: &Printer) {
    printer.talk("");
    printer.talk(&printer.err_style(Tone::Strong, "Your recovery phrase: write it down now, on paper."));
    printer
        .talk("It is shown once and kept nowhere. If you lose your computers, `clan recover` brings you back with it.");
    printer.talk("Whoever has it can act for you.");
}

async fn list(args: ListArgs, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let mut devices = context.ask(context.client.devices(&clan)).await?;
    devices.retain(|device| device.good || args.all);
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&devices);
    }
    let now = words::now();
    let mut table = Table::new(&["DEVICE", "ID", "KIND", "SINCE", "STATE"]);
    for device in &devices {
        let state = match (device.good, device.this) {
            (false, _) => Cell::toned(Tone::Warn, "put out"),
            (true, true) => Cell::toned(Tone::Good, "this computer"),
            (true, false) => "".into(),
        };
        table.row([
            name(device).into(),
            device.id.short().into(),
            kind(device.kind).into(),
            words::ago(now, device.since).into(),
            state,
        ]);
    }
    table.print(printer)
}

fn name(device: &DeviceInfo) -> String {
    device.name.as_ref().map_or_else(|| "(the first)".to_owned(), ToString::to_string)
}

fn kind(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Device => "device",
        DeviceKind::Recovery => "recovery phrase",
        DeviceKind::Link => "link, not used yet",
    }
}

async fn remove(args: RemoveArgs, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let ask = async |dry_run| {
        context.ask(context.client.remove_device(&clan, &args.device, RemoveDeviceQuery { dry_run })).await
    };
    // Whoever may not is told before they are asked whether they want to.
    let would = ask(true).await?;
    let printer = &context.printer;
    if args.dry_run {
        return if printer.is_json() {
            printer.json(&would)
        } else {
            printer.data(&format!("Would put out {}.", removed(&would)))
        };
    }
    context.confirm(
        &format!("Put out {}? This cannot be undone; the computer can be added anew.", removed(&would)),
        "put it out without being asked; `--dry-run` shows what would happen",
    )?;
    let done = ask(false).await?;
    if printer.is_json() {
        return printer.json(&done);
    }
    printer.talk(&format!("Put out: {}.", removed(&done)));
    Ok(())
}

fn removed(removed: &RemovedDevice) -> String {
    let device = match &removed.name {
        Some(name) => format!("the device {name}"),
        None => format!("the first device, {}", removed.id.short()),
    };
    match removed.machines.as_slice() {
        [] => device,
        machines => {
            let names: Vec<&str> = machines.iter().map(|name| name.as_str()).collect();
            format!(
                "{device}, with {} {}",
                if names.len() == 1 { "the machine" } else { "the machines" },
                names.join(", ")
            )
        }
    }
}
