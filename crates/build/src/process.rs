//! Runs tools: output into a log and to the caller, line by line; cancellation ends the whole process group.

use std::{
    collections::VecDeque,
    env,
    ffi::OsString,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{io::AsyncReadExt, net::unix::pipe, process::Command};
use tokio_util::sync::CancellationToken;

use crate::{BuildError, Step, files::io_error};

/// Directories where administration tools live, which are not in everybody's search path.
const MORE_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";
/// Lines kept for the error.
const TAIL: usize = 20;
/// Longer lines are cut.
const MAX_LINE: usize = 1000;
/// How long a cancelled tool may clean up.
const GRACE: Duration = Duration::from_secs(10);
/// How long output may follow a tool's end: something it left behind may hold the pipe open.
const DRAIN: Duration = Duration::from_millis(300);

/// One run of a tool.
pub(crate) struct Tool<'a> {
    /// The program.
    pub(crate) name: &'static str,
    /// What it is for.
    pub(crate) step: Step,
    /// Where its output goes.
    pub(crate) log: &'a Path,
    /// Ends it.
    pub(crate) cancel: &'a CancellationToken,
}

/// Ends a process group unless disarmed: also when the future that runs the tool is dropped.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            // It may have ended by itself.
            let _ = kill_process_group(pid, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// The search path for tools.
pub(crate) fn search_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    if !path.is_empty() {
        path.push(":");
    }
    path.push(MORE_PATH);
    path
}

/// Where a tool is.
pub(crate) fn find(tool: &str) -> Option<PathBuf> {
    env::split_paths(&search_path())
        .map(|dir| dir.join(tool))
        .find(|path| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
}

/// A command with an environment that depends on nothing but the search path.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command
        .env_clear()
        .env("PATH", search_path())
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", "/nonexistent")
        .current_dir("/");
    command
}

impl Tool<'_> {
    /// Runs the command to its end; `on_line` gets each line of its output.
    pub(crate) async fn run(
        &self,
        mut command: Command,
        on_line: &mut (dyn FnMut(&str) + Send),
    ) -> Result<(), BuildError> {
        let mut log = File::create(self.log).map_err(io_error(self.step, "create", self.log))?;
        let started = |source| io_error(self.step, "start", Path::new(self.name))(source);
        let (reader, writer) = std::io::pipe().map_err(started)?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(started)?)
            .stderr(writer)
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(started)?;
        // The command holds the pipe's other end.
        drop(command);
        let mut group = Group(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
        let mut output = pipe::Receiver::from_owned_fd(reader.into()).map_err(started)?;

        let mut lines = Lines::default();
        let mut buffer = vec![0; 8192];
        let mut ended = None;
        let mut eof = false;
        let status = loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Err(self.stop(child, &group).await),
                read = output.read(&mut buffer), if !eof => match read {
                    Ok(0) | Err(_) => eof = true,
                    Ok(n) => {
                        log.write_all(&buffer[..n]).map_err(io_error(self.step, "write", self.log))?;
                        lines.push(&buffer[..n], on_line);
                    }
                },
                status = child.wait(), if ended.is_none() => {
                    ended = Some(status.map_err(started)?);
                    // Reaped: its number may be given to others from now on.
                    group.0 = None;
                }
                () = tokio::time::sleep(DRAIN), if ended.is_some() => eof = true,
            }
            if let (Some(status), true) = (ended, eof) {
                break status;
            }
        };
        lines.push(b"\n", on_line);
        if status.success() { Ok(()) } else { Err(self.failure(status, lines.tail.into())) }
    }

    async fn stop(&self, mut child: tokio::process::Child, group: &Group) -> BuildError {
        group.signal(Signal::TERM);
        if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
            group.signal(Signal::KILL);
            let _ = child.wait().await;
        }
        BuildError::Cancelled
    }

    fn failure(&self, status: ExitStatus, tail: Vec<String>) -> BuildError {
        if tail.iter().any(|line| line.contains("No space left on device") || line.contains("Disk quota exceeded")) {
            return BuildError::DiskFull { step: self.step, tail };
        }
        BuildError::ToolFailed {
            tool: self.name,
            step: self.step,
            status: status.to_string(),
            tail,
            log: self.log.to_owned(),
        }
    }
}

/// The line of a tool's output that says most about a failure.
pub(crate) fn cause(tail: &[String]) -> Option<&str> {
    let errors = ["E: ", "Err:", "error", "Error", "cannot", "failed"];
    let telling = errors.iter().find_map(|mark| tail.iter().find(|line| line.contains(mark)));
    telling.or_else(|| tail.iter().rev().find(|line| !line.starts_with("I: "))).or(tail.last()).map(String::as_str)
}

/// Cuts output into lines, of which the last ones are kept.
#[derive(Default)]
struct Lines {
    pending: Vec<u8>,
    tail: VecDeque<String>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], on_line: &mut (dyn FnMut(&str) + Send)) {
        for &byte in bytes {
            if byte != b'\n' && byte != b'\r' {
                if self.pending.len() < MAX_LINE {
                    self.pending.push(byte);
                }
                continue;
            }
            let text: String = String::from_utf8_lossy(&self.pending).chars().filter(|c| !c.is_control()).collect();
            self.pending.clear();
            let text = text.trim();
            if text.is_empty() {
                continue;
            }
            on_line(text);
            if self.tail.len() == TAIL {
                self.tail.pop_front();
            }
            self.tail.push_back(text.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    async fn shell(script: &str, cancel: &CancellationToken) -> (Result<(), BuildError>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut lines = Vec::new();
        let mut command = command("sh");
        command.args(["-c", script]);
        let tool = Tool { name: "sh", step: Step::Root, log: &log, cancel };
        let result = tool.run(command, &mut |line| lines.push(line.to_owned())).await;
        (result, lines)
    }

    #[tokio::test]
    async fn both_outputs_come_line_by_line() {
        let (result, lines) =
            shell("echo one; echo two >&2; printf 'a\\rb\\n\\nlast'", &CancellationToken::new()).await;
        result.unwrap();
        assert_eq!(lines, ["one", "two", "a", "b", "last"]);
    }

    #[tokio::test]
    async fn a_failure_says_the_status_and_the_last_lines() {
        let (result, _) = shell("seq 100; echo 'E: broken'; exit 3", &CancellationToken::new()).await;
        let Err(BuildError::ToolFailed { status, tail, .. }) = result else { panic!("{result:?}") };
        assert!(status.contains('3'));
        assert_eq!(tail.len(), TAIL);
        assert_eq!(cause(&tail), Some("E: broken"));
    }

    #[tokio::test]
    async fn a_full_disk_is_told_apart() {
        let (result, _) = shell("echo 'write: No space left on device'; exit 1", &CancellationToken::new()).await;
        assert!(matches!(result, Err(BuildError::DiskFull { step: Step::Root, .. })));
    }

    #[tokio::test]
    async fn cancelling_ends_the_tool_and_its_children() {
        let cancel = CancellationToken::new();
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", pid_file.display());
        let canceller = async {
            while !pid_file.exists() {
                tokio::task::yield_now().await;
            }
            cancel.cancel();
        };
        let started = Instant::now();
        let ((result, _), ()) = tokio::join!(shell(&script, &cancel), canceller);
        assert!(matches!(result, Err(BuildError::Cancelled)));
        assert!(started.elapsed() < GRACE);
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
        let gone = || std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z "));
        let limit = Instant::now() + Duration::from_secs(5);
        while !gone() {
            assert!(Instant::now() < limit, "the child still runs");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_a_tool_leaves_behind_does_not_hold_the_build() {
        let started = Instant::now();
        let (result, lines) = shell("sleep 20 & echo done", &CancellationToken::new()).await;
        result.unwrap();
        assert_eq!(lines, ["done"]);
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
