//! `clan controller`: runs inside a clan's virtual machine.

use std::path::PathBuf;

use crate::error::CliError;

/// Arguments of `clan controller`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with the machine's keys and its ledger
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
}

/// Runs until it is told to stop.
#[cfg(feature = "controller")]
pub(crate) fn run(args: Args) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::refused("system", "the controller cannot start").why(e))?;
    runtime
        .block_on(clan_node::run(clan_node::Options { state_dir: args.state }))
        .map_err(|e| CliError::from_source("controller", &e))
}

/// This executable was built without it.
#[cfg(not(feature = "controller"))]
pub(crate) fn run(args: Args) -> Result<(), CliError> {
    Err(CliError::refused("not_built_in", "this executable is a client only")
        .why(format!("it was built without the controller, and leaves {} alone", args.state.display())))
}
