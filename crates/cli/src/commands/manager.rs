//! `clan manager`: the daemon on the base OS.

mod unit;

use std::{net::SocketAddr, path::PathBuf};

use clan_types::ByteSize;

use crate::{args::Global, context::data_dir, error::CliError, printer::Printer};

/// Arguments of `clan manager`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
It needs no root, and keeps running until it is told to stop (Ctrl-C, SIGTERM).
`clan manager --install` makes it a service that starts by itself.
Packages for images are downloaded through the proxy that `http_proxy` names, if it is set.")]
pub(crate) struct Args {
    /// Loopback address and port of the web page; a socket handed in by LISTEN_FDS wins over it
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7420")]
    listen: SocketAddr,
    /// Leave the virtual machines running when it stops; a restart of its service does so in any case
    #[arg(long)]
    keep_vms: bool,
    /// How much memory all virtual machines together may have; those that do not fit wait until others stop [default: what this computer has]
    #[arg(long, value_name = "SIZE")]
    vm_memory: Option<ByteSize>,
    /// Debian mirror for images, as a URL
    #[arg(long, value_name = "URL", env = "CLAN_MIRROR", hide_env_values = true)]
    mirror: Option<String>,
    /// The guest's first program [default: `clan-agent` beside this executable, or in ../lib/clan]
    #[arg(long, value_name = "FILE", env = "CLAN_AGENT", hide_env_values = true)]
    agent: Option<PathBuf>,
    /// Install it as a service of yours, started at login and when it is needed, and have invitations open by a click
    #[arg(long, group = "service")]
    install: bool,
    /// Stop that service and remove it; your clans stay
    #[arg(long, group = "service")]
    uninstall: bool,
    /// Print what `--install` would install
    #[arg(long, group = "service")]
    print_unit: bool,
}

/// Runs until it is told to stop, or installs what does.
pub(crate) fn run(args: Args, global: &Global, printer: &Printer) -> Result<(), CliError> {
    if args.print_unit {
        return unit::print(&args, global, printer);
    }
    if args.install {
        return unit::install(&args, global, printer);
    }
    if args.uninstall {
        return unit::uninstall(printer);
    }
    serve(args, global, printer)
}

/// A step on the way into a container. Comes back only if it fails.
#[cfg(feature = "manager")]
pub(crate) fn contain(words: Vec<std::ffi::OsString>) -> Result<(), CliError> {
    let error = clan_manager::Stage::new(words).run();
    Err(CliError::refused("container", "the container cannot be started").why(error))
}

#[cfg(feature = "manager")]
fn serve(args: Args, global: &Global, printer: &Printer) -> Result<(), CliError> {
    use clan_manager::{Manager, ManagerError, Options};
    use tokio_util::sync::CancellationToken;

    let data = data_dir(global)?;
    let executable = crate::systemd::executable()?;
    let agent = args.agent.unwrap_or_else(|| agent_beside(&executable));
    let mut options = Options::new(executable, agent);
    options.listen = args.listen;
    if args.keep_vms {
        options.keep_vms.keep();
    }
    let keep = options.keep_vms.clone();
    options.vm_memory = args.vm_memory;
    options.mirror = args.mirror;
    options.proxy =
        ["http_proxy", "HTTP_PROXY"].iter().find_map(|name| std::env::var(name).ok()).filter(|proxy| !proxy.is_empty());
    let refused = |error: ManagerError| CliError::from(error.problem());

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::refused("system", "the manager cannot start").why(e))?;
    runtime.block_on(async {
        let cancel = CancellationToken::new();
        // Before anything starts: a signal that arrives meanwhile ends the manager in good order too.
        let signals = signals(cancel.clone(), keep)
            .map_err(|e| CliError::refused("system", "the manager cannot listen for signals").why(e))?;
        let manager = Manager::open(&data, options).await.map_err(refused)?;
        if printer.stderr_is_terminal() {
            printer.talk(&format!(
                "The manager runs. Its page: http://{}/ (sign in with `clan web`). Ctrl-C stops it.",
                manager.address()
            ));
        }
        let outcome = manager.run(cancel).await.map_err(refused);
        signals.abort();
        outcome
    })
}

/// Where the agent is installed, or was built.
#[cfg(feature = "manager")]
fn agent_beside(executable: &std::path::Path) -> PathBuf {
    let dir = executable.parent().unwrap_or(std::path::Path::new("/"));
    let beside = dir.join("clan-agent");
    let installed = dir.join("../lib/clan/clan-agent");
    if !beside.exists() && installed.exists() { installed } else { beside }
}

/// A task that cancels at the first SIGINT or SIGTERM; a second one ends the program at once.
#[cfg(feature = "manager")]
fn signals(
    cancel: tokio_util::sync::CancellationToken,
    keep: clan_manager::KeepVms,
) -> std::io::Result<tokio::task::JoinHandle<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if cancel.is_cancelled() {
                tracing::warn!("told to stop again: the manager ends now, and virtual machines go on");
                std::process::exit(i32::from(crate::error::Exit::Refused as u8));
            }
            let another = unit::restarts().await;
            tracing::info!(another, "told to stop");
            if another {
                keep.keep();
            }
            cancel.cancel();
        }
    }))
}

/// This executable was built without it.
#[cfg(not(feature = "manager"))]
fn serve(args: Args, global: &Global, _printer: &Printer) -> Result<(), CliError> {
    let listen = args.listen;
    let why = format!(
        "it was built without the manager, and neither listens on {listen} nor opens {}",
        data_dir(global)?.display()
    );
    Err(CliError::refused("not_built_in", "this executable is a client only").why(why))
}
