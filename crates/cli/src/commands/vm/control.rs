//! Who may steer this computer's machine.

use clan_api::SetControl;
use clan_types::ControlMode;

use super::Which;
use crate::{commands::create::Control, context::Context, error::CliError, words};

/// Arguments of `clan vm control`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
  local    you alone
  remote   the clan's admins: statistics, log, settings, terminal; not you, but you can take it back here at any time
  shared   both; what one side changes is written down, and the other can take it back: `clan machine journal`")]
pub(crate) struct Args {
    /// Who: local, remote or shared
    mode: ControlMode,
    #[command(flatten)]
    which: Which,
    /// Only say what would change
    #[arg(long)]
    dry_run: bool,
}

/// Changes it, after asking where it gives others more than they had.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let vm = context.clan(args.which.clan).await?;
    let mut request = SetControl { mode: args.mode.into(), dry_run: true };
    let change = context.ask(context.client.set_control(&vm, &request)).await?;
    let printer = &context.printer;
    let (before, after) = (words::control(change.before), words::control(change.mode));
    if before == after {
        if printer.is_json() {
            return printer.json(&change);
        }
        printer.talk(&format!("The control mode of {} is {after} already.", change.machine));
        return Ok(());
    }
    if args.dry_run {
        if printer.is_json() {
            return printer.json(&change);
        }
        printer.talk(&format!("Would change the control mode of {} from {before} to {after}.", change.machine));
        return Ok(());
    }
    let vms = context.ask(context.client.vms()).await?;
    let machine = vms.iter().find(|v| v.clan.as_str() == vm || v.id.to_string() == vm);
    let flavour = machine.map(|v| v.flavour).unwrap_or_default();
    let had = ControlMode::from(change.before).is_for_admins();
    if let Some(warning) = Control::warning(change.mode, flavour).filter(|_| !had) {
        printer.talk(&warning);
        let question = format!("Change the control mode of {} from {before} to {after}?", change.machine);
        context.confirm(&question, "let the clan's admins steer it without being asked")?;
    }
    request.dry_run = false;
    let change = context.ask(context.client.set_control(&vm, &request)).await?;
    if printer.is_json() {
        return printer.json(&change);
    }
    printer.talk(&format!("The control mode of {} is {after} now; it was {before}.", change.machine));
    Ok(())
}
