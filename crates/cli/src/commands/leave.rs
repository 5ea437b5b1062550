//! `clan leave`: leaves a clan.

use clan_api::{Flavour, TaskResult};

use crate::{context::Context, error::CliError, printer::Tone, progress};

/// Arguments of `clan leave`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which clan, if you are in several
    clan: Option<String>,
}

/// Leaves, after asking.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let named = context.clan(args.clan).await?;
    let clans = context.ask(context.client.clans()).await?;
    // The manager decides what a name means; here it only serves the question.
    let shown = clans
        .iter()
        .find(|c| c.name.as_str() == named || c.id.to_string() == named)
        .map_or(named.as_str(), |c| c.name.as_str());
    let vms = context.ask(context.client.vms()).await?;
    let vm = vms.iter().find(|v| v.clan.as_str() == named || v.id.to_string() == named);
    let loss = match vm.map(|v| v.flavour) {
        Some(Flavour::Integrated) => {
            "This computer forgets it, with its keys; the controller on it then waits for another clan."
        }
        Some(Flavour::Container) => "Its container and everything in it will be deleted.",
        Some(Flavour::Vm) | None => "Its virtual machine and everything on it will be deleted.",
    };
    context.confirm(&format!("Leave {shown}? {loss}"), "leave without being asked")?;
    let task = context.ask(context.client.leave(&named)).await?;
    let task = progress::follow(context, task).await?;
    if context.printer.is_json() {
        return context.printer.json(&task);
    }
    context.printer.talk(&format!("You have left {shown}."));
    if matches!(task.result, Some(TaskResult::Left { heard: false })) {
        let warning = context.printer.err_style(Tone::Warn, "warning:");
        context.printer.talk(&format!(
            "{warning} no other machine of the clan was there to hear it. They show this one until one of its admins takes it \
             off the list: clan revoke machine"
        ));
    }
    Ok(())
}
