//! A program at a terminal of its own (pty(7)), or on plain pipes: started, written to, read from, and ended with everything
//! that it started in its session.

use std::{
    fs, io,
    os::fd::{BorrowedFd, OwnedFd},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchown, fcntl_setfl, open},
    process::{Pid, Signal, ioctl_tiocsctty, kill_process, setsid},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    sync::Mutex,
    time::timeout,
};

/// Bytes read at a time.
const CHUNK: usize = 16 << 10;
/// A program that has ended may have left something behind that keeps its terminal open: so long is waited for more.
const LEFTOVERS: Duration = Duration::from_millis(100);
/// Looks for processes of a session that is killed: each finds what those before it started in the meantime.
const SWEEPS: usize = 16;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Program {
    /// The program and its arguments; a login shell if there are none.
    pub command: Vec<String>,
    /// Rows, columns and `TERM` of its terminal; plain pipes without.
    pub screen: Option<(u16, u16, String)>,
    /// Whose rights it has, by number, where those are not this process's own.
    pub user: Option<u32>,
}

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    name: String,
    user: u32,
    group: u32,
    home: String,
}

/// A program that runs. Everything in its session is killed when this is dropped.
pub struct Terminal {
    way: Way,
    child: Mutex<Child>,
    /// The session, which bears the number of the process that leads it.
    session: Option<Pid>,
}

enum Way {
    Pty(AsyncFd<OwnedFd>),
    Pipes { input: Mutex<Option<ChildStdin>>, output: Mutex<(ChildStdout, bool)>, aside: Mutex<(ChildStderr, bool)> },
}

/// What a program says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// On its terminal, or its standard output.
    Output(Vec<u8>),
    /// On its standard error, where that is a pipe.
    Aside(Vec<u8>),
    /// It has ended so: its exit status, or 128 and the number of the signal that killed it.
    Ended(u8),
}

impl Terminal {
    /// Starts a program in its user's home, with a plain environment.
    pub fn start(program: &Program) -> io::Result<Self> {
        let account = program.account()?;
        let mut command = program.command(&account);
        let started = match &program.screen {
            Some((rows, columns, term)) => {
                let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
                grantpt(&master)?;
                unlockpt(&master)?;
                let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
                if program.becomes_another() {
                    fchown(&slave, Some(Uid::from_raw(account.user)), Some(Gid::from_raw(account.group)))?;
                }
                tcsetwinsize(&master, window(*rows, *columns))?;
                fcntl_setfl(&master, OFlags::NONBLOCK)?;
                command.env("TERM", term);
                command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
                lead_session(&mut command, true);
                let child = command.spawn()?;
                // SAFETY: the descriptor is owned, and stays open as long as it is registered.
                (Way::Pty(unsafe { AsyncFd::register(master) }?), child)
            }
            None => {
                command.env("TERM", "dumb").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
                lead_session(&mut command, false);
                let mut child = command.spawn()?;
                let missing = || io::Error::from(io::ErrorKind::BrokenPipe);
                let output = child.stdout.take().ok_or_else(missing)?;
                let aside = child.stderr.take().ok_or_else(missing)?;
                let input = Mutex::new(child.stdin.take());
                (Way::Pipes { input, output: Mutex::new((output, true)), aside: Mutex::new((aside, true)) }, child)
            }
        };
        let (way, child) = started;
        let session = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        Ok(Self { way, child: Mutex::new(child), session })
    }

    /// Types. Waits while the program takes nothing.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.way {
            Way::Pty(master) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let written = master.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, rest)?)).await?;
                    rest = rest.get(written..).unwrap_or_default();
                }
                Ok(())
            }
            Way::Pipes { input, .. } => match input.lock().await.as_mut() {
                Some(input) => input.write_all(bytes).await,
                None => Err(io::ErrorKind::BrokenPipe.into()),
            },
        }
    }

    /// Says that nothing more is typed: closes the pipe, or types what ends an input at a terminal.
    pub async fn end_input(&self) -> io::Result<()> {
        const END_OF_TRANSMISSION: u8 = 4;
        match &self.way {
            Way::Pty(_) => self.write(&[END_OF_TRANSMISSION]).await,
            Way::Pipes { input, .. } => {
                input.lock().await.take();
                Ok(())
            }
        }
    }

    /// Gives the terminal another size; programs hear of it (SIGWINCH).
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        match &self.way {
            Way::Pty(master) => Ok(tcsetwinsize(master, window(rows, columns))?),
            Way::Pipes { .. } => Ok(()),
        }
    }

    /// What the program says next; `None` when it says nothing more.
    async fn say(&self) -> Option<Said> {
        match &self.way {
            Way::Pty(master) => {
                let mut chunk = vec![0; CHUNK];
                let count = master.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, chunk.as_mut_slice())?));
                // EIO: nobody has the terminal open any more.
                let count = count.await.ok().filter(|count| *count > 0)?;
                chunk.truncate(count);
                Some(Said::Output(chunk))
            }
            Way::Pipes { output, aside, .. } => {
                let (mut output, mut aside) = (output.lock().await, aside.lock().await);
                let (mut first, mut second) = (vec![0; CHUNK], vec![0; CHUNK]);
                while output.1 || aside.1 {
                    let (out, err) = (&mut *output, &mut *aside);
                    tokio::select! {
                        count = out.0.read(&mut first), if out.1 => match count {
                            Ok(count) if count > 0 => {
                                first.truncate(count);
                                return Some(Said::Output(first));
                            }
                            _ => out.1 = false,
                        },
                        count = err.0.read(&mut second), if err.1 => match count {
                            Ok(count) if count > 0 => {
                                second.truncate(count);
                                return Some(Said::Aside(second));
                            }
                            _ => err.1 = false,
                        },
                    }
                }
                None
            }
        }
    }

    /// What the program says next, [`Said::Ended`] last. Cancel safe.
    pub async fn next(&self) -> io::Result<Said> {
        let mut child = self.child.lock().await;
        let status = tokio::select! {
            biased;
            said = self.say() => match said {
                Some(said) => return Ok(said),
                None => child.wait().await?,
            },
            status = child.wait() => {
                let status = status?;
                if let Ok(Some(said)) = timeout(LEFTOVERS, self.say()).await {
                    return Ok(said);
                }
                status
            }
        };
        Ok(Said::Ended(code(status)))
    }

    /// Kills everything that runs in the session, whichever process group it has put itself into. What has begun a session of its
    /// own is out of reach.
    fn kill(&self) {
        let Some(session) = self.session else { return };
        for _ in 0..SWEEPS {
            let living = in_session(session);
            if living.is_empty() {
                return;
            }
            for process in living {
                let _ = kill_process(process, Signal::KILL);
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Program {
    fn becomes_another(&self) -> bool {
        self.user.is_some_and(|user| user != rustix::process::geteuid().as_raw())
    }

    fn account(&self) -> io::Result<Account> {
        let user = self.user.unwrap_or_else(|| rustix::process::geteuid().as_raw());
        let known = account_in(&fs::read_to_string("/etc/passwd").unwrap_or_default(), user);
        match known {
            Some(account) => Ok(account),
            None if self.becomes_another() => {
                Err(io::Error::new(io::ErrorKind::NotFound, format!("this computer has no user {user} in /etc/passwd")))
            }
            None => {
                let group = rustix::process::getegid().as_raw();
                Ok(Account { name: user.to_string(), user, group, home: "/".to_owned() })
            }
        }
    }

    fn command(&self, account: &Account) -> Command {
        let shell = if Path::new("/bin/bash").exists() { "/bin/bash" } else { "/bin/sh" };
        let mut command = match self.command.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments);
                command
            }
            None => {
                let mut command = Command::new(shell);
                command.arg("-l");
                command
            }
        };
        if self.becomes_another() {
            // Without the other groups that they, or this process, may be in.
            command.uid(account.user).gid(account.group);
        }
        let directory = if Path::new(&account.home).is_dir() { account.home.as_str() } else { "/" };
        command
            .current_dir(directory)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", &account.home)
            .env("USER", &account.name)
            .env("LOGNAME", &account.name)
            .env("SHELL", shell)
            .env("LANG", "C.UTF-8")
            .kill_on_drop(true);
        command
    }
}

/// The account of a user (passwd(5)).
fn account_in(passwd: &str, user: u32) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, number, group, _, home, _] = fields.as_slice() else { return None };
        let account = Account {
            name: (*name).to_owned(),
            user: number.parse().ok()?,
            group: group.parse().ok()?,
            home: (*home).to_owned(),
        };
        (account.user == user).then_some(account)
    })
}

/// Has the program lead a session of its own, at the terminal that is its standard input if it has one.
fn lead_session(command: &mut Command, at_terminal: bool) {
    let begin = move || -> io::Result<()> {
        setsid()?;
        // What is run here is not as precious as the controller: short of memory, it goes first. As well as it may.
        if let Ok(file) = open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty()) {
            let _ = rustix::io::write(file, b"0");
        }
        if at_terminal {
            // SAFETY: between fork and exec standard input is open: it was set to the terminal.
            ioctl_tiocsctty(unsafe { BorrowedFd::borrow_raw(0) })?;
        }
        Ok(())
    };
    // SAFETY: system calls, and no memory is taken.
    unsafe { command.pre_exec(begin) };
}

fn window(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn code(status: ExitStatus) -> u8 {
    let killed = status.signal().map(|signal| 128 + signal);
    u8::try_from(status.code().or(killed).unwrap_or(255)).unwrap_or(255)
}

/// The processes of a session that live (proc(5), `/proc/PID/stat`).
fn in_session(session: Pid) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let of = |number: i32| {
        let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
        session_in(&stat)
    };
    numbers.filter(|number| of(*number) == Some(session.as_raw_nonzero().get())).filter_map(Pid::from_raw).collect()
}

/// The sixth field; the second is a name in brackets, which may have anything in it. `None` for those that have ended (`Z` or `X`).
fn session_in(stat: &str) -> Option<i32> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    fields.next().filter(|state| !matches!(*state, "Z" | "X" | "x"))?;
    fields.nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(command: &[&str], screen: bool) -> Program {
        let screen = screen.then(|| (24, 80, "xterm".to_owned()));
        Program { command: command.iter().map(|word| (*word).to_owned()).collect(), screen, user: None }
    }

    /// Everything that a program says, and how it ended.
    async fn whole(terminal: &Terminal) -> (String, String, u8) {
        let (mut output, mut aside) = (Vec::new(), Vec::new());
        let heard = timeout(Duration::from_secs(20), async {
            loop {
                match terminal.next().await.unwrap() {
                    Said::Output(bytes) => output.extend(bytes),
                    Said::Aside(bytes) => aside.extend(bytes),
                    Said::Ended(status) => return status,
                }
            }
        });
        let status = heard.await.expect("it ends");
        (String::from_utf8(output).unwrap(), String::from_utf8(aside).unwrap(), status)
    }

    async fn until(terminal: &Terminal, text: &str) {
        let mut seen = String::new();
        while !seen.contains(text) {
            match timeout(Duration::from_secs(20), terminal.next()).await.expect(text).unwrap() {
                Said::Output(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {seen}"),
            }
        }
    }

    #[tokio::test]
    async fn a_command_has_its_two_ways_out_and_its_exit_status() {
        let terminal = Terminal::start(&program(&["sh", "-c", "cat; echo no >&2; exit 7"], false)).unwrap();
        terminal.write(b"yes").await.unwrap();
        terminal.end_input().await.unwrap();
        assert_eq!(whole(&terminal).await, ("yes".into(), "no\n".into(), 7));
        let killed = Terminal::start(&program(&["sh", "-c", "kill -TERM $$"], false)).unwrap();
        assert_eq!(whole(&killed).await.2, 143);
    }

    #[tokio::test]
    async fn a_terminal_is_one_and_hears_of_another_size_and_of_ctrl_c() {
        let script =
            "trap 'stty size' WINCH; test -t 0 && test -t 1 && echo ready; stty size; while :; do sleep 0.05; done";
        let terminal = Terminal::start(&program(&["sh", "-c", script], true)).unwrap();
        until(&terminal, "24 80").await;
        terminal.resize(40, 132).unwrap();
        until(&terminal, "40 132").await;
        terminal.write(&[3]).await.unwrap();
        assert_eq!(whole(&terminal).await.2, 130, "SIGINT");
    }

    async fn all_gone(session: Pid) {
        let gone = timeout(Duration::from_secs(20), async {
            while !in_session(session).is_empty() {
                tokio::task::yield_now().await;
            }
        });
        gone.await.expect("all of them are dead");
    }

    #[tokio::test]
    async fn nothing_of_a_session_outlives_it() {
        let script = "set -m; sleep 1000 & trap '' HUP TERM; echo $$ started; sleep 1000";
        let terminal = Terminal::start(&program(&["bash", "-c", script], true)).unwrap();
        until(&terminal, "started").await;
        let session = terminal.session.unwrap();
        assert!(in_session(session).len() > 1);
        drop(terminal);
        all_gone(session).await;
    }

    #[tokio::test]
    async fn whatever_starts_others_while_it_is_killed_does_not_leave_them_behind() {
        let script = "for i in 1 2 3; do (while :; do sleep 1000 & sleep 0.002; done) & done; echo started; wait";
        let terminal = Terminal::start(&program(&["sh", "-c", script], false)).unwrap();
        until(&terminal, "started").await;
        let session = terminal.session.unwrap();
        while in_session(session).len() < 40 {
            tokio::task::yield_now().await;
        }
        drop(terminal);
        all_gone(session).await;
    }

    #[tokio::test]
    async fn a_program_of_another_user_has_their_rights_and_terminal_and_no_other_group() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let nobody = 65534;
        let script = "id -u; id -G; stat -c %u $(tty); echo $HOME";
        let program = Program { user: Some(nobody), ..program(&["sh", "-c", script], true) };
        let said = whole(&Terminal::start(&program).unwrap()).await;
        assert_eq!(said.0.replace('\r', ""), "65534\n65534\n65534\n/nonexistent\n", "{said:?}");
        assert!(Terminal::start(&Program { user: Some(4_000_000_000), ..program }).is_err());
    }

    #[test]
    fn accounts_are_read_as_the_system_keeps_them() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nada:x:1000:1001:Ada,,,:/home/ada:/bin/sh\n";
        let ada = Account { name: "ada".into(), user: 1000, group: 1001, home: "/home/ada".into() };
        assert_eq!(account_in(passwd, 1000), Some(ada));
        assert_eq!(account_in(passwd, 5), None);
    }

    #[test]
    fn a_programs_name_cannot_put_it_into_another_session() {
        assert_eq!(session_in("12 (a) b) 1 2 3) S 1 12 77 0 -1"), Some(77));
        assert_eq!(session_in("12 (sh) Z 1 12 77 0 -1"), None, "it has ended");
    }
}
