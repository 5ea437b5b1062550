//! `clan machine`: steering machines, and standard WireGuard machines, such as phones.

mod steer;
mod terminal;

use clan_api::{AddWireguard, RemoveNamed, WireguardMachine};
use clan_types::MachineName;
use data_encoding::BASE64;
use serde::Serialize;
use x25519_dalek::{PublicKey, StaticSecret};

use super::change::{How, Removal};
use crate::{context::Context, error::CliError, printer::Printer, qr};

/// What to do with machines.
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "Admins of the clan steer machines whose control mode is shared or remote, their users those that are local or shared; \
                  what is changed is written down there, and either side can take it back.\n\n\
                  A phone speaks to one machine of the clan, which speaks the mesh for it: `--via` should be one that is always on and can be \
                  reached from outside. `clan machines` shows it; a machine of another kind is put out by `clan revoke machine`."
)]
pub(crate) enum Verb {
    /// Show who steers a machine, what it uses, and how its services are
    Stats(steer::Which),
    /// Print a machine's log
    Logs(steer::Logs),
    /// Show what can be set on a machine, and what it is now
    Settings(steer::Which),
    /// Change a setting of a machine
    Set(steer::Set),
    /// Show what was done with a machine, by whom and when
    Journal(steer::Which),
    /// Suggest to newcomers who is to steer their machine; each decides for themselves
    Suggest(steer::Suggest),
    /// Take back what an entry of a machine's journal tells
    Revert(steer::Revert),
    /// Start a virtual machine of the clan anew
    Restart(steer::Restart),
    /// Give a machine the image that the clan publishes
    Update(steer::Update),
    /// Open a terminal on a machine, or run a command there
    Terminal(terminal::Args),
    /// Admit a machine that speaks standard WireGuard, and print its configuration
    Add {
        /// Its name
        name: MachineName,
        /// It speaks standard WireGuard (the only kind that is added by hand)
        #[arg(long, required = true)]
        wireguard: bool,
        /// The machine that it connects to [default: this computer's]
        #[arg(long, value_name = "MACHINE")]
        via: Option<MachineName>,
        /// Its public key, if it has made its own pair; otherwise one is made, and the private half shown once
        #[arg(long, value_name = "KEY")]
        public_key: Option<String>,
        /// Show the QR code even where nobody seems to look
        #[arg(long)]
        qr: bool,
        #[command(flatten)]
        how: How,
    },
    /// Take such a machine out
    Remove {
        /// Its name, as `clan machines` shows it
        name: String,
        #[command(flatten)]
        how: How,
    },
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Added<'a> {
    #[serde(flatten)]
    machine: &'a WireguardMachine,
    /// As `wg-quick` and the phone apps read it; without a private key if the machine has made its own.
    configuration: String,
}

/// Admits or takes out.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    match verb {
        Verb::Stats(which) => steer::stats(which, context).await,
        Verb::Logs(args) => steer::logs(args, context).await,
        Verb::Settings(which) => steer::settings(which, context).await,
        Verb::Set(args) => steer::set(args, context).await,
        Verb::Journal(which) => steer::journal(which, context).await,
        Verb::Revert(args) => steer::revert(args, context).await,
        Verb::Suggest(args) => steer::suggest(args, context).await,
        Verb::Restart(args) => steer::restart(args, context).await,
        Verb::Update(args) => steer::update(args, context).await,
        Verb::Terminal(args) => terminal::run(args, context).await,
        Verb::Add { name, wireguard: _, via, public_key, qr, how } => {
            add(name, via, public_key, qr, how, context).await
        }
        Verb::Remove { name, how } => remove(name, how, context).await,
    }
}

async fn add(
    name: MachineName,
    via: Option<MachineName>,
    public_key: Option<String>,
    qr: bool,
    how: How,
    context: &Context,
) -> Result<(), CliError> {
    let printer = &context.printer;
    let clan = context.clan(how.clan).await?;
    // INVARIANT: the private key is made here, shown once, and neither sent nor kept.
    let secret = public_key.is_none().then(StaticSecret::random);
    let public_key = match (&secret, public_key) {
        (Some(secret), _) => BASE64.encode(PublicKey::from(secret).as_bytes()),
        (None, given) => given.unwrap_or_default(),
    };
    let request = AddWireguard { name, public_key, via, dry_run: how.dry_run };
    let machine = context.ask(context.client.add_wireguard(&clan, &request)).await?;
    if how.dry_run {
        if printer.is_json() {
            return printer.json(&machine);
        }
        printer.talk(&format!("Would admit {} behind {}.", machine.name, machine.via));
        return Ok(());
    }
    let configuration = configuration(&machine, secret.as_ref());
    if printer.is_json() {
        return printer.json(&Added { machine: &machine, configuration });
    }
    explain(&machine, secret.is_some(), printer);
    if secret.is_some() && (qr || printer.stderr_is_terminal()) {
        match qr::lines(&configuration, printer.stderr_has_colour(), printer.err_width()) {
            Some(lines) => lines.iter().for_each(|line| printer.talk(line)),
            None => printer.talk("The terminal is too narrow for the QR code."),
        }
    }
    printer.data(configuration.trim_end())
}

fn explain(machine: &WireguardMachine, secret: bool, printer: &Printer) {
    printer.talk(&format!("{} is admitted behind {}.", machine.name, machine.via));
    if secret {
        printer.talk(
            "Its configuration, with its private key, is shown this once: scan the code, or save the text there.",
        );
    }
    if machine.endpoints.is_empty() {
        printer.talk(&format!(
            "Nobody knows yet where {} can be reached: put its address and WireGuard port into the line `Endpoint`.",
            machine.via
        ));
    }
}

async fn remove(name: String, how: How, context: &Context) -> Result<(), CliError> {
    let removal = Removal {
        would: format!("Would take {name} out."),
        question: format!("Take {name} out? Its key does not come in again."),
        unasked: "take the machine out without being asked",
    };
    let send = async |clan: &str, request: &RemoveNamed| context.client.remove_wireguard(clan, request).await;
    if let Some(gone) = how.remove(name, removal, context, send).await? {
        context.printer.talk(&format!("{gone} is out."));
    }
    Ok(())
}

/// As `wg-quick(8)` and the phone apps read it.
fn configuration(machine: &WireguardMachine, secret: Option<&StaticSecret>) -> String {
    let addresses: Vec<String> = machine.addresses.iter().map(ToString::to_string).collect();
    let key = match secret {
        Some(secret) => format!("PrivateKey = {}", BASE64.encode(secret.as_bytes())),
        None => "# PrivateKey = (the one that it has made itself)".to_owned(),
    };
    let endpoint = match machine.endpoints.first() {
        Some(endpoint) => format!("Endpoint = {endpoint}"),
        None => format!("# Endpoint = (address and WireGuard port of {})", machine.via),
    };
    format!(
        "[Interface]\n{key}\nAddress = {}\nDNS = {}, {}.clan\nMTU = 1280\n\n[Peer]\nPublicKey = {}\nAllowedIPs = {}\n{endpoint}\n\
         PersistentKeepalive = 25\n",
        addresses.join(", "),
        machine.dns,
        machine.clan_name,
        machine.via_key,
        machine.networks.join(", "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> WireguardMachine {
        WireguardMachine {
            name: "phone".parse().unwrap(),
            clan_name: "family".parse().unwrap(),
            addresses: vec!["fd01::7".parse().unwrap(), "100.64.1.7".parse().unwrap()],
            dns: "fd01::1".parse().unwrap(),
            networks: vec!["fd01::/48".into(), "100.64.0.0/10".into()],
            via: "nas".parse().unwrap(),
            via_key: "AAAA=".into(),
            endpoints: vec!["203.0.113.9:41641".parse().unwrap(), "[2001:db8::1]:41641".parse().unwrap()],
        }
    }

    #[test]
    fn the_configuration_is_what_wg_quick_reads() {
        let secret = StaticSecret::from([7; 32]);
        let expected = format!(
            "[Interface]\nPrivateKey = {}\nAddress = fd01::7, 100.64.1.7\nDNS = fd01::1, family.clan\nMTU = 1280\n\n[Peer]\n\
             PublicKey = AAAA=\nAllowedIPs = fd01::/48, 100.64.0.0/10\nEndpoint = 203.0.113.9:41641\nPersistentKeepalive = 25\n",
            BASE64.encode(secret.as_bytes())
        );
        assert_eq!(configuration(&machine(), Some(&secret)), expected);
    }

    #[test]
    fn without_a_private_key_there_is_none_in_it() {
        let text = configuration(&machine(), None);
        assert!(!text.lines().any(|line| line.starts_with("PrivateKey")));
    }
}
