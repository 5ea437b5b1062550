//! `clan image`: what VMs boot from.

use clan_api::{ImageGc, Publication, PublishImage, PublishedVm};
use clan_types::{AppName, ByteSize, ControlMode, NameError, NetworkLayer};

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
    /// Make an image on this computer what newcomers to a clan run
    #[command(
        after_help = "Admins only. The clan's machine here is started with the image first: it gives it to newcomers. \
Machines that others have already stay as they are."
    )]
    Publish {
        /// Id, or its beginning, as `clan image list` shows it
        image: String,
        /// Which clan, if you are in several
        #[arg(long)]
        clan: Option<String>,
        /// Memory of a newcomer's machine, such as 512M [default: as it is]
        #[arg(long, value_name = "SIZE")]
        memory: Option<ByteSize>,
        /// Processors of a newcomer's machine [default: as it is]
        #[arg(long, value_name = "COUNT")]
        cpus: Option<u32>,
        /// Largest disk of a newcomer's machine, such as 4G [default: as it is]
        #[arg(long, value_name = "SIZE")]
        disk: Option<ByteSize>,
        /// What carries its packets: mesh [default: as it is]
        #[arg(long, value_name = "LAYER")]
        network: Option<NetworkLayer>,
        /// Who is to steer it: local (its user), remote (the clan's admins) or shared (both); each newcomer decides for
        /// themselves [default: as it is]
        #[arg(long, value_name = "MODE")]
        control: Option<ControlMode>,
        /// The applications in the image, with commas between, or none [default: what the machine here offers]
        #[arg(long, value_name = "NAMES", value_parser = applications)]
        apps: Option<Apps>,
        /// Only say what would change
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove the images that no machine here runs
    Gc {
        /// Only say which
        #[arg(long)]
        dry_run: bool,
    },
}

/// Names of applications; of none, if that is what was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Apps(Vec<AppName>);

fn applications(text: &str) -> Result<Apps, NameError> {
    if text == "none" {
        return Ok(Apps(Vec::new()));
    }
    text.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>().map(Apps)
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
        Verb::Publish { image, clan, memory, cpus, disk, network, control, apps, dry_run } => {
            let request = PublishImage {
                image,
                memory,
                cpus,
                disk,
                network_layer: network,
                control_mode: control.map(Into::into),
                applications: apps.map(|Apps(names)| names),
                dry_run,
            };
            publish(clan, request, context).await
        }
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
            image.id.short().as_str().into(),
            harmless(&image.title).as_ref().into(),
            image.used.to_string().into(),
            if image.template { "at once" } else { "by booting" }.into(),
            clans.join(", ").into(),
        ]);
    }
    table.print(&context.printer)
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
    let nothing = would.removed.is_empty() && would.unfinished == 0;
    if dry_run || nothing {
        if context.printer.is_json() {
            return context.printer.json(&would);
        }
        context.printer.talk(&if nothing {
            "There is nothing to remove: machines here run every image.".to_owned()
        } else {
            format!("Would remove {}, {}.", going(&would), would.freed)
        });
        return Ok(());
    }
    context.confirm(
        &format!("Remove {}? {} become free.", going(&would), would.freed),
        "remove them without being asked",
    )?;
    let done = context.ask(context.client.gc_images(false)).await?;
    if context.printer.is_json() {
        return context.printer.json(&done);
    }
    context.printer.talk(&format!("Removed {}, {}.", going(&done), done.freed));
    Ok(())
}

/// What of images goes, in words.
fn going(gc: &ImageGc) -> String {
    let images = words::count(gc.removed.len(), "image");
    let begun = format!("{} that broke off", words::count(gc.unfinished as usize, "download"));
    match (gc.removed.len(), gc.unfinished) {
        (_, 0) => format!("{images} that no machine here runs"),
        (0, _) => begun,
        _ => format!("{images} that no machine here runs and {begun}"),
    }
}

async fn publish(clan: Option<String>, request: PublishImage, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(clan).await?;
    // Whoever may not is told before they are asked whether they want to.
    let ask = PublishImage { dry_run: true, ..request.clone() };
    let plan = context.ask(context.client.publish_image(&clan, &ask)).await?;
    let printer = &context.printer;
    let same = plan.before.as_ref() == Some(&plan.after);
    if (request.dry_run || same) && printer.is_json() {
        return printer.json(&plan);
    }
    if same {
        printer.talk("Newcomers run exactly this already.");
        return Ok(());
    }
    for line in changes(&plan) {
        printer.talk(&line);
    }
    if request.dry_run {
        return Ok(());
    }
    context.confirm(
        &format!("Have newcomers to {} run this?", harmless(plan.clan.as_str())),
        "publish an image without being asked",
    )?;
    // What was shown is what is signed, whatever others have published meanwhile.
    let PublishedVm { image, memory, cpus, disk, network_layer, control_mode, applications, .. } = plan.after;
    let shown = PublishImage {
        image: image.to_string(),
        memory: Some(memory),
        cpus: Some(cpus),
        disk: Some(disk),
        network_layer: Some(network_layer),
        control_mode: Some(control_mode),
        applications: Some(applications),
        dry_run: false,
    };
    let done = context.ask(context.client.publish_image(&clan, &shown)).await?;
    if printer.is_json() {
        return printer.json(&done);
    }
    printer.talk(&format!("Newcomers to {} run it from now on.", harmless(done.clan.as_str())));
    Ok(())
}

/// What changes for newcomers, a line each.
fn changes(plan: &Publication) -> Vec<String> {
    let facts = |vm: &PublishedVm| {
        [
            ("Image", format!("{} ({})", harmless(&vm.title), vm.image.short())),
            ("Memory", vm.memory.to_string()),
            ("Processors", vm.cpus.to_string()),
            ("Disk", format!("up to {}", vm.disk)),
            ("Network", vm.network_layer.to_string()),
            ("Control", words::control(vm.control_mode).to_owned()),
            ("Applications", words::applications(&vm.applications)),
        ]
    };
    let before = plan.before.as_ref().map(facts);
    let line = |(i, (what, now)): (usize, (&str, String))| match before.as_ref().map(|before| &before[i].1) {
        Some(was) if *was != now => format!("{what:<12}  {now}, so far {was}"),
        _ => format!("{what:<12}  {now}"),
    };
    facts(&plan.after).into_iter().enumerate().map(line).collect()
}
