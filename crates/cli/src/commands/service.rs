//! `clan service`: what the clan's machines offer.

use clan_api::{ServiceInfo, ServiceKind};

use crate::{
    browser,
    context::Context,
    error::CliError,
    printer::Tone,
    table::{Cell, Table},
};

/// Verbs of `clan service`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Show the services
    #[command(alias = "ls")]
    List {
        /// Which clan, if you are in several
        clan: Option<String>,
    },
    /// Open a service in the browser, and print its address
    Open {
        /// Name of the service
        name: String,
        /// Which clan, if you are in several
        #[arg(long)]
        clan: Option<String>,
        /// Only print the address
        #[arg(long)]
        print: bool,
    },
}

/// Does what the verb says.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    match verb {
        Verb::List { clan } => {
            let clan = context.clan(clan).await?;
            let services = context.ask(context.client.services(&clan)).await?;
            if printer.is_json() {
                return printer.json(&services);
            }
            if services.is_empty() {
                printer.talk("No machine of the clan offers a service yet.");
                return Ok(());
            }
            table(&services).print(printer)
        }
        Verb::Open { name, clan, print } => {
            let clan = context.clan(clan).await?;
            let opened = context.ask(context.client.open_service(&clan, &name)).await?;
            if printer.is_json() { printer.json(&opened) } else { browser::show(&opened.url, print, printer) }
        }
    }
}

/// Services and where they run.
pub(crate) fn table(services: &[ServiceInfo]) -> Table {
    let mut table = Table::new(&["SERVICE", "MACHINE", "STATE", "ADDRESS", "TITLE"]);
    for service in services {
        let state = if service.healthy { Cell::toned(Tone::Good, "works") } else { Cell::toned(Tone::Bad, "down") };
        let address = match service.kind {
            ServiceKind::Http if service.port == 80 => format!("http://{}", service.host_name),
            ServiceKind::Http => format!("http://{}:{}", service.host_name, service.port),
            ServiceKind::Tcp => format!("{}:{}", service.host_name, service.port),
        };
        table.row([
            service.name.as_str().into(),
            service.machine.as_str().into(),
            state,
            address.into(),
            service.title.as_str().into(),
        ]);
    }
    table
}
