//! `clan group`: people and machines that rules name together.

use clan_api::{RemoveNamed, SetGroup};
use clan_types::GroupName;

use super::change::{How, Removal};
use crate::{context::Context, error::CliError, table::Table};

/// What to do with the groups.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Make a group, or replace its members
    Set {
        /// Its name
        name: GroupName,
        /// Who is in it: person:NAME, machine:NAME, group:NAME, everybody, members, admins, owners
        #[arg(required = true, value_name = "WHO")]
        members: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// Take a group away; rules that name it name nobody then
    Remove {
        /// Its name, as `clan group list` shows it
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Show the groups
    List {
        /// Which clan, if you are in several
        #[arg(long)]
        clan: Option<String>,
    },
}

/// Shows or changes the groups.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    match verb {
        Verb::Set { name, members, how } => {
            let clan = context.clan(how.clan).await?;
            let request = SetGroup { name, members, dry_run: how.dry_run };
            let group = context.ask(context.client.set_group(&clan, &request)).await?;
            if printer.is_json() {
                return printer.json(&group);
            }
            let would = if how.dry_run { "Would make this group: " } else { "" };
            printer.talk(&format!("{would}{}: {}.", group.name, group.members.join(", ")));
            Ok(())
        }
        Verb::Remove { name, how } => {
            let removal = Removal {
                would: format!("Would take the group {name} away."),
                question: format!("Take the group {name} away? Rules that name it name nobody then."),
                unasked: "take the group away without being asked",
            };
            let send = async |clan: &str, request: &RemoveNamed| context.client.drop_group(clan, request).await;
            if let Some(gone) = how.remove(name, removal, context, send).await? {
                printer.talk(&format!("The group {gone} is gone."));
            }
            Ok(())
        }
        Verb::List { clan } => {
            let clan = context.clan(clan).await?;
            let groups = context.ask(context.client.groups(&clan)).await?;
            if printer.is_json() {
                return printer.json(&groups);
            }
            if groups.is_empty() {
                printer.talk("There are none. Make one: `clan group set kids person:anna person:ben`.");
                return Ok(());
            }
            let mut table = Table::new(&["GROUP", "MEMBERS", "BY"]);
            for group in &groups {
                let by = group.by.as_ref().map_or("", |name| name.as_str());
                table.row([group.name.as_str().into(), group.members.join(", ").into(), by.into()]);
            }
            table.print(printer)
        }
    }
}
