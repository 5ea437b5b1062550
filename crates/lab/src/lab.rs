//! A lab that is up: its networks, people and managers.

use std::{
    fs::{self, File, Permissions},
    io::Write,
    net::{Ipv4Addr, TcpListener},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Account, Capture, Console, Finished, LabError, Screen,
    net::{self, FOUNDER_ADDRESS, INTERNET_ADDRESS, Namespace, PROXY_PORT, SECOND_ADDRESS, STRANGER_ADDRESS},
    process::{self, MARK, ProcessId, command_as, end, open_log},
    proxy::Proxy,
    record::Record,
    sweep::{remove, sweep},
};

/// The lab's people, their addresses and the ports of this machine where their managers answer.
const PEOPLE: [(&str, Ipv4Addr, u16); 3] =
    [("founder", FOUNDER_ADDRESS, 8411), ("second", SECOND_ADDRESS, 8412), ("stranger", STRANGER_ADDRESS, 8413)];
/// Where their programs are found.
pub(crate) const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin";
/// Longest that one command may take: building an image over a slow line under emulation.
const COMMAND_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Set once somebody wants the lab to end.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks for the end.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether the end was asked for.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// How to lay a lab.
#[derive(Debug, Clone)]
pub struct LabConfig {
    /// In front of the names of namespaces; a DNS label.
    pub prefix: String,
    /// Where data folders, images and logs go; default: the account's state folder.
    pub state: Option<PathBuf>,
    /// Folder with `clan` and `clan-agent`.
    pub programs: PathBuf,
    /// Account that the managers run as; default: see [`Account::for_lab`].
    pub account: Option<String>,
    /// Whether the managers take any free ports rather than 8411 and 8412.
    pub any_ports: bool,
    /// Whether nobody but the founder starts with an image, so that the others have to get it from members.
    pub fresh_second: bool,
    /// Whether there is a third computer, of a `stranger`, to whom things may happen that nobody else should suffer.
    pub stranger: bool,
    /// Where to capture what crosses the bridge.
    pub capture: Option<PathBuf>,
    /// Asks for the end from another thread.
    pub interrupt: Interrupt,
}

impl LabConfig {
    /// The usual lab of the programs in `programs`.
    pub fn new(programs: impl Into<PathBuf>) -> Self {
        Self {
            prefix: "clan".into(),
            state: None,
            programs: programs.into(),
            account: None,
            any_ports: false,
            fresh_second: false,
            stranger: false,
            capture: None,
            interrupt: Interrupt::default(),
        }
    }

    /// Where this lab keeps its state.
    ///
    /// # Errors
    /// When there is no account to run as.
    pub fn state_root(&self) -> Result<PathBuf, LabError> {
        match &self.state {
            Some(state) => std::path::absolute(state).map_err(LabError::io(format!("find {}", state.display()))),
            None => Ok(Account::for_lab(self.account.as_deref())?.state_root()),
        }
    }
}

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    record: Record,
    account: Account,
    screen: Screen,
    people: Vec<Person>,
    capture: Option<Capture>,
    _proxy: Proxy,
}

/// One person's computer.
#[derive(Debug)]
pub struct Person {
    name: String,
    prefix: String,
    account: Account,
    namespace: Namespace,
    folder: PathBuf,
    program: PathBuf,
    log: PathBuf,
    path: String,
    options: Vec<String>,
    listener: TcpListener,
    manager: Option<Child>,
    interrupt: Interrupt,
    screen: Screen,
}

impl Lab {
    /// Lays the networks and folders. What an earlier lab of this name left is swept first.
    ///
    /// # Errors
    /// When this is not root, an account or a program is missing, or such a lab is up. Nothing stays behind.
    pub fn up(config: &LabConfig, screen: &Screen) -> Result<Self, LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::NeedsRoot);
        }
        let account = Account::for_lab(config.account.as_deref())?;
        let state_root = config.state_root()?;
        if let Some(old) = Record::load(&config.prefix)? {
            if old.is_running() {
                return Err(LabError::AlreadyUp { prefix: old.prefix.clone(), pid: old.pid() });
            }
            sweep(&old)?;
        }
        let owner =
            ProcessId::of(std::process::id()).ok_or_else(|| LabError::Promise("/proc is not mounted".into()))?;
        let names: Vec<&str> = people(config).map(|(name, ..)| *name).collect();
        let record = Record::new(&config.prefix, owner, &state_root, &names);
        record.save()?;
        Self::lay(config, screen, account, record.clone()).inspect_err(|_| {
            // The first error is the one to tell; what cannot be swept now is in the record.
            let _ = sweep(&record);
        })
    }

    fn lay(config: &LabConfig, screen: &Screen, account: Account, record: Record) -> Result<Self, LabError> {
        // A lab that lost its record would otherwise be in the way.
        for namespace in record.namespaces() {
            namespace.remove()?;
        }
        copy_programs(&config.programs, &record, &account)?;
        let internet = record.internet();
        net::lay_internet(&internet)?;
        let proxy = Proxy::start(&internet)?;
        let capture = config.capture.as_deref().map(|file| Capture::start(&record, file)).transpose()?;
        let mut people = Vec::new();
        for &(name, address, port) in self::people(config) {
            let namespace = record.computer(name);
            net::lay_computer(&namespace, name, address, &internet)?;
            own_folder(&record.folder(name), &account)?;
            if config.fresh_second && name != "founder" {
                remove(&record.data(name).join("images"))?;
            }
            let log = record.logs().join(format!("{name}-manager.log"));
            remove(&log)?;
            people.push(Person {
                name: name.to_owned(),
                path: PATH.to_owned(),
                options: Vec::new(),
                prefix: record.prefix.clone(),
                account: account.clone(),
                namespace,
                folder: record.folder(name),
                program: record.programs().join("clan"),
                log,
                listener: listen(port, config.any_ports)?,
                manager: None,
                interrupt: config.interrupt.clone(),
                screen: screen.clone(),
            });
        }
        Ok(Self { record, account, screen: screen.clone(), people, capture, _proxy: proxy })
    }

    /// Has a person's manager build an image with another build of `clan` in it. Gives its id.
    ///
    /// # Errors
    /// When the program cannot be exchanged, or the image not be built.
    pub fn build_another(&mut self, person: &str) -> Result<String, LabError> {
        let program = self.record.programs().join("clan");
        let complain = || LabError::io("make another build");
        let (kept, next) = (program.with_extension("kept"), program.with_extension("next"));
        // Nobody looks at what follows the last section.
        let mut bytes = fs::read(&program).map_err(complain())?;
        bytes.extend_from_slice(b"another build");
        fs::write(&next, bytes).map_err(complain())?;
        fs::set_permissions(&next, fs::metadata(&program).map_err(complain())?.permissions()).map_err(complain())?;
        fs::rename(&program, &kept).and_then(|()| fs::rename(&next, &program)).map_err(complain())?;
        let built = self.person(person).clan_json(&["image", "build"]);
        fs::rename(&kept, &program).map_err(complain())?;
        let built = built?;
        let id = built["result"]["id"].as_str();
        id.map(str::to_owned).ok_or_else(|| LabError::Promise(format!("no image was built: {built}")))
    }

    /// One of the lab's people: `founder` or `second`.
    ///
    /// # Panics
    /// When there is nobody of that name.
    pub fn person(&mut self, name: &str) -> &mut Person {
        match self.people.iter_mut().find(|person| person.name == name) {
            Some(person) => person,
            None => panic!("the lab has no person `{name}`"),
        }
    }

    /// Everybody.
    pub fn people(&mut self) -> impl Iterator<Item = &mut Person> {
        self.people.iter_mut()
    }

    /// What the lab made, for whoever looks for leftovers.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The ordinary user.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// Where to tell what happens.
    pub fn screen(&self) -> &Screen {
        &self.screen
    }

    /// Lets this person's wire carry so many Mbit/s to others from now on.
    ///
    /// # Errors
    /// When the kernel does not do it.
    ///
    /// # Panics
    /// When there is nobody of that name.
    pub fn slow(&mut self, name: &str, mbit: u32) -> Result<(), LabError> {
        self.person(name).namespace.slow("eth0", mbit)
    }

    /// The running capture, if the lab was laid with one.
    pub fn take_capture(&mut self) -> Option<Capture> {
        self.capture.take()
    }

    /// Ends everything. Images, caches and logs stay.
    ///
    /// # Errors
    /// When something resists; `clan-lab stop` may be tried again.
    pub fn down(mut self) -> Result<(), LabError> {
        drop(self.capture.take());
        let record = self.record.clone();
        thread::scope(|scope| {
            // The managers are children of this process: unless it waits for them, they stay in the process table.
            for person in &mut self.people {
                scope.spawn(|| person.reap());
            }
            sweep(&record)
        })
    }
}

impl Person {
    /// Their name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Port of this machine's loopback where their manager answers browsers.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn port(&self) -> Result<u16, LabError> {
        Ok(self.listener.local_addr().map_err(LabError::io("name the manager's socket"))?.port())
    }

    /// The process of their manager, if it was started.
    pub fn manager_pid(&self) -> Option<u32> {
        self.manager.as_ref().map(Child::id)
    }

    /// Whether their manager was started.
    pub fn has_manager(&self) -> bool {
        self.manager.is_some()
    }

    /// Their data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Where their manager's talk goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Any program, as this person on their computer. Streams and arguments are the caller's.
    ///
    /// # Errors
    /// When the computer is gone.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command, LabError> {
        let mut command = command_as(&self.account, &self.namespace, program.as_ref())?;
        command
            .current_dir(&self.folder)
            .env("PATH", &self.path)
            .env("HOME", &self.folder)
            .env("CLAN_DATA", self.data())
            .env(MARK, &self.prefix);
        command
            .env("http_proxy", format!("http://{INTERNET_ADDRESS}:{PROXY_PORT}"))
            .env("no_proxy", "localhost,127.0.0.1,::1");
        Ok(command)
    }

    /// Where this person's programs are found from now on.
    pub fn set_path(&mut self, path: impl Into<String>) {
        self.path = path.into();
    }

    /// What their manager is told when it is started from now on.
    pub fn set_options(&mut self, options: &[&str]) {
        self.options = options.iter().map(|&option| option.to_owned()).collect();
    }

    /// Takes a port of this computer's own loopback.
    ///
    /// # Errors
    /// When it is taken.
    pub fn occupy(&self, port: u16) -> Result<TcpListener, LabError> {
        self.namespace.enter(move || TcpListener::bind((Ipv4Addr::LOCALHOST, port)))
    }

    /// Starts their manager, which gets the socket that this machine's browser reaches.
    ///
    /// # Errors
    /// When it cannot be started, or does not answer within `limit`.
    pub fn start_manager(&mut self, limit: Duration) -> Result<(), LabError> {
        let socket = self.data().join("run/manager.sock");
        let program = self.program.clone();
        let mut words: Vec<&std::ffi::OsStr> = vec![program.as_os_str(), "manager".as_ref()];
        words.extend(self.options.iter().map(std::ffi::OsStr::new));
        let mut child = self.start_listening(&words)?;
        let began = Instant::now();
        while !(socket.exists() && process::listens_below(child.id(), &self.data())) {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(LabError::Command {
                    command: "clan manager".into(),
                    status: status.to_string(),
                    output: self.log_tail(40),
                });
            }
            if began.elapsed() > limit || self.interrupt.is_set() {
                end(&mut child);
                return Err(LabError::InVain { what: format!("an answer of {}'s manager", self.name), limit });
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.manager = Some(child);
        Ok(())
    }

    /// Starts a program with this person's listening socket as file descriptor 3, by systemd's convention.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_listening(&self, arguments: &[&std::ffi::OsStr]) -> Result<Child, LabError> {
        let mut command = self.command("/bin/sh")?;
        // The variable has to name the process that the shell becomes, which is known only there.
        command.args(["-c", r#"exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@""#, "sh"]).args(arguments);
        let socket: OwnedFd = self.listener.try_clone().map_err(LabError::io("share the manager's socket"))?.into();
        let log = open_log(&self.log, &self.account)?;
        let also = log.try_clone().map_err(LabError::io("share the manager's log"))?;
        command.env("RUST_LOG", "info").env("NO_COLOR", "1").stdin(Stdio::from(socket)).stdout(log).stderr(also);
        command.spawn().map_err(LabError::io(format!("start {}'s manager", self.name)))
    }

    /// Kills the manager without warning.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill_manager(&mut self) -> Result<(), LabError> {
        let mut child =
            self.manager.take().ok_or_else(|| LabError::Promise(format!("{} has no manager to kill", self.name)))?;
        child.kill().and_then(|()| child.wait()).map(|_| ()).map_err(LabError::io("kill the manager"))
    }

    /// Runs `clan` with these arguments, and shows the command and what it says.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn clan(&self, arguments: &[&str]) -> Result<Finished, LabError> {
        let shown = shown(arguments);
        self.screen.command(&self.name, &shown);
        let screen = self.screen.clone();
        self.run(arguments, None, &shown, move |line| screen.said(line))
    }

    /// The same with something typed into it, which may be secret and is not shown.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn clan_typing(&self, arguments: &[&str], input: &str) -> Result<Finished, LabError> {
        let shown = shown(arguments);
        self.screen.command(&self.name, &shown);
        let screen = self.screen.clone();
        self.run(arguments, Some(input), &shown, move |line| screen.said(line))
    }

    /// Runs `clan` with these arguments, silently.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn clan_quietly(&self, arguments: &[&str]) -> Result<Finished, LabError> {
        self.run(arguments, None, &shown(arguments), |_| ())
    }

    /// The JSON that a `clan` command prints.
    ///
    /// # Errors
    /// When it fails, or prints something else.
    pub fn clan_json(&self, arguments: &[&str]) -> Result<serde_json::Value, LabError> {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        self.clan_quietly(&arguments)?.success()?.json()
    }

    fn run(
        &self,
        arguments: &[&str],
        input: Option<&str>,
        shown: &str,
        hear: impl FnMut(&str) + Send + 'static,
    ) -> Result<Finished, LabError> {
        let mut command = self.command(&self.program)?;
        command.args(arguments).env("NO_COLOR", "1").stdin(Stdio::null());
        if let Some(input) = input {
            command.stdin(net::typed(&format!("{input}\n"))?);
        }
        process::run(command, shown, COMMAND_LIMIT, &self.interrupt, hear)
    }

    /// The shell on the console of this person's VM in `clan`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn console(&self, clan: &str) -> Result<Console, LabError> {
        self.screen.command(&self.name, &format!("clan vm console {clan}"));
        let mut command = self.command(&self.program)?;
        command.args(["vm", "console", clan]);
        Console::attach(command, self.interrupt.clone())
    }

    /// The last lines of their manager's log.
    pub fn log_tail(&self, lines: usize) -> String {
        last_lines(&self.log, lines)
    }

    /// The last lines of the consoles of their VMs.
    pub fn console_tail(&self, lines: usize) -> String {
        let clans = fs::read_dir(self.data().join("clans")).into_iter().flatten().flatten();
        clans.map(|clan| last_lines(&clan.path().join("vm/console.log"), lines)).collect()
    }

    /// Copies console logs to where the lab's logs stay.
    pub fn keep_console_logs(&self) {
        let clans = fs::read_dir(self.data().join("clans")).into_iter().flatten().flatten();
        for (number, clan) in clans.enumerate() {
            if let Some(folder) = self.log.parent() {
                // A log that cannot be kept must not hide why it was wanted.
                let _ = fs::copy(
                    clan.path().join("vm/console.log"),
                    folder.join(format!("{}-console-{number}.log", self.name)),
                );
            }
        }
    }

    fn reap(&mut self) {
        let Some(mut child) = self.manager.take() else { return };
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(20) {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        end(&mut child);
    }
}

fn people(config: &LabConfig) -> impl Iterator<Item = &'static (&'static str, Ipv4Addr, u16)> {
    PEOPLE.iter().filter(|(name, ..)| config.stranger || *name != "stranger")
}

/// A command line without what must stay secret.
pub(crate) fn shown(arguments: &[&str]) -> String {
    let words = arguments.iter().map(|word| match word.split_once("/join/") {
        Some((scheme, payload)) => format!("'{scheme}/join/{}…'", payload.chars().take(6).collect::<String>()),
        None => (*word).to_owned(),
    });
    std::iter::once("clan".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

pub(crate) fn last_lines(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("{line}\n")).collect()
}

fn listen(port: u16, any: bool) -> Result<TcpListener, LabError> {
    let wanted = if any { None } else { TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok() };
    // A port in use is no reason to fail: what is printed at the end names the one that was taken.
    wanted.map_or_else(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)), Ok).map_err(LabError::io("listen on 127.0.0.1"))
}

/// The user must be able to run them even if the checkout is where they may not look.
pub(crate) fn copy_programs(from: &Path, record: &Record, account: &Account) -> Result<(), LabError> {
    own_folder(&record.state_root, account)?;
    own_folder(&record.logs(), account)?;
    let to = record.programs();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&to)
        .map_err(LabError::io(format!("make {}", to.display())))?;
    for name in ["clan", "clan-agent"] {
        let source = from.join(name);
        let mut program = File::open(&source).map_err(|_| LabError::NoProgram { name, dir: from.to_owned() })?;
        let complain = || LabError::io(format!("copy {name} to {}", to.display()));
        // By another name first: a running program cannot be overwritten.
        let draft = to.join(format!("{name}.new"));
        let mut copy = File::create(&draft).map_err(complain())?;
        std::io::copy(&mut program, &mut copy).and_then(|_| copy.flush()).map_err(complain())?;
        copy.set_permissions(Permissions::from_mode(0o755)).map_err(complain())?;
        drop(copy);
        fs::rename(&draft, to.join(name)).map_err(complain())?;
    }
    Ok(())
}

/// Makes a folder, and those above it, that belong to the account.
pub(crate) fn own_folder(path: &Path, account: &Account) -> Result<(), LabError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        own_folder(above, account)?;
    }
    let complain = || LabError::io(format!("make {}", path.display()));
    fs::DirBuilder::new().mode(0o755).create(path).map_err(complain())?;
    chown(path, Some(account.uid), Some(account.gid)).map_err(complain())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_not_shown_whole() {
        let text = shown(&["join", "clan://join/AbCdEfGhIjKlMnOp", "--yes"]);
        assert_eq!(text, "clan join 'clan://join/AbCdEf…' --yes");
    }
}
