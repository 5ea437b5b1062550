//! What a machine does, what can be set on it, and what was done with it.

use std::time::Duration;

use clan_api::{
    ChangeSetting, LogSource, MachineChange, MachineDeed, MachineEntry, RevertChange, SuggestControl, UpdateMachine,
};
use clan_types::{ControlMode, ImageId};

use crate::{
    commands::vm::{self, stats::show},
    context::Context,
    error::CliError,
    printer::harmless,
    progress,
    table::{Table, facts},
    words,
};

/// Which machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Which {
    /// Its name, as `clan machines` shows it
    pub(crate) name: String,
    /// Which clan, if you are in several
    #[arg(long)]
    pub(crate) clan: Option<String>,
}

/// Arguments of `clan machine logs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Logs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    part: vm::LogPart,
}

/// Arguments of `clan machine set`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example: clan machine set desk announce=off
See what can be set: `clan machine settings NAME`. Memory, disk and processors are its user's to change, there.")]
pub(crate) struct Set {
    /// Its name, as `clan machines` shows it
    name: String,
    /// The setting and its new value
    #[arg(value_name = "SETTING=VALUE", value_parser = setting)]
    setting: (String, String),
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `clan machine revert`.
#[derive(Debug, clap::Args)]
pub(crate) struct Revert {
    /// Its name, as `clan machines` shows it
    name: String,
    /// The entry, as `clan machine journal` shows it
    number: u64,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `clan machine restart`.
#[derive(Debug, clap::Args)]
pub(crate) struct Restart {
    #[command(flatten)]
    which: Which,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `clan machine update`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The computer of the machine gets the image from members, and starts the machine with it; its disk stays. Where the machine is not
well with it, it has its previous image back by itself. `clan machines --json` shows which image each machine runs,
`clan machine revert` puts the previous one back.")]
pub(crate) struct Update {
    #[command(flatten)]
    which: Which,
    /// The image that it had before, by its whole id [default: what the clan publishes]
    #[arg(long, value_name = "ID")]
    image: Option<String>,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `clan machine suggest`.
#[derive(Debug, clap::Args)]
pub(crate) struct Suggest {
    /// Who: local (its user), remote (the clan's admins) or shared (both)
    mode: ControlMode,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
}

/// Suggests to newcomers who is to steer their machine.
pub(crate) async fn suggest(args: Suggest, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let request = SuggestControl { mode: args.mode.into(), dry_run: args.dry_run };
    let suggestion = context.ask(context.client.suggest_control(&clan, &request)).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&suggestion);
    }
    let (before, after) = (words::control(suggestion.before), words::control(suggestion.mode));
    printer.talk(&if before == after {
        format!("The clan suggests {after} already.")
    } else if args.dry_run {
        format!("Would suggest {after} to newcomers, instead of {before}.")
    } else {
        format!("Newcomers see {after} suggested now, instead of {before}. Machines that are in stay as they are.")
    });
    Ok(())
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write for example announce=off".to_owned()),
    }
}

/// Shows who steers a machine and what it uses.
pub(crate) async fn stats(which: Which, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(which.clan).await?;
    let report = context.ask(context.client.machine_report(&clan, &which.name)).await?;
    if context.printer.is_json() {
        return context.printer.json(&report);
    }
    let control = words::control(report.control_mode).to_owned();
    facts(&[("Machine", report.machine.to_string()), ("Control", control)])
        .iter()
        .try_for_each(|line| context.printer.data(line))?;
    show(&report.stats, &report.units, context)
}

/// Prints a machine's log.
pub(crate) async fn logs(args: Logs, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.which.clan).await?;
    let query = args.part.of(LogSource::Journal);
    vm::print_log(context.ask(context.client.machine_log(&clan, &args.which.name, query)).await?, context).await
}

/// Shows what can be set.
pub(crate) async fn settings(which: Which, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(which.clan).await?;
    let report = context.ask(context.client.machine_report(&clan, &which.name)).await?;
    if context.printer.is_json() {
        return context.printer.json(&report.settings);
    }
    let mut table = Table::new(&["SETTING", "VALUE", "WHAT IT IS"]);
    for setting in &report.settings {
        let texts = [&setting.name, &setting.value, &setting.about];
        table.row(texts.map(|text| harmless(text).as_ref().into()));
    }
    table.print(&context.printer)
}

/// Changes a setting.
pub(crate) async fn set(args: Set, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let (name, value) = args.setting;
    let request = ChangeSetting { name, value, dry_run: args.dry_run };
    let change = context.ask(context.client.change_setting(&clan, &args.name, &request)).await?;
    told(&change, &args.name, args.dry_run, context)
}

/// Takes a change back.
pub(crate) async fn revert(args: Revert, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let request = RevertChange { number: args.number, dry_run: args.dry_run };
    let change = context.ask(context.client.revert_change(&clan, &args.name, &request)).await?;
    told(&change, &args.name, args.dry_run, context)
}

/// Starts a machine anew.
pub(crate) async fn restart(args: Restart, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.which.clan).await?;
    let name = harmless(&args.which.name).into_owned();
    let question = format!("Restart {name}? What runs on it ends first.");
    if args.dry_run {
        context.printer.talk(&format!("Would ask: {question}"));
        return Ok(());
    }
    context.confirm(&question, "restart it without being asked")?;
    let change = context.ask(context.client.restart_machine(&clan, &args.which.name)).await?;
    if context.printer.is_json() {
        return context.printer.json(&change);
    }
    context.printer.talk(&format!("{name} starts anew."));
    Ok(())
}

/// Gives a machine another image, after showing which.
pub(crate) async fn update(args: Update, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.which.clan).await?;
    let (machine, printer) = (&args.which.name, &context.printer);
    let look = UpdateMachine { image: args.image, dry_run: true };
    let asked = context.ask(context.client.update_machine(&clan, machine, &look));
    let seen = progress::waiting(printer, "Asking the machine…", asked).await?;
    let shown = seen.entry.as_ref().and_then(|entry| entry.after.clone());
    if args.dry_run || shown.is_none() {
        return told(&seen, machine, true, context);
    }
    let (name, what) = (harmless(machine), seen.entry.as_ref().map(deed).unwrap_or_default());
    let question = format!("Stop {name} and start it with another image ({what})? Its disk stays.");
    context.confirm(&question, "update it without being asked; `--dry-run` shows the image")?;
    // What was shown is what is done, whatever the clan has published meanwhile.
    let request = UpdateMachine { image: shown, dry_run: false };
    let asked = context.ask(context.client.update_machine(&clan, machine, &request));
    let change = progress::waiting(printer, "Asking the machine…", asked).await?;
    if !printer.is_json() && change.entry.is_some() {
        printer.talk(&format!(
            "Its computer begins. See what {name} runs: `clan machines --json`; if it is not well, it goes back by itself."
        ));
    }
    told(&change, machine, false, context)
}

fn told(change: &MachineChange, machine: &str, dry_run: bool, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(change);
    }
    let machine = harmless(machine);
    printer.talk(&match &change.entry {
        None => format!("Nothing changes: {machine} is set so already."),
        Some(entry) if dry_run => format!("Would change on {machine}: {}.", deed(entry)),
        Some(entry) => format!(
            "Changed on {machine}: {}. To take it back: clan machine revert {machine} {}",
            deed(entry),
            entry.number
        ),
    });
    Ok(())
}

/// Shows what was done.
pub(crate) async fn journal(which: Which, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(which.clan).await?;
    let journal = context.ask(context.client.machine_journal(&clan, &which.name)).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&journal);
    }
    if journal.is_empty() {
        printer.talk("Nothing was done with it yet.");
        return Ok(());
    }
    let mut table = Table::new(&["NUMBER", "WHEN", "WHO", "FROM", "WHAT"]);
    for entry in &journal {
        let who = entry.person_name.as_ref().map_or_else(|| "somebody".to_owned(), ToString::to_string);
        let from = match (&entry.from_name, entry.here) {
            (_, true) => "its own computer".to_owned(),
            (Some(name), false) => name.to_string(),
            (None, false) => entry.from.short(),
        };
        let cells = [entry.number.to_string(), words::moment(entry.at), who, from, deed(entry)];
        table.row(cells.map(Into::into));
    }
    table.print(printer)
}

/// What an entry tells, in words.
fn deed(entry: &MachineEntry) -> String {
    let text = |text: &Option<String>| harmless(text.as_deref().unwrap_or("?")).into_owned();
    let said = match entry.deed {
        MachineDeed::ControlMode => format!("control from {} to {}", text(&entry.before), text(&entry.after)),
        MachineDeed::Setting => {
            format!("{} from {} to {}", text(&entry.setting), text(&entry.before), text(&entry.after))
        }
        MachineDeed::Image => {
            let short = |id: &Option<String>| match id.as_deref().map(str::parse::<ImageId>) {
                Some(Ok(id)) => id.short(),
                _ => text(id),
            };
            format!("image from {} to {}", short(&entry.before), short(&entry.after))
        }
        MachineDeed::Restart => "restart".to_owned(),
        MachineDeed::Terminal => match entry.ended {
            None => "terminal, open".to_owned(),
            Some(end) => format!(
                "terminal, for {}",
                words::span(Duration::from_millis(end.as_millis().saturating_sub(entry.at.as_millis())))
            ),
        },
    };
    match entry.reverts {
        Some(number) => format!("{said}, which takes {number} back"),
        None => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_typed_with_an_equals_sign() {
        assert_eq!(setting("announce=off"), Ok(("announce".into(), "off".into())));
        assert_eq!(setting("a=b=c"), Ok(("a".into(), "b=c".into())));
        for wrong in ["announce", "=off", ""] {
            assert!(setting(wrong).is_err(), "{wrong}");
        }
    }
}
