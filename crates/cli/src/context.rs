//! What the client commands share: where the manager is, how to ask it, how to ask the person.

use std::{
    io::BufRead as _,
    path::{Path, PathBuf},
    time::Duration,
};

use clan_api::{ClientError, ManagerClient};

use crate::{args::Global, error::CliError, printer::Printer};

/// The setting of one run of a client command.
#[derive(Debug)]
pub(crate) struct Context {
    /// Where to print.
    pub(crate) printer: Printer,
    /// The manager.
    pub(crate) client: ManagerClient,
    /// Log lines are wanted.
    pub(crate) verbose: bool,
    yes: bool,
    timeout: Duration,
}

impl Context {
    /// From the global flags.
    pub(crate) fn new(global: &Global, printer: &Printer) -> Result<Self, CliError> {
        Ok(Self {
            printer: printer.clone(),
            client: ManagerClient::unix(data_dir(global)?.join("run/manager.sock")),
            verbose: global.verbose > 0,
            yes: global.yes,
            timeout: Duration::from_secs(global.timeout),
        })
    }

    /// Waits for an answer of the manager, but not for ever.
    pub(crate) async fn ask<T>(&self, answer: impl Future<Output = Result<T, ClientError>>) -> Result<T, CliError> {
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(answer) => answer.map_err(CliError::from),
            Err(_) => Err(CliError::timed_out(self.timeout)),
        }
    }

    /// The clan that was named; or the only one, if none was.
    pub(crate) async fn clan(&self, named: Option<String>) -> Result<String, CliError> {
        if let Some(named) = named {
            return Ok(named);
        }
        let clans = self.ask(self.client.clans()).await?;
        match clans.as_slice() {
            [only] => Ok(only.id.to_string()),
            [] => Err(CliError::refused("no_clan", "you are in no clan yet")
                .hint("found one: `clan create NAME`")
                .hint("or accept an invitation: `clan join LINK`")),
            several => {
                let names: Vec<&str> = several.iter().map(|c| c.name.as_str()).collect();
                Err(CliError::refused("ambiguous", "which clan?")
                    .why(format!("you are in {}: {}", several.len(), names.join(", ")))
                    .hint("name the clan in the command"))
            }
        }
    }

    /// Whether [`Self::confirm`] will ask somebody.
    pub(crate) fn will_ask(&self) -> bool {
        !self.yes && self.printer.can_ask()
    }

    /// Goes on only if the person agrees. `otherwise` completes "add --yes to …".
    pub(crate) fn confirm(&self, question: &str, otherwise: &str) -> Result<(), CliError> {
        if self.yes {
            return Ok(());
        }
        if !self.printer.can_ask() {
            return Err(CliError::refused(
                "needs_confirmation",
                "this needs your consent, and there is no terminal to ask on",
            )
            .hint(format!("add `--yes` to {otherwise}")));
        }
        self.printer.ask(&format!("{question} [y/N]"));
        if matches!(read_line()?.to_ascii_lowercase().as_str(), "y" | "yes") {
            Ok(())
        } else {
            Err(CliError::refused("declined", "nothing was changed"))
        }
    }
}

/// One line of stdin, without blanks around it.
pub(crate) fn read_line() -> Result<String, CliError> {
    Ok(next_line()?.unwrap_or_default().trim().to_owned())
}

/// One line that is typed without showing, with its end and all blanks.
pub(crate) fn secret_line(printer: &Printer) -> Result<String, CliError> {
    use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
    let stdin = std::io::stdin();
    let hidden = |e| CliError::refused("terminal", "the terminal cannot be kept from showing what you type").why(e);
    let shown = tcgetattr(&stdin).map_err(hidden)?;
    let mut quiet = shown.clone();
    quiet.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&stdin, OptionalActions::Flush, &quiet).map_err(hidden)?;
    let line = next_line();
    let restored = tcsetattr(&stdin, OptionalActions::Now, &shown);
    printer.talk("");
    restored.map_err(hidden)?;
    Ok(line?.unwrap_or_default())
}

/// One line of stdin with its end; `None` if there is no more.
pub(crate) fn next_line() -> Result<Option<String>, CliError> {
    let mut line = String::new();
    // A person's line is short; whatever is longer is none.
    let mut limited = std::io::Read::take(std::io::stdin().lock(), 16 << 10);
    let read = limited.read_line(&mut line);
    let read = read.map_err(|e| CliError::refused("stdin", "the answer cannot be read").why(e))?;
    Ok((read > 0).then_some(line))
}

/// The data folder that the flags and the environment name.
pub(crate) fn data_dir(global: &Global) -> Result<PathBuf, CliError> {
    if let Some(dir) = &global.data {
        return std::path::absolute(dir).map_err(|e| {
            CliError::refused("data_dir", format!("the data folder {} is not usable", dir.display())).why(e)
        });
    }
    // XDG base directory specification: a relative path is invalid and ignored.
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(Path::new(".local/share"))))
        .map(|base| base.join("clan"))
        .ok_or_else(|| {
            CliError::refused("data_dir", "there is no place for your data")
                .why("neither XDG_DATA_HOME nor HOME is set")
                .hint("name a folder: `--data DIR`")
        })
}
