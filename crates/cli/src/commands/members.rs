//! `clan members`: who belongs to a clan.

use crate::{context::Context, error::CliError, table::Table};

/// Arguments of `clan members`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which clan, if you are in several
    clan: Option<String>,
}

/// Prints the people.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let people = context.ask(context.client.members(&clan)).await?;
    if context.printer.is_json() {
        return context.printer.json(&people);
    }
    let mut table = Table::new(&["NAME", "ROLE", "KEY", ""]);
    for person in &people {
        table.row([
            person.name.as_str().into(),
            person.role.to_string().into(),
            person.id.short().into(),
            match (person.this, person.waiting) {
                (_, true) => "waits for approval",
                (true, false) => "you",
                (false, false) => "",
            }
            .into(),
        ]);
    }
    table.print(&context.printer)?;
    if people.iter().any(|person| person.waiting) {
        context.printer.talk("Let somebody in, or not: `clan approve NAME`, `clan deny NAME`.");
    }
    Ok(())
}
