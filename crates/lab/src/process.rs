//! Programs run as one of the lab's people.

use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use crate::{Account, Interrupt, LabError, net::Namespace};

/// Marks every process of a lab in its environment, wherever it moved to.
pub(crate) const MARK: &str = "CLAN_LAB";

/// What a command left behind.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The command as a person would type it.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its data.
    pub stdout: String,
    /// Its talk.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Finished {
    /// Itself, if the command succeeded.
    ///
    /// # Errors
    /// With the command's output otherwise.
    pub fn success(self) -> Result<Self, LabError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(LabError::Command { output: self.output(), status: self.status.to_string(), command: self.command })
    }

    /// What it printed, as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<serde_json::Value, LabError> {
        serde_json::from_str(&self.stdout)
            .map_err(|error| LabError::Promise(format!("`{}` prints no JSON: {error}\n{}", self.command, self.stdout)))
    }

    /// Both streams.
    pub fn output(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A command that will run inside `namespace` as `account`, in a session of its own and with nothing of the lab's
/// environment. The caller adds arguments, variables and streams.
pub(crate) fn command_as(account: &Account, namespace: &Namespace, program: &OsStr) -> Result<Command, LabError> {
    Seat { account: Some(account), namespace, etc: None }.command(program)
}

/// Where a program runs, and as whom.
pub(crate) struct Seat<'a> {
    /// Root if absent.
    pub(crate) account: Option<&'a Account>,
    pub(crate) namespace: &'a Namespace,
    /// A folder that is `/etc` for the program; this machine's own if absent.
    pub(crate) etc: Option<&'a Path>,
}

impl Seat<'_> {
    /// The command, in a session of its own and with nothing of the lab's environment.
    pub(crate) fn command(&self, program: &OsStr) -> Result<Command, LabError> {
        let entrance = self.namespace.open()?;
        let user = self.account.map(|account| (account.uid, account.gid, account.groups.clone()));
        let complain = |why: std::ffi::NulError| LabError::io("name a computer's /etc")(why.into());
        let etc = self.etc.map(|etc| CString::new(etc.as_os_str().as_bytes())).transpose().map_err(complain)?;
        let mut command = Command::new(program);
        command.env_clear().env("LANG", "C.UTF-8");
        let name = self.account.map_or("root", |account| &account.name);
        command.env("USER", name).env("LOGNAME", name);
        // SAFETY: between fork and exec only system calls are made on memory that was allocated before. no_new_privs stays
        // unset on purpose: the image builder runs newuidmap, which is setuid.
        unsafe {
            command.pre_exec(move || {
                check(libc::setsid())?;
                check(libc::setns(entrance.as_raw_fd(), libc::CLONE_NEWNET))?;
                if let Some(etc) = &etc {
                    let (none, root) = (std::ptr::null(), c"/".as_ptr());
                    check(libc::unshare(libc::CLONE_NEWNS))?;
                    // What is mounted here stays here.
                    check(libc::mount(none, root, none, libc::MS_REC | libc::MS_PRIVATE, none.cast()))?;
                    check(libc::mount(etc.as_ptr(), c"/etc".as_ptr(), none, libc::MS_BIND, none.cast()))?;
                }
                if let Some((uid, gid, groups)) = &user {
                    check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                    check(libc::setresgid(*gid, *gid, *gid))?;
                    check(libc::setresuid(*uid, *uid, *uid))?;
                }
                Ok(())
            });
        }
        Ok(command)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs `command`, with the stdin that it was given, to its end, at most `limit`; every line of its talk goes to `hear` as it comes.
pub(crate) fn run(
    mut command: Command,
    shown: &str,
    limit: Duration,
    interrupt: &Interrupt,
    hear: impl FnMut(&str) + Send + 'static,
) -> Result<Finished, LabError> {
    let began = Instant::now();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(LabError::io(format!("start `{shown}`")))?;
    let stdout = gather(child.stdout.take(), |_| ());
    let stderr = gather(child.stderr.take(), hear);
    let status = loop {
        if let Some(status) = child.try_wait().map_err(LabError::io(format!("wait for `{shown}`")))? {
            break Some(status);
        }
        if began.elapsed() > limit || interrupt.is_set() {
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    if status.is_none() {
        end(&mut child);
    }
    let (stdout, stderr) = (stdout.finish(), stderr.finish());
    match status {
        Some(status) => Ok(Finished { command: shown.to_owned(), status, stdout, stderr, took: began.elapsed() }),
        None if interrupt.is_set() => Err(LabError::Interrupted),
        None => Err(LabError::TooSlow { command: shown.to_owned(), limit, output: stdout + &stderr }),
    }
}

/// Kills a child and its session, and reaps it.
pub(crate) fn end(child: &mut Child) {
    if let Some(session) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may be gone already, which is what is wanted.
        let _ = rustix::process::kill_process_group(session, Signal::KILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

struct Gathering {
    text: Arc<Mutex<String>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Gathering {
    /// What was read so far. Somebody may have inherited the pipe, so its end is awaited for a moment only.
    fn finish(mut self) -> String {
        if let Some(thread) = self.thread.take() {
            let began = Instant::now();
            while !thread.is_finished() && began.elapsed() < Duration::from_secs(1) {
                thread::sleep(Duration::from_millis(5));
            }
        }
        self.text.lock().map(|text| text.clone()).unwrap_or_default()
    }
}

fn gather(stream: Option<impl Read + Send + 'static>, mut hear: impl FnMut(&str) + Send + 'static) -> Gathering {
    let text = Arc::new(Mutex::new(String::new()));
    let thread = stream.and_then(|stream| {
        let text = Arc::clone(&text);
        let read = move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let decoded = String::from_utf8_lossy(&line).into_owned();
                hear(decoded.trim_end());
                if let Ok(mut text) = text.lock() {
                    text.push_str(&decoded);
                }
                line.clear();
            }
        };
        thread::Builder::new().name("lab-gather".into()).spawn(read).ok()
    });
    Gathering { text, thread }
}

/// A process of this machine, told from a later one of the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ProcessId {
    /// Process number.
    pub(crate) pid: u32,
    /// Clock ticks after boot, from `/proc/<pid>/stat`.
    pub(crate) started: u64,
}

impl ProcessId {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything, blanks included: fields are counted from its end.
        let after_name: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // A zombie ran once; it holds nothing and cannot be ended.
        (*after_name.first()? != "Z").then_some(())?;
        Some(Self { pid, started: after_name.get(19)?.parse().ok()? })
    }

    pub(crate) fn alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal to this process and to no other that may have got its number.
    pub(crate) fn signal(self, signal: Signal) {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
        if let Ok(handle) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            && self.alive()
        {
            let _ = rustix::process::pidfd_send_signal(&handle, signal);
        }
    }
}

/// Every process for which `test` is true, given its folder in `/proc`; never the caller's own.
pub fn matching(test: impl Fn(&PathBuf) -> bool) -> Vec<u32> {
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != own && test(&PathBuf::from(format!("/proc/{pid}")))).collect()
}

/// Whether a process's network has a listening Unix socket below a folder. Asking the kernel, rather than the socket,
/// leaves no trace in the log of whoever listens.
pub(crate) fn listens_below(pid: u32, folder: &std::path::Path) -> bool {
    let table = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    // Num RefCount Protocol Flags Type St Inode Path; the flag is __SO_ACCEPTCON.
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
        matches!(fields.as_slice(), [_, _, _, "00010000", _, _, _, path] if std::path::Path::new(path).starts_with(folder))
    })
}

/// An append-only log that only its owner reads.
pub(crate) fn open_log(path: &PathBuf, account: &Account) -> Result<File, LabError> {
    use std::os::unix::fs::OpenOptionsExt;
    let complain = || LabError::io(format!("open {}", path.display()));
    let file = File::options().create(true).append(true).mode(0o600).open(path).map_err(complain())?;
    std::os::unix::fs::fchown(&file, Some(account.uid), Some(account.gid)).map_err(complain())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_another_of_the_same_number() {
        let own = ProcessId::of(std::process::id()).unwrap();
        assert!(own.alive());
        assert!(!ProcessId { started: own.started + 1, ..own }.alive());
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 1000"]);
        let error = run(command, "sleep", Duration::from_millis(300), &Interrupt::default(), |_| ()).unwrap_err();
        assert!(matches!(error, LabError::TooSlow { ref output, .. } if output == "begun\n"), "{error}");
    }

    #[test]
    fn talk_is_heard_line_by_line_and_kept() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one >&2; echo two >&2; echo data"]);
        let (heard, lines) = std::sync::mpsc::channel();
        let finished = run(command, "talk", Duration::from_secs(10), &Interrupt::default(), move |line| {
            let _ = heard.send(line.to_owned());
        })
        .unwrap();
        assert_eq!(lines.iter().collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("data\n", "one\ntwo\n"));
    }
}
