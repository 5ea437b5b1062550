//! `clan join`: shows where a link leads, asks, and goes there.

use clan_api::{JoinClan, JoinPreview};
use clan_types::{InviteLink, MachineName, PersonName};

use crate::{
    commands::create::Size,
    context::{Context, read_line},
    error::CliError,
    printer::{Printer, Tone, harmless},
    progress, table, words,
};

/// Arguments of `clan join`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Put the link in quotes. Other users of this computer can see what you type on the command line while it runs;
without LINK, or with `-`, the link is read from stdin instead.")]
pub(crate) struct Args {
    /// The invitation link: clan://join/…
    link: Option<String>,
    /// Your name in the clan [default: your login name]
    #[arg(long)]
    person: Option<PersonName>,
    /// This computer's name in the clan [default: its host name]
    #[arg(long)]
    machine: Option<MachineName>,
    #[command(flatten)]
    size: Size,
    /// Only show where the link leads
    #[arg(long)]
    dry_run: bool,
}

/// Joins and waits until this computer's machine is in the clan.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    let link = match args.link.filter(|l| l != "-") {
        Some(link) => link,
        None => {
            if printer.can_ask() {
                printer.ask("Invitation link:");
            }
            read_line()?
        }
    };
    // A damaged link is told here, before anybody is asked.
    let link = link.parse::<InviteLink>()?.to_string();
    let preview =
        progress::waiting(printer, "Asking the clan…", context.ask(context.client.preview_join(&link))).await?;
    if args.dry_run {
        return if printer.is_json() {
            printer.json(&preview)
        } else {
            facts(&preview, &args.size).iter().try_for_each(|l| printer.data(l))
        };
    }
    let person = names::person(args.person, &preview.people)?;
    let machine = names::machine(args.machine, &preview.machines)?;
    if !printer.is_json() || context.will_ask() {
        show(&preview, &args.size, printer);
    }
    context.confirm(
        &format!("Join {} as {person}, with this computer as {machine}?", preview.clan_name),
        "join without being asked; `--dry-run` shows where the link leads",
    )?;
    let Size { memory, disk, cpus } = args.size;
    let request = JoinClan { link, person, machine, memory, disk, cpus };
    let task = context.ask(context.client.join(&request)).await?;
    let task = progress::follow(context, task).await?;
    if printer.is_json() {
        return printer.json(&task);
    }
    printer.talk(&format!(
        "{} is now a machine of {}.",
        request.machine,
        printer.err_style(Tone::Strong, preview.clan_name.as_str())
    ));
    printer.talk(&format!("See what it offers: clan service list {}", preview.clan_name));
    Ok(())
}

fn show(preview: &JoinPreview, size: &Size, printer: &Printer) {
    printer.talk(&format!(
        "{} invites you to the clan {}.",
        preview.inviter,
        printer.err_style(Tone::Strong, preview.clan_name.as_str())
    ));
    printer.talk("");
    for line in facts(preview, size) {
        printer.talk(&line);
    }
    printer.talk("");
    for warning in &preview.warnings {
        printer.talk(&format!("{} {}", printer.err_style(Tone::Warn, "warning:"), harmless(warning)));
    }
    printer
        .talk("Compare the fingerprint with what the inviter sees. The virtual machine has no access to your files.");
}

fn facts(preview: &JoinPreview, size: &Size) -> Vec<String> {
    let download = match preview.download.missing.as_bytes() {
        0 => format!("nothing: its {} are here already", preview.download.total),
        missing if missing == preview.download.total.as_bytes() => preview.download.missing.to_string(),
        _ => format!("{} of {}; the rest is here", preview.download.missing, preview.download.total),
    };
    let cpus = size.cpus.unwrap_or(preview.cpus) as usize;
    table::facts(&[
        ("Clan", preview.clan_name.to_string()),
        ("Fingerprint", preview.fingerprint.clone()),
        ("Invited by", preview.inviter.to_string()),
        ("Your role", preview.role.to_string()),
        ("Expires", format!("in {}", words::span(preview.expires.since(words::now())))),
        (
            "Members",
            format!("{}, {}", words::people(preview.people.len()), words::count(preview.machines.len(), "machine")),
        ),
        ("Will run", format!("a virtual machine: {}", preview.image_title)),
        ("Image", preview.image.short()),
        ("Memory", size.memory.unwrap_or(preview.memory).to_string()),
        ("Disk", format!("up to {}", size.disk.unwrap_or(preview.disk))),
        ("Processors", cpus.to_string()),
        ("Download", download),
        ("Control", words::control_mode(preview.control_mode).to_owned()),
        ("Runs by", format!("{}: {}", words::accelerator(preview.accelerator.kind), preview.accelerator.reason)),
    ])
}

/// Names to take where none was given.
pub(crate) mod names {
    use clan_types::{MachineName, PersonName};

    use crate::{error::CliError, words};

    /// The person's name: as given, else their login name.
    pub(crate) fn person(given: Option<PersonName>, taken: &[PersonName]) -> Result<PersonName, CliError> {
        if let Some(name) = given {
            return if taken.contains(&name) { Err(is_taken("person", name.as_str())) } else { Ok(name) };
        }
        let login = ["USER", "LOGNAME"].iter().find_map(|v| std::env::var(v).ok()).as_deref().and_then(words::label);
        let name = words::free_name(login.as_deref().unwrap_or("me"), |n| taken.iter().any(|t| t.as_str() == n));
        name.parse().map_err(|e| {
            CliError::refused("name", "your login name is no usable name").why(e).hint("give one: `--person NAME`")
        })
    }

    /// The machine's name: as given, else the host name.
    pub(crate) fn machine(given: Option<MachineName>, taken: &[MachineName]) -> Result<MachineName, CliError> {
        if let Some(name) = given {
            return if taken.contains(&name) { Err(is_taken("machine", name.as_str())) } else { Ok(name) };
        }
        let host = rustix::system::uname().nodename().to_str().ok().and_then(words::label);
        let name = words::free_name(host.as_deref().unwrap_or("computer"), |n| taken.iter().any(|t| t.as_str() == n));
        name.parse().map_err(|e| {
            CliError::refused("name", "this computer's host name is no usable name")
                .why(e)
                .hint("give one: `--machine NAME`")
        })
    }

    fn is_taken(kind: &str, name: &str) -> CliError {
        CliError::refused("name_taken", format!("the clan has a {kind} named {name} already"))
            .hint(format!("choose another name: `--{kind} NAME`"))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_name_that_was_asked_for_is_never_changed() {
            let taken: Vec<MachineName> = vec!["laptop".parse().unwrap()];
            assert!(machine(Some("laptop".parse().unwrap()), &taken).is_err());
            assert_eq!(machine(Some("desk".parse().unwrap()), &taken).unwrap().as_str(), "desk");
        }
    }
}
