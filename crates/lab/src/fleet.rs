//! Computers that are machines of a clan themselves, behind any kind of router: no virtual machines, so a clan of many is up in
//! seconds.
//!
//! Each computer of a [`World`] has a manager, which runs as an ordinary user, and a controller, which runs as root; both see an
//! `/etc` of the computer's own, so that name resolution may be changed as on a real one.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::{
    Account, Finished, Interrupt, LabConfig, LabError, Record, Screen,
    lab::{PATH, copy_programs, last_lines, own_folder, shown},
    nat::{Site, SiteSpec, World},
    net::{Namespace, typed},
    process::{self, MARK, Seat, end, listens_below, open_log},
    story::link_in,
    sweep::remove,
};

/// How long a daemon may take to listen.
const START: Duration = Duration::from_secs(20);
/// How long a daemon that was told to end may take.
const GRACE: Duration = Duration::from_secs(10);
/// Longest that one command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);
/// What of `/etc` a computer gets a copy of: nothing secret, and nothing that names another network.
const ETC: [&str; 17] = [
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "gai.conf",
    "group",
    "host.conf",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "passwd",
    "protocols",
    "services",
    "ssl/certs",
];

/// A world whose computers run Clan.
#[derive(Debug)]
pub struct Fleet {
    computers: Vec<Computer>,
    screen: Screen,
    // Last: it ends whatever still runs.
    world: World,
}

/// A computer that can be a clan's machine itself.
#[derive(Debug)]
pub struct Computer {
    name: String,
    place: Place,
    manager: Option<Child>,
    controller: Option<Child>,
    interrupt: Interrupt,
    screen: Screen,
}

/// What it takes to run something on a computer, in this process or in a later one.
#[derive(Debug, Clone)]
pub struct Place {
    account: Account,
    namespace: Namespace,
    prefix: String,
    folder: PathBuf,
    programs: PathBuf,
    logs: PathBuf,
}

/// A further controller, until it is dropped.
#[derive(Debug)]
pub struct Another {
    child: Child,
    /// Where it listens.
    pub socket: PathBuf,
    /// What it keeps.
    pub state: PathBuf,
}

impl Drop for Another {
    fn drop(&mut self) {
        signal(&self.child, Signal::TERM);
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if began.elapsed() > GRACE {
                return end(&mut self.child);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Fleet {
    /// Lays networks and computers; nothing runs on them yet. What an earlier fleet of this name left is swept first.
    ///
    /// # Errors
    /// When this is not root, an account or a program is missing, or such a lab is up. Nothing stays behind.
    pub fn lay(config: &LabConfig, specs: &[SiteSpec], screen: &Screen) -> Result<Self, LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::NeedsRoot);
        }
        let account = Account::for_lab(config.account.as_deref())?;
        let state = config.state_root()?;
        let world = World::lay(&config.prefix, &state, specs)?;
        clear(&state)?;
        copy_programs(&config.programs, world.record(), &account)?;
        let computers = specs
            .iter()
            .map(|spec| Computer::lay(world.record(), world.site(&spec.name), &account, config, screen))
            .collect::<Result<_, _>>()?;
        Ok(Self { computers, screen: screen.clone(), world })
    }

    /// Lays it, and starts a manager and a controller on every computer.
    ///
    /// # Errors
    /// As [`Fleet::lay`], and when a daemon does not start.
    pub fn up(config: &LabConfig, specs: &[SiteSpec], screen: &Screen) -> Result<Self, LabError> {
        let mut fleet = Self::lay(config, specs, screen)?;
        fleet.computers.iter_mut().try_for_each(Computer::start)?;
        Ok(fleet)
    }

    /// A computer.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn computer(&mut self, name: &str) -> &mut Computer {
        match self.computers.iter_mut().find(|computer| computer.name == name) {
            Some(computer) => computer,
            None => panic!("the lab has no computer `{name}`"),
        }
    }

    /// All computers.
    pub fn computers(&mut self) -> impl Iterator<Item = &mut Computer> {
        self.computers.iter_mut()
    }

    /// The networks.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Where to tell what happens.
    pub fn screen(&self) -> &Screen {
        &self.screen
    }

    /// What the lab made, for whoever looks for leftovers.
    pub fn record(&self) -> &Record {
        self.world.record()
    }

    /// Ends everything and removes it; logs stay.
    ///
    /// # Errors
    /// When something resists.
    pub fn down(mut self) -> Result<(), LabError> {
        for computer in &mut self.computers {
            computer.tell_all_to_end();
        }
        for computer in &mut self.computers {
            computer.reap();
        }
        let state = self.world.state().to_owned();
        let Self { world, .. } = self;
        world.down()?;
        clear(&state)
    }
}

/// Removes what computers left in a fleet's folder; programs and logs stay.
///
/// # Errors
/// When something resists.
pub fn clear(state: &Path) -> Result<(), LabError> {
    let Ok(entries) = fs::read_dir(state) else { return Ok(()) };
    entries
        .flatten()
        .filter(|entry| !matches!(entry.file_name().to_str(), Some("bin" | "logs")))
        .try_for_each(|entry| remove(&entry.path()))
}

impl Place {
    /// A computer of a fleet that is up, perhaps in another process.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn find(record: &Record, config: &LabConfig, name: &str) -> Result<Self, LabError> {
        let place = Self::of(record, &Account::for_lab(config.account.as_deref())?, name);
        if name.contains('/') || !place.etc().is_dir() {
            return Err(LabError::Promise(format!("the lab has no computer `{name}`")));
        }
        Ok(place)
    }

    fn of(record: &Record, account: &Account, name: &str) -> Self {
        Self {
            account: account.clone(),
            namespace: record.computer(name),
            prefix: record.prefix.clone(),
            folder: record.folder(name),
            programs: record.programs(),
            logs: record.logs(),
        }
    }

    /// Any program, as the computer's ordinary user.
    ///
    /// # Errors
    /// When the computer is gone.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command, LabError> {
        self.seat(Some(&self.account), program.as_ref())
    }

    /// Any program, as root.
    ///
    /// # Errors
    /// When the computer is gone.
    pub fn root_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command, LabError> {
        self.seat(None, program.as_ref())
    }

    fn seat(&self, account: Option<&Account>, program: &std::ffi::OsStr) -> Result<Command, LabError> {
        // INVARIANT: whatever runs on a computer sees its own /etc, never this machine's.
        let etc = self.etc();
        let mut command = Seat { account, namespace: &self.namespace, etc: Some(&etc) }.command(program)?;
        command
            .current_dir(&self.folder)
            .env("PATH", format!("{}:{PATH}", self.programs.display()))
            .env("HOME", &self.folder)
            .env("CLAN_DATA", self.data())
            .env(MARK, &self.prefix);
        Ok(command)
    }

    /// The manager's data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The controller's folder.
    pub fn controller_state(&self) -> PathBuf {
        self.folder.join("controller")
    }

    /// Where the controller listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("run/controller.sock")
    }

    /// The computer's `/etc`.
    pub fn etc(&self) -> PathBuf {
        self.folder.join("etc")
    }

    fn program(&self) -> PathBuf {
        self.programs.join("clan")
    }

    fn lay_etc(&self, name: &str) -> Result<(), LabError> {
        let (etc, complain) = (self.etc(), || LabError::io(format!("make the /etc of {name}")));
        DirBuilder::new().mode(0o755).create(&etc).map_err(complain())?;
        // Run in /etc, so that folders above keep their names in the copy.
        let there = ETC.iter().filter(|path| Path::new("/etc").join(path).exists());
        let copied = Command::new("cp").args(["-a", "--parents"]).args(there).arg(&etc).current_dir("/etc").output();
        let copied = copied.map_err(complain())?;
        if !copied.status.success() {
            return Err(complain()(io::Error::other(String::from_utf8_lossy(&copied.stderr).into_owned())));
        }
        let files = [
            ("hosts", format!("127.0.0.1 localhost {name}\n::1 localhost\n")),
            ("hostname", format!("{name}\n")),
            ("resolv.conf", "# The lab's internet has no name server.\n".to_owned()),
        ];
        files.iter().try_for_each(|(file, text)| fs::write(etc.join(file), text).map_err(complain()))
    }
}

impl Computer {
    fn lay(
        record: &Record,
        site: &Site,
        account: &Account,
        config: &LabConfig,
        screen: &Screen,
    ) -> Result<Self, LabError> {
        let place = Place::of(record, account, site.name());
        own_folder(&place.folder, account)?;
        fs::set_permissions(&place.folder, Permissions::from_mode(0o755))
            .map_err(LabError::io(format!("open {}", place.folder.display())))?;
        place.lay_etc(site.name())?;
        for kind in ["manager", "controller"] {
            remove(&place.logs.join(format!("{}-{kind}.log", site.name())))?;
        }
        Ok(Self {
            name: site.name().to_owned(),
            place,
            manager: None,
            controller: None,
            interrupt: config.interrupt.clone(),
            screen: screen.clone(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How to run something on it.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Starts manager and controller.
    ///
    /// # Errors
    /// When one of them does not come up.
    pub fn start(&mut self) -> Result<(), LabError> {
        self.start_controller(&[])?;
        self.start_manager()
    }

    /// Starts the controller, as root, with `/etc/resolv.conf` in its care and further arguments.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_controller(&mut self, more: &[&str]) -> Result<(), LabError> {
        let mut command = self.place.root_command(self.place.program())?;
        command.args(["controller", "--dns", "resolv-conf", "--user", &self.place.account.name]);
        command.arg("--socket").arg(self.place.socket()).arg("--state").arg(self.place.controller_state()).args(more);
        let folder = self.place.folder.join("run");
        self.controller = Some(self.daemon(command, "controller", &folder)?);
        Ok(())
    }

    /// Starts a further controller, for another clan, with an own socket and folder; as root, or as the ordinary user, who may
    /// carry no packets.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn another_controller(&self, tag: &str, as_root: bool, more: &[&str]) -> Result<Another, LabError> {
        let program = self.place.program();
        let mut command = if as_root { self.place.root_command(program)? } else { self.place.command(program)? };
        let (folder, state) = (self.place.folder.join(tag), self.place.folder.join(format!("{tag}-state")));
        let socket = folder.join("controller.sock");
        command.args(["controller", "--user", &self.place.account.name]).arg("--socket").arg(&socket);
        command.arg("--state").arg(&state).args(more);
        Ok(Another { child: self.daemon(command, tag, &folder)?, socket, state })
    }

    /// Starts the manager, as the ordinary user.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_manager(&mut self) -> Result<(), LabError> {
        let mut command = self.place.command(self.place.program())?;
        command.arg("manager");
        let folder = self.place.data();
        self.manager = Some(self.daemon(command, "manager", &folder)?);
        Ok(())
    }

    /// Starts a daemon, and waits until it listens on a Unix socket below `folder`.
    fn daemon(&self, mut command: Command, kind: &str, folder: &Path) -> Result<Child, LabError> {
        let path = self.log(kind);
        let log = open_log(&path, &self.place.account)?;
        let also = log.try_clone().map_err(LabError::io("share a daemon's log"))?;
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(log).stderr(also);
        // For whoever looks for a fault.
        command.envs(std::env::var_os("CLAN_LOG").map(|filter| ("CLAN_LOG", filter)));
        let mut child = command.spawn().map_err(LabError::io(format!("start the {kind} of {}", self.name)))?;
        let began = Instant::now();
        while !listens_below(child.id(), folder) {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(LabError::Command {
                    command: format!("clan {kind} (on {})", self.name),
                    status: status.to_string(),
                    output: last_lines(&path, 30),
                });
            }
            if began.elapsed() > START || self.interrupt.is_set() {
                end(&mut child);
                let what = format!("an answer of the {kind} of {}", self.name);
                return Err(LabError::InVain { what, limit: START });
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(child)
    }

    /// Ends the controller in good order.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop_controller(&mut self) -> Result<(), LabError> {
        stop(&mut self.controller, &self.name, "controller")
    }

    /// Ends the manager in good order.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop_manager(&mut self) -> Result<(), LabError> {
        stop(&mut self.manager, &self.name, "manager")
    }

    /// Ends both in good order: the computer is switched off.
    ///
    /// # Errors
    /// When one of them does not end.
    pub fn stop(&mut self) -> Result<(), LabError> {
        self.stop_manager().and(self.stop_controller())
    }

    /// Kills the controller without warning.
    pub fn kill_controller(&mut self) {
        if let Some(mut child) = self.controller.take() {
            end(&mut child);
        }
    }

    /// Kills the manager without warning.
    pub fn kill_manager(&mut self) {
        if let Some(mut child) = self.manager.take() {
            end(&mut child);
        }
    }

    /// Where a daemon's talk goes: `manager`, `controller`, or another controller's tag.
    pub fn log(&self, kind: &str) -> PathBuf {
        self.place.logs.join(format!("{}-{kind}.log", self.name))
    }

    /// The last lines of a daemon's log.
    pub fn log_tail(&self, kind: &str, lines: usize) -> String {
        last_lines(&self.log(kind), lines)
    }

    /// Runs `clan` with these arguments, and shows the command and what it says.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn clan(&self, arguments: &[&str]) -> Result<Finished, LabError> {
        self.clan_loudly(arguments, None)
    }

    /// The same with something typed into it, which may be secret and is not shown.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn clan_typing(&self, arguments: &[&str], input: &str) -> Result<Finished, LabError> {
        self.clan_loudly(arguments, Some(input))
    }

    fn clan_loudly(&self, arguments: &[&str], input: Option<&str>) -> Result<Finished, LabError> {
        self.screen.command(&self.name, &shown(arguments));
        let screen = self.screen.clone();
        self.run(arguments, input, move |line| screen.said(line))
    }

    /// Runs `clan` with these arguments, silently.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn clan_quietly(&self, arguments: &[&str]) -> Result<Finished, LabError> {
        self.run(arguments, None, |_| ())
    }

    /// The JSON that a `clan` command prints.
    ///
    /// # Errors
    /// When it fails, or prints something else.
    pub fn clan_json(&self, arguments: &[&str]) -> Result<Value, LabError> {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        self.clan_quietly(&arguments)?.success()?.json()
    }

    fn run(
        &self,
        arguments: &[&str],
        input: Option<&str>,
        hear: impl FnMut(&str) + Send + 'static,
    ) -> Result<Finished, LabError> {
        let mut command = self.place.command(self.place.program())?;
        command.args(arguments).env("NO_COLOR", "1").stdin(Stdio::null());
        if let Some(input) = input {
            command.stdin(typed(&format!("{input}\n"))?);
        }
        process::run(command, &shown(arguments), COMMAND_LIMIT, &self.interrupt, hear)
    }

    /// Runs a program on it as root to its end, silently.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn run_as_root(&self, program: &str, arguments: &[&str], limit: Duration) -> Result<Finished, LabError> {
        let mut command = self.place.root_command(program)?;
        command.args(arguments).stdin(Stdio::null());
        let shown = std::iter::once(program).chain(arguments.iter().copied()).collect::<Vec<_>>().join(" ");
        process::run(command, &shown, limit, &self.interrupt, |_| ())
    }

    /// Founds a clan with this computer as its first machine; person and machine are called as the computer.
    ///
    /// # Errors
    /// When it does not work.
    pub fn found(&self, clan: &str) -> Result<Finished, LabError> {
        let socket = self.place.socket();
        let socket = socket.to_str().ok_or_else(|| LabError::Promise("the lab's folder has an odd name".into()))?;
        let arguments =
            ["create", clan, "--person", &self.name, "--machine", &self.name, "--integrate", "--socket", socket];
        self.clan(&arguments)?.success()
    }

    /// A link that lets somebody in.
    ///
    /// # Errors
    /// When it does not work.
    pub fn invite(&self, role: &str) -> Result<String, LabError> {
        link_in(&self.clan(&["invite", "--role", role])?.success()?.stdout)
    }

    /// Joins by a link; person and machine are called as the computer.
    ///
    /// # Errors
    /// When it cannot be run or does not end; not when it fails.
    pub fn join(&self, link: &str) -> Result<Finished, LabError> {
        let socket = self.place.socket();
        let socket = socket.to_str().ok_or_else(|| LabError::Promise("the lab's folder has an odd name".into()))?;
        let arguments =
            ["join", "--yes", "--person", &self.name, "--machine", &self.name, "--integrate", "--socket", socket];
        // Typed, not an argument: those are for everybody on the computer to see.
        self.clan_typing(&arguments, link)
    }

    fn tell_all_to_end(&self) {
        for child in self.manager.iter().chain(&self.controller) {
            signal(child, Signal::TERM);
        }
    }

    fn reap(&mut self) {
        for child in [&mut self.manager, &mut self.controller] {
            // Whatever resists is swept.
            let _ = stop(child, &self.name, "daemon");
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Tells a daemon to end, and waits until it has.
fn stop(slot: &mut Option<Child>, name: &str, kind: &str) -> Result<(), LabError> {
    let Some(mut child) = slot.take() else { return Ok(()) };
    signal(&child, Signal::TERM);
    let began = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if began.elapsed() > GRACE {
            end(&mut child);
            return Err(LabError::InVain { what: format!("the end of the {kind} of {name}"), limit: GRACE });
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
