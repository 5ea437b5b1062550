//! `clan vm update`: another image for a machine, which is shown first.

use clan_api::{Flavour, ImageSource, UpdatePlan, UpdateVm};

use super::follow;
use crate::{
    context::Context,
    error::CliError,
    printer::{Printer, Tone, harmless},
    progress, table, words,
};

/// Shows which image it would be, asks, and follows the task.
pub(crate) async fn run(
    clan: Option<String>,
    request: UpdateVm,
    dry_run: bool,
    context: &Context,
) -> Result<(), CliError> {
    let vm = context.clan(clan).await?;
    let printer = &context.printer;
    let asked = context.ask(context.client.preview_update(&vm, &request));
    let plan = progress::waiting(printer, "Asking the clan…", asked).await?;
    let same = plan.image.is_some() && plan.image == plan.before;
    if (dry_run || same) && printer.is_json() {
        return printer.json(&plan);
    }
    if same {
        printer.talk("It runs exactly this image already.");
        say_what_stays(&plan, printer);
        return Ok(());
    }
    if dry_run {
        facts(&plan).iter().try_for_each(|line| printer.data(line))?;
        say_what_stays(&plan, printer);
        return Ok(());
    }
    if !printer.is_json() || context.will_ask() {
        facts(&plan).iter().for_each(|line| printer.talk(line));
        say_what_stays(&plan, printer);
    }
    let what = match plan.flavour {
        Flavour::Container => "container",
        Flavour::Vm | Flavour::Integrated => "virtual machine",
    };
    let question = format!("Stop the {what} and start it with this image? Its disk stays.");
    context.confirm(&question, "update without being asked; `--dry-run` shows the image")?;
    // What was shown is what is done, whatever the clan has published meanwhile.
    let shown = UpdateVm { image: plan.image.map(|image| image.to_string()), build: plan.image.is_none() };
    follow(context, context.ask(context.client.update_vm(&vm, &shown)).await?).await
}

/// What the clan wants, and an update does not change.
fn say_what_stays(plan: &UpdatePlan, printer: &Printer) {
    for line in &plan.stays {
        printer.talk(&format!("{} {}", printer.err_style(Tone::Warn, "warning:"), harmless(line)));
    }
}

fn facts(plan: &UpdatePlan) -> Vec<String> {
    let image = match (&plan.image, &plan.image_title) {
        (Some(image), Some(title)) => format!("{} ({})", harmless(title), image.short()),
        _ => "that of this version of clan".to_owned(),
    };
    let from = match plan.source {
        ImageSource::Here => "this computer has it",
        ImageSource::Members => "members of the clan",
        ImageSource::Build => "built here, unless it is there",
    };
    let mut facts = vec![
        ("Runs now", plan.before.map_or_else(|| "nothing".to_owned(), |image| image.short())),
        ("Next", image),
        ("Comes from", from.to_owned()),
    ];
    if plan.source == ImageSource::Members {
        facts.push(("Download", words::download(&plan.download)));
    }
    table::facts(&facts)
}
