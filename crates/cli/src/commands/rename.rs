//! `clan rename`: gives a person or a machine another name.

use clan_api::{NamedKind, Rename};

use crate::{context::Context, error::CliError, printer::harmless};

/// What to rename.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Everybody renames themselves and their machines, admins anybody up to their own role.")]
pub(crate) enum Noun {
    /// Give a person another name
    Person(Args),
    /// Give a machine another name: it is reached under the new one from then on
    Machine(Args),
}

/// Which, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name or id
    name: String,
    /// Its name from now on
    new: String,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Renames.
pub(crate) async fn run(noun: Noun, context: &Context) -> Result<(), CliError> {
    let (kind, args) = match noun {
        Noun::Person(args) => (NamedKind::Person, args),
        Noun::Machine(args) => (NamedKind::Machine, args),
    };
    let clan = context.clan(args.clan).await?;
    let request = Rename { kind, subject: args.name, name: args.new, dry_run: args.dry_run };
    let renamed = context.ask(context.client.rename(&clan, &request)).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&renamed);
    }
    let (from, to) = (harmless(&renamed.from), harmless(&renamed.to));
    let what = if kind == NamedKind::Machine { "the machine " } else { "" };
    printer.talk(&if from == to {
        format!("The name is {to} already.")
    } else if args.dry_run {
        format!("Would rename {what}{from} to {to}.")
    } else {
        format!("Renamed {what}{from} to {to}.")
    });
    Ok(())
}
