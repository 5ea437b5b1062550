//! What can go wrong in the lab.

use std::{io, path::PathBuf, time::Duration};

/// Why the lab, or a step told on it, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// Network namespaces need root.
    #[error("the lab lays network namespaces, which needs root: run it with sudo, or as root")]
    NeedsRoot,
    /// The user that the managers are to run as does not exist.
    #[error("there is no user account `{0}` for the managers to run as: run `make deps`")]
    NoAccount(String),
    /// The user has no subordinate ids, which the image builder needs.
    #[error(
        "the user `{0}` has no subordinate ids in /etc/subuid, which building an image without root needs: run `make deps`"
    )]
    NoSubordinateIds(String),
    /// A program of the product is missing.
    #[error("there is no `{name}` in {dir}: run `cargo build` first")]
    NoProgram {
        /// Its name.
        name: &'static str,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// Another lab of that name runs.
    #[error("a lab `{prefix}` is already up (process {pid}): `clan-lab stop` ends it")]
    AlreadyUp {
        /// Its prefix.
        prefix: String,
        /// Its process.
        pid: u32,
    },
    /// An operation on the system failed.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A command ended with another status than 0.
    #[error("`{command}` ended with {status}\n{output}")]
    Command {
        /// The command as a person would type it.
        command: String,
        /// How it ended.
        status: String,
        /// What it wrote, stdout then stderr.
        output: String,
    },
    /// A command took too long.
    #[error("`{command}` was stopped after {} s\n{output}", limit.as_secs())]
    TooSlow {
        /// The command as a person would type it.
        command: String,
        /// The limit.
        limit: Duration,
        /// What it had written.
        output: String,
    },
    /// Something was waited for in vain.
    #[error("{what} did not happen within {} s", limit.as_secs())]
    InVain {
        /// What.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The product did something else than it promises.
    #[error("{0}")]
    Promise(String),
    /// Somebody stopped the lab.
    #[error("stopped")]
    Interrupted,
}

impl LabError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The error and its causes, in one line each.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            text.push_str(&format!(": {next}"));
            cause = next.source();
        }
        text
    }
}
