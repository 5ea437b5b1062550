//! `clan controller`: a machine's part in a clan, inside a clan's virtual machine or on a computer itself.

mod unit;

use std::path::PathBuf;

use crate::{error::CliError, printer::Printer};

/// Where a container's manager looks for it.
#[cfg(feature = "controller")]
const CONTAINER_SOCKET: &str = "/run/clan/control.sock";

/// Arguments of `clan controller`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A computer that is to be a clan's machine itself, without a virtual machine, runs one controller for each such clan:
  sudo clan controller --install        as a service of systemd; it obeys whoever called sudo
  clan create family --integrate        then found a clan with it, or join one

Packets and names take root, or the capabilities CAP_NET_ADMIN and CAP_NET_BIND_SERVICE. Without them the clan can be
managed, and nothing flows. A second clan on the computer takes a second controller: give it a name with `--name`.")]
pub(crate) struct Args {
    /// Name of this controller, in the names of its socket, its folder and its service
    #[arg(long, value_name = "NAME", default_value = "controller", value_parser = parse_name)]
    name: String,
    /// Socket where the manager finds it [default: /run/clan/NAME.sock]
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Folder with the machine's keys and its ledger [default: /var/lib/clan/NAME]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// User who may steer it, beside root [default: whoever runs this, or called sudo]
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// UDP port for QUIC; WireGuard takes the next one [default: the first free pair from 41640 on, kept from then on]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..=65_534))]
    port: Option<u16>,
    /// Name of the network device [default: clan- and the beginning of the clan's id]
    #[arg(long, value_name = "NAME", value_parser = parse_interface)]
    interface: Option<String>,
    /// How programs on this computer learn the clan's names
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Dns::None)]
    dns: Dns,
    /// Carry no multicast DNS: what programs announce to their network is then neither told the clan nor heard from it
    #[arg(long)]
    no_mdns: bool,
    /// Install it as a service, and start it
    #[arg(long, group = "service")]
    install: bool,
    /// Stop the service that `--install` made, and remove it; its folder stays
    #[arg(long, group = "service")]
    uninstall: bool,
    /// Remove everything that this controller has of its clan, while it does not run; the clan is told nothing, so
    /// `clan leave` is better
    #[arg(long, group = "service")]
    forget: bool,
    /// Print what `--install` would install
    #[arg(long, group = "service")]
    print_unit: bool,
    /// Everything here is the clan's: set by images
    #[arg(long, hide = true, conflicts_with_all = ["socket", "user", "port", "interface", "dns", "no_mdns", "service"])]
    guest: bool,
    /// The same, in a container: set by the manager
    #[arg(long, hide = true, conflicts_with_all = ["guest", "socket", "user", "port", "interface", "dns", "service"])]
    container: bool,
}

/// How programs learn the clan's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Dns {
    /// Not at all: a name server answers on an address of its own, for whoever points theirs to it
    None,
    /// By /etc/resolv.conf, which is put back when the controller ends
    ResolvConf,
    /// By systemd-resolved, which is told about the clan's names and no others
    Resolved,
}

impl Args {
    #[cfg_attr(not(feature = "controller"), expect(dead_code, reason = "asked for by the controller only"))]
    fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| format!("/run/clan/{}.sock", self.name).into())
    }

    fn state(&self) -> PathBuf {
        self.state.clone().unwrap_or_else(|| format!("/var/lib/clan/{}", self.name).into())
    }
}

/// Runs until it is told to stop, or installs what does.
pub(crate) fn run(args: Args, printer: &Printer) -> Result<(), CliError> {
    if args.print_unit {
        return unit::print(&args, printer);
    }
    if args.install {
        return unit::install(&args, printer);
    }
    if args.uninstall {
        return unit::uninstall(&args, printer);
    }
    if args.forget {
        return forget(&args, printer);
    }
    serve(args, printer)
}

#[cfg(feature = "controller")]
fn forget(args: &Args, printer: &Printer) -> Result<(), CliError> {
    let state = args.state();
    let known = clan_node::forget(&state).map_err(|e| match &e {
        clan_node::NodeError::State(clan_node::StateError::InUse { .. }) => {
            CliError::from_source("controller", &e).hint("stop that controller first")
        }
        _ => CliError::from_source("controller", &e),
    })?;
    printer.talk(&if known {
        format!("{} knows no clan any more.", state.display())
    } else {
        format!("{} knew of no clan.", state.display())
    });
    Ok(())
}

#[cfg(not(feature = "controller"))]
fn forget(args: &Args, _printer: &Printer) -> Result<(), CliError> {
    Err(CliError::refused("not_built_in", "this executable is a client only")
        .why(format!("it was built without the controller, and leaves {} alone", args.state().display())))
}

#[cfg(feature = "controller")]
fn serve(args: Args, printer: &Printer) -> Result<(), CliError> {
    use clan_node::{Computer, Host, Names, Options};

    let absolute = |path: PathBuf| {
        std::path::absolute(&path)
            .map_err(|e| CliError::refused("controller", format!("{} cannot be found", path.display())).why(e))
    };
    let host = if args.guest {
        Host::Guest
    } else if args.container {
        Host::Container(CONTAINER_SOCKET.into())
    } else {
        Host::Computer(Computer {
            socket: absolute(args.socket())?,
            user: unit::user(&args)?,
            port: args.port,
            interface: args.interface.clone(),
            names: match args.dns {
                Dns::None => Names::Aside,
                Dns::ResolvConf => Names::ResolvConf,
                Dns::Resolved => Names::Resolved,
            },
            multicast: !args.no_mdns,
        })
    };
    if let (Host::Computer(computer), true) = (&host, printer.stderr_is_terminal()) {
        printer.talk(&format!("The controller listens on {}. Ctrl-C stops it.", computer.socket.display()));
    }
    let state_dir = absolute(args.state())?;
    if host == Host::Guest {
        clan_node::pass_gate().map_err(|e| CliError::refused("system", "the controller cannot start").why(e))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::refused("system", "the controller cannot start").why(e))?;
    runtime.block_on(clan_node::run(Options { state_dir, host })).map_err(|e| hinted(&e, &args))
}

/// What a person can do about it.
#[cfg(feature = "controller")]
fn hinted(error: &clan_node::NodeError, args: &Args) -> CliError {
    use clan_node::{NodeError, StateError};

    let said = CliError::from_source("controller", error);
    match error {
        NodeError::Deaf => said.hint("start it again, as systemd does by itself"),
        NodeError::Udp { .. } => said.hint("choose another port with `--port`; members learn of it by themselves"),
        NodeError::Socket(_) if args.socket.is_none() => {
            said.hint("run it with sudo, or name a place of your own: `--socket FILE --state DIR`")
        }
        NodeError::State(StateError::InUse { .. }) => {
            said.hint("a second clan takes a second controller: give it a name with `--name`")
        }
        NodeError::State(_) if args.state.is_none() => {
            said.hint("run it with sudo, or name a folder of your own: `--state DIR`")
        }
        _ => said,
    }
}

/// This executable was built without it.
#[cfg(not(feature = "controller"))]
fn serve(args: Args, _printer: &Printer) -> Result<(), CliError> {
    Err(CliError::refused("not_built_in", "this executable is a client only")
        .why(format!("it was built without the controller, and leaves {} alone", args.state().display())))
}

fn parse_name(text: &str) -> Result<String, String> {
    let usual = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() || text.len() > 40 || !text.chars().all(usual) || text.starts_with('-') {
        return Err("a name is up to 40 of a-z, 0-9 and inner hyphens".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_interface(text: &str) -> Result<String, String> {
    let usual = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 15 || !text.chars().all(usual) || matches!(text, "." | "..") {
        return Err("a network device's name is up to 15 letters, digits, and - _ .".to_owned());
    }
    Ok(text.to_owned())
}
