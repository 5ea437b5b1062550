//! `clan create`: founds a clan.

use clan_api::CreateClan;
use clan_types::{ByteSize, ClanName, MachineName, PersonName};

use crate::{commands::join::names, context::Context, error::CliError, printer::Tone, progress};

/// Arguments of `clan create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  clan create family --person anna --machine laptop --memory 1G")]
pub(crate) struct Args {
    /// Name of the clan: a-z, 0-9 and inner hyphens
    name: ClanName,
    /// Your name in it [default: your login name]
    #[arg(long)]
    person: Option<PersonName>,
    /// This computer's name in it [default: its host name]
    #[arg(long)]
    machine: Option<MachineName>,
    #[command(flatten)]
    size: Size,
}

/// How large the virtual machine is.
#[derive(Debug, clap::Args)]
pub(crate) struct Size {
    /// Memory of the virtual machine, such as 512M or 2G
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Largest size of its disk; it takes room only as it fills
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk: Option<ByteSize>,
    /// Processors of the virtual machine
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) cpus: Option<u32>,
}

/// Founds the clan and waits until its machine runs.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let person = names::person(args.person, &[])?;
    let machine = names::machine(args.machine, &[])?;
    let Size { memory, disk, cpus } = args.size;
    let request = CreateClan { name: args.name, person, machine, memory, disk, cpus };
    let task = context.ask(context.client.create_clan(&request)).await?;
    let task = progress::follow(context, task).await?;
    if context.printer.is_json() {
        return context.printer.json(&task);
    }
    let printer = &context.printer;
    printer.talk(&format!(
        "{} is founded; {} is its first machine.",
        printer.err_style(Tone::Strong, request.name.as_str()),
        request.machine
    ));
    printer.talk(&format!("Invite somebody:  clan invite {}", request.name));
    printer.talk("See what it does: clan web");
    Ok(())
}
