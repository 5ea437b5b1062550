//! `clan completions`: a script for the shell.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::{args::Cli, error::CliError, printer::Printer};

/// Arguments of `clan completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example, for bash:\n  clan completions bash > ~/.local/share/bash-completion/completions/clan")]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

/// Prints the script.
pub(crate) fn run(args: &Args, printer: &Printer) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "clan", &mut script);
    printer.raw(&script)
}
