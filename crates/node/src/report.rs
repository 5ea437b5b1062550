//! What leaves the controller as text: errors in one sentence, and its own log.

use std::process::Stdio;

use clan_os::channel::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    process::{Child, ChildStdout, Command},
};

/// The most lines that are given out.
const MAX_LINES: u32 = 100_000;

/// An error and its causes, in one sentence.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Whose lines of the journal belong to the clan.
pub(crate) enum Scope {
    /// All of them: the machine is the clan's own.
    Everything,
    /// Those of the controller: the rest is nobody's business but the computer's owner's.
    Own,
}

/// A journal that is being read.
pub(crate) struct Journal {
    /// Kept, as dropping it ends the reader.
    _reader: Child,
    text: ChildStdout,
}

impl Journal {
    /// Starts to read. Fails with a sentence for the person.
    pub(crate) fn open(scope: &Scope, lines: u32, follow: bool) -> Result<Self, String> {
        let mut command = Command::new("journalctl");
        command.args(["--no-pager", "--output=short-iso", "--lines", &lines.min(MAX_LINES).to_string()]);
        if let Scope::Own = scope {
            let unit = own_unit()
                .ok_or("systemd did not start this controller, so its log is where its output goes".to_owned())?;
            command.args(["--unit", &unit]);
        }
        if follow {
            command.arg("--follow");
        }
        let started =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true).spawn();
        let mut reader = started.map_err(|error| format!("the journal cannot be read: {error}"))?;
        let text = reader.stdout.take().ok_or("the journal cannot be read".to_owned())?;
        Ok(Self { _reader: reader, text })
    }

    /// Passes it on until it ends, or until the other side has enough of following.
    pub(crate) async fn pass(self, stream: Stream, follow: bool) {
        let (mut from_manager, mut to_manager) = tokio::io::split(stream);
        self.pass_between(&mut from_manager, &mut to_manager, follow).await;
    }

    /// The same for somebody with two ways.
    pub(crate) async fn pass_between<R, W>(mut self, from: &mut R, to: &mut W, follow: bool)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        // The other side ending means that nobody follows any more.
        let mut nothing = tokio::io::sink();
        tokio::select! {
            _ = tokio::io::copy(&mut self.text, to) => {}
            _ = tokio::io::copy(from, &mut nothing), if follow => {}
        }
        let _ = to.shutdown().await;
    }
}

/// The systemd unit that this process runs in.
fn own_unit() -> Option<String> {
    unit_in(&std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The unit among lines such as `0::/system.slice/clan-controller.service` (cgroups(7)).
fn unit_in(cgroups: &str) -> Option<String> {
    let unit = cgroups.lines().filter_map(|line| line.rsplit('/').next()).find(|name| name.ends_with(".service"))?;
    Some(unit.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_unit_is_read_from_the_control_group() {
        assert_eq!(unit_in("0::/system.slice/clan-controller.service\n").as_deref(), Some("clan-controller.service"));
        assert_eq!(unit_in("0::/user.slice/user-1000.slice/session-2.scope\n"), None);
        assert_eq!(unit_in(""), None);
    }
}
