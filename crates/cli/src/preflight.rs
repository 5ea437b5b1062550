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

/// Logs go to stderr: of a daemon what matters, of everything else nothing unless asked for.
pub(crate) fn start_logging(cli: &Cli) {
    let daemon = matches!(cli.command, Command::Manager(_) | Command::Controller(_));
    let fallback = match (cli.global.verbose, daemon) {
        (0, false) => "off",
        (0, true) | (1, false) => {
            // A relay whose client is slower than its senders drops packets, as it should, and would tell of each.
            "warn,swarm_discovery=error,iroh_relay::server::client=error,clan=info,clan_manager=info,clan_node=info,clan_vm=info,clan_build=info,clan_store=info,clan_os=info"
        }
        (1, true) | (2, false) => {
            "info,clan=debug,clan_manager=debug,clan_node=debug,clan_vm=debug,clan_build=debug,clan_store=debug,clan_os=debug"
        }
        _ => "debug",
    };
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
