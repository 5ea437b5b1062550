//! `clan approve` and `clan deny`: who comes in with an invite that asks for approval.

use clan_api::{AdmissionDecision, DecideAdmission};

use crate::{context::Context, error::CliError, printer::harmless};

/// Arguments of `clan approve` and of `clan deny`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name or id of the newcomer, as `clan members` shows them
    person: String,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Decides, after asking.
pub(crate) async fn run(args: Args, approve: bool, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let mut request = DecideAdmission { person: args.person, approve, dry_run: true };
    // Whoever may not is told before they are asked whether they want to.
    let preview = context.ask(context.client.decide_admission(&clan, &request)).await?;
    let printer = &context.printer;
    if args.dry_run {
        if printer.is_json() {
            return printer.json(&preview);
        }
        printer.talk(&format!("Would {}.", deed(&preview)));
        return Ok(());
    }
    let deed = deed(&preview);
    let (first, rest) = deed.split_at(1);
    context.confirm(&format!("{}{rest}?", first.to_uppercase()), "decide without being asked")?;
    // Who was shown is who is meant, whoever has the name by now.
    request = DecideAdmission { person: preview.id.to_string(), approve, dry_run: false };
    let decision = context.ask(context.client.decide_admission(&clan, &request)).await?;
    if printer.is_json() {
        return printer.json(&decision);
    }
    let name = harmless(decision.name.as_str());
    printer.talk(&if approve {
        format!("{name} is in, as {}.", decision.role)
    } else {
        format!("{name} stays out. The use of the invite stays used: to invite them again takes a new one.")
    });
    Ok(())
}

fn deed(decision: &AdmissionDecision) -> String {
    let (name, by) = (harmless(decision.name.as_str()), harmless(decision.invited_by.as_str()));
    if decision.approve {
        format!("let {name} in as {}, invited by {by}", decision.role)
    } else {
        format!("refuse {name}, invited by {by}")
    }
}
