//! `clan role`: gives a person another role.

use clan_api::{RoleChange, SetRole};
use clan_types::Role;

use crate::{context::Context, error::CliError, printer::harmless};

/// Arguments of `clan role`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Owners give anybody any role; admins move people between guest and member.")]
pub(crate) struct Args {
    /// Name or id, as `clan members` shows them
    person: String,
    /// Role from now on: guest, member, admin or owner
    role: Role,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Gives the role, after asking.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let mut request = SetRole { person: args.person, role: args.role, dry_run: true };
    // Whoever may not is told before they are asked whether they want to.
    let preview = context.ask(context.client.set_role(&clan, &request)).await?;
    let printer = &context.printer;
    let same = preview.from == preview.to;
    if args.dry_run || same {
        if printer.is_json() {
            return printer.json(&preview);
        }
        let name = harmless(preview.name.as_str());
        printer.talk(&if same {
            format!("{name} is {} already.", preview.to)
        } else {
            format!("Would {}.", deed(&preview))
        });
        return Ok(());
    }
    let deed = deed(&preview);
    let (first, rest) = deed.split_at(1);
    context.confirm(&format!("{}{rest}?", first.to_uppercase()), "change roles without being asked")?;
    // Who was shown is who is meant, whoever has the name by now.
    request = SetRole { person: preview.id.to_string(), role: args.role, dry_run: false };
    let change = context.ask(context.client.set_role(&clan, &request)).await?;
    if printer.is_json() {
        return printer.json(&change);
    }
    printer.talk(&format!("{} is {} now; they were {}.", harmless(change.name.as_str()), change.to, change.from));
    Ok(())
}

fn deed(change: &RoleChange) -> String {
    format!("make {} {}, who is {}", harmless(change.name.as_str()), change.to, change.from)
}
