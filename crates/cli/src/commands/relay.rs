//! `clan relay`: which machines pass packets on between machines that do not reach each other.

use clan_api::{RelayChange, RelayInfo, SetRelay};

use crate::{
    context::Context,
    error::CliError,
    printer::Tone,
    table::{Cell, Table},
};

/// What to do about relays.
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "A relay needs a port that is reached from everywhere: TCP for packets, UDP of the same number for telling machines \
                  their addresses. It serves machines of the clan and newcomers with a valid invite, nobody else, and cannot read \
                  what it passes on. Links made from then on name it."
)]
pub(crate) enum Verb {
    /// Make a machine a relay
    On {
        /// Which machine, if not this computer's
        #[arg(long, value_name = "NAME")]
        machine: Option<String>,
        /// Where it is reached from everywhere: an address or a name [default: its public address, if it has one]
        #[arg(long)]
        host: Option<String>,
        /// Port [default: 443, which mostly is open where UDP is not]
        #[arg(long)]
        port: Option<u16>,
        #[command(flatten)]
        how: How,
    },
    /// Make a machine a relay no more
    Off {
        /// Which machine, if not this computer's
        #[arg(long, value_name = "NAME")]
        machine: Option<String>,
        #[command(flatten)]
        how: How,
    },
    /// Show the relays
    List {
        /// Which clan, if you are in several
        clan: Option<String>,
    },
}

/// Where and how.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Does it.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    match verb {
        Verb::On { machine, host, port, how } => {
            set(SetRelay { machine, on: true, host, port, dry_run: how.dry_run }, how.clan, context).await
        }
        Verb::Off { machine, how } => {
            set(SetRelay { machine, dry_run: how.dry_run, ..SetRelay::default() }, how.clan, context).await
        }
        Verb::List { clan } => list(clan, context).await,
    }
}

async fn set(request: SetRelay, clan: Option<String>, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(clan).await?;
    let change = context.ask(context.client.set_relay(&clan, &request)).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&change);
    }
    printer.talk(&told(&change, request.dry_run));
    Ok(())
}

fn told(change: &RelayChange, dry_run: bool) -> String {
    let name = &change.relay.machine_name;
    match (change.on, change.already, dry_run) {
        (true, true, _) => format!("{name} is a relay at {} already.", place(&change.relay)),
        (true, false, true) => format!("Would make {name} a relay at {}.", place(&change.relay)),
        (true, false, false) => format!(
            "{name} is a relay at {} from now on. Its TCP and UDP port {} must be open to everybody.",
            place(&change.relay),
            change.relay.port
        ),
        (false, _, true) => format!("Would make {name} a relay no more."),
        (false, _, false) => {
            format!("{name} is a relay no more. Links that name it lead on by the other ways in them.")
        }
    }
}

async fn list(clan: Option<String>, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(clan).await?;
    let relays = context.ask(context.client.relays(&clan)).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&relays);
    }
    if relays.is_empty() {
        printer.talk(
            "There are none: machines that do not reach each other directly do not meet. Make one: `clan relay on`.",
        );
        return Ok(());
    }
    let mut table = Table::new(&["MACHINE", "REACHED AT", "CERTIFICATE"]);
    for relay in &relays {
        let name: Cell = if relay.this {
            Cell::toned(Tone::Good, format!("{} (this computer)", relay.machine_name))
        } else {
            relay.machine_name.as_str().into()
        };
        table.row([name, place(relay).into(), relay.certificate.short().into()]);
    }
    table.print(printer)
}

fn place(relay: &RelayInfo) -> String {
    match relay.host.ip() {
        Some(std::net::IpAddr::V6(ip)) => format!("[{ip}]:{}", relay.port),
        _ => format!("{}:{}", relay.host, relay.port),
    }
}
