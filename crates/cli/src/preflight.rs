//! What happens around every command: parsing, logging, the runtime, and what is said if the program itself fails.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, set_hook},
    process::ExitCode,
};

use clap::{Parser as _, error::ErrorKind};
use tracing_subscriber::EnvFilter;

use crate::{
    args::{Cli, Command},
    error::{CliError, Exit},
    printer::Printer,
};

/// Variable with a filter for the log, such as `clan_manager=debug`.
const LOG_VARIABLE: &str = "CLAN_LOG";

/// The command line; or the exit code, after help or an error was printed.
pub(crate) fn parse() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|error| {
        let helpful = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        // The flag counts although the line as a whole was not understood: whoever asked for JSON parses JSON.
        let json = std::env::args_os().skip(1).take_while(|a| a != "--").any(|a| a == "--json");
        if json && !helpful {
            Printer::new(true).error(&CliError::from_clap(&error));
            return Exit::Usage.into();
        }
        match error.print() {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Exit::BrokenPipe.into(),
            _ if helpful => ExitCode::SUCCESS,
            _ => Exit::Usage.into(),
        }
    })
}

/// What other people's code says of what is as it should be, by level and target.
///
/// - A relay whose client is slower than its senders drops packets, as it should, and would tell of each.
/// - An endpoint that is closed in good order ends its relay's task first, and takes the end of that task's queue for an error
///   while it still waits for its connections. The task itself is heard.
const HARMLESS: &str = "swarm_discovery=error,iroh_relay::server::client=error,\
    iroh::socket::transports::relay=off,iroh::socket::transports::relay::actor=warn";
const OWN: [&str; 7] = ["clan", "clan_manager", "clan_node", "clan_vm", "clan_build", "clan_store", "clan_os"];

/// What is logged unless [`LOG_VARIABLE`] says otherwise.
fn fallback(verbose: u8, daemon: bool) -> String {
    let (others, own) = match (verbose, daemon) {
        (0, false) => return "off".to_owned(),
        (0, true) | (1, false) => ("warn", "info"),
        (1, true) | (2, false) => ("info", "debug"),
        _ => return "debug".to_owned(),
    };
    let own: Vec<String> = OWN.iter().map(|name| format!("{name}={own}")).collect();
    format!("{others},{HARMLESS},{}", own.join(","))
}

/// Logs go to stderr: of a daemon what matters, of everything else nothing unless asked for.
pub(crate) fn start_logging(cli: &Cli) {
    let daemon = matches!(cli.command, Command::Manager(_) | Command::Controller(_));
    let fallback = fallback(cli.global.verbose, daemon);
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(fallback));
    let colour = Printer::new(false).stderr_has_colour();
    // Fails only if a subscriber is there already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).try_init();
}

/// Runs a command; a panic becomes an error with the exit code of a bug.
pub(crate) fn guard(printer: &Printer, command: impl FnOnce() -> Result<(), CliError>) -> Result<(), CliError> {
    let hook_printer = printer.clone();
    set_hook(Box::new(move |panic| {
        let place = panic.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        let text = panic.payload_as_str().unwrap_or("no message");
        hook_printer.error(&CliError::bug(
            "Clan stumbled over itself",
            format!("{text} ({place}, version {})", env!("CARGO_PKG_VERSION")),
        ));
    }));
    // The hook has said all there is to say.
    catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| Err(CliError::said_already()))
}

/// Runs a client command to its end, and does not wait for a terminal that somebody may still type into.
pub(crate) fn block_on(command: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::refused("system", "the program cannot start").why(e))?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_background();
    outcome
}

#[cfg(test)]
mod tests {
    use tracing::{Level, enabled, subscriber::with_default};
    use tracing_subscriber::{Registry, layer::SubscriberExt as _};

    use super::*;

    fn logged(verbose: u8, daemon: bool, seen: impl FnOnce() -> bool) -> bool {
        let filter = EnvFilter::try_new(fallback(verbose, daemon)).expect("a filter that is understood");
        with_default(Registry::default().with(filter), seen)
    }

    #[test]
    fn a_daemon_tells_what_matters_and_not_the_harmless_noise_of_others() {
        for verbose in [0, 1] {
            assert!(logged(verbose, true, || enabled!(target: "clan_manager::join", Level::INFO)));
            assert!(logged(verbose, true, || enabled!(target: "iroh::socket", Level::WARN)));
            assert!(logged(verbose, true, || enabled!(target: "iroh::socket::transports::relay::actor", Level::WARN)));
            assert!(!logged(verbose, true, || enabled!(target: "iroh::socket::transports::relay", Level::ERROR)));
            assert!(!logged(verbose, true, || enabled!(target: "swarm_discovery::sender", Level::WARN)));
        }
        assert!(!logged(0, false, || enabled!(target: "clan_manager::join", Level::ERROR)), "a command is silent");
        assert!(logged(3, true, || enabled!(target: "iroh::socket::transports::relay", Level::ERROR)), "all is wanted");
    }
}
