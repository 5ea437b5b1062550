//! `clan image`: what VMs boot from.

use clan_api::ImageInfo;
use clan_types::ByteSize;

use crate::{context::Context, error::CliError, printer::harmless, progress, table::Table, words};

/// Verbs of `clan image`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Show the images on this computer, and which clans' machines run them
    #[command(alias = "ls")]
    List,
    /// Build the image that a clan founded now would run, unless it is there
    Build,
    /// Read every file of an image, and compare it with what the image's name says
    Verify {
        /// Id, or its beginning, as `clan image list` shows it [default: all]
        image: Option<String>,
    },
    /// Remove the images that no machine here runs
    Gc {
        /// Only say which
        #[arg(long)]
        dry_run: bool,
    },
}

/// Does what the verb says.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    match verb {
        Verb::List => list(context).await,
        Verb::Build => {
            let task = progress::follow(context, context.ask(context.client.build_image()).await?).await?;
            if context.printer.is_json() { context.printer.json(&task) } else { Ok(()) }
        }
        Verb::Verify { image } => verify(image, context).await,
        Verb::Gc { dry_run } => gc(dry_run, context).await,
    }
}

async fn list(context: &Context) -> Result<(), CliError> {
    let images = context.ask(context.client.images()).await?;
    if context.printer.is_json() {
        return context.printer.json(&images);
    }
    if images.is_empty() {
        context
            .printer
            .talk("No image is here yet: founding or joining a clan gets one, and so does `clan image build`.");
        return Ok(());
    }
    let mut table = Table::new(&["ID", "WHAT", "TAKES", "STARTS", "RUN BY"]);
    for image in &images {
        let clans: Vec<&str> = image.clans.iter().map(|c| c.as_str()).collect();
        table.row([
            short(image).as_str().into(),
            harmless(&image.title).as_ref().into(),
            image.used.to_string().into(),
            if image.template { "at once" } else { "by booting" }.into(),
            clans.join(", ").into(),
        ]);
    }
    table.print(&context.printer)
}

fn short(image: &ImageInfo) -> String {
    image.id.to_string().chars().take(10).collect()
}

async fn verify(image: Option<String>, context: &Context) -> Result<(), CliError> {
    let ids = match image {
        Some(id) => vec![id],
        None => context.ask(context.client.images()).await?.into_iter().map(|i| i.id.to_string()).collect(),
    };
    let mut tasks = Vec::new();
    for id in &ids {
        tasks.push(progress::follow(context, context.ask(context.client.verify_image(id)).await?).await?);
    }
    if context.printer.is_json() { context.printer.json(&tasks) } else { Ok(()) }
}

async fn gc(dry_run: bool, context: &Context) -> Result<(), CliError> {
    let would = context.ask(context.client.gc_images(true)).await?;
    let tell = |verb: &str, count: usize, freed: ByteSize| format!("{verb} {}, {freed}.", words::count(count, "image"));
    if dry_run || would.removed.is_empty() {
        if context.printer.is_json() {
            return context.printer.json(&would);
        }
        context.printer.talk(&if would.removed.is_empty() {
            "There is nothing to remove: machines here run every image.".to_owned()
        } else {
            tell("Would remove", would.removed.len(), would.freed)
        });
        return Ok(());
    }
    let count = words::count(would.removed.len(), "image");
    context.confirm(
        &format!("Remove {count} that no machine here runs? {} become free.", would.freed),
        "remove them without being asked",
    )?;
    let done = context.ask(context.client.gc_images(false)).await?;
    if context.printer.is_json() {
        return context.printer.json(&done);
    }
    context.printer.talk(&tell("Removed", done.removed.len(), done.freed));
    Ok(())
}
