//! `clan recover`: comes back to a clan on a new computer, with a recovery phrase.

use clan_api::FindRecovery;
use clan_types::RecoveryPhrase;

use crate::{
    commands::join::{self, Place},
    context::{Context, next_line, secret_line},
    error::CliError,
    progress,
};

/// Words of a phrase.
const WORDS: usize = 12;

/// Arguments of `clan recover`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The phrase is read from stdin; on a terminal it is asked for, and does not show. A machine of the clan must run: it is found
on the same network, or by any link to the clan. What you lost is put out afterwards: `clan device remove`.")]
pub(crate) struct Args {
    /// Any link to the clan, such as somebody's `clan invite` prints; nothing of it is used up
    #[arg(long)]
    link: Option<String>,
    #[command(flatten)]
    place: Place,
    /// Only show which clan the phrase belongs to
    #[arg(long)]
    dry_run: bool,
}

/// Finds the clan, asks, and makes this computer a device of its owner's.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    let phrase = phrase(context)?;
    // A slip of the pen is told here, before anybody is asked.
    let phrase = phrase.parse::<RecoveryPhrase>()?.words();
    let request = FindRecovery { phrase, link: args.link };
    let found = context.ask(context.client.find_recovery(&request));
    let link = progress::waiting(printer, "Looking for your clan…", found).await?.link;
    let name = join::accept(args.place, args.dry_run, &link, context).await?;
    if let Some(clan) = name.filter(|_| !printer.is_json()) {
        printer.talk(&format!("Put out what you lost: clan device list {clan}, then clan device remove NAME"));
    }
    Ok(())
}

fn phrase(context: &Context) -> Result<String, CliError> {
    if context.printer.can_ask() {
        context.printer.ask("Recovery phrase (it does not show):");
        return secret_line(&context.printer);
    }
    let mut text = String::new();
    while text.split_whitespace().count() < WORDS {
        let Some(line) = next_line()? else { break };
        text.push_str(&line);
    }
    Ok(text)
}
