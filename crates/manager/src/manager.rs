//! The manager itself: what it owns, how it starts, goes on where the last one stopped, and ends.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use clan_api::{ApiProblem, ErrorCode, HealthProblem, Severity};
use clan_build::ImageStore;
use clan_types::{ByteSize, ClanId, ClanName, ImageId, MachineId};
use clan_vm::Qemu;
use clan_wire::image::Manifest;
use rustix::fs::FlockOperation;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    clan::{Clan, RecordCell},
    create,
    disk::{self, DiskError},
    http::{self, Listeners, auth::Auth},
    join,
    keeper::{Keeper, KeeperConfig, Patience, Turns},
    leave, orders,
    paths::Paths,
    problem,
    record::{self, ClanRecord, Loaded, PersonLog, Phase},
    snapshots,
    tasks::Tasks,
    template::Templates,
    trees::Trees,
    update,
};

/// Fewer characters of an id do not name anything.
const LEAST_PREFIX: usize = 4;

/// How a manager is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Loopback address and port of the web page, the API and the services. A listener that socket activation hands in
    /// (`LISTEN_FDS`) wins over it.
    pub listen: SocketAddr,
    /// Goes into guest images as `/usr/bin/clan`: statically linked, usually the running program itself.
    pub clan_executable: PathBuf,
    /// Goes into guest images as `/init`: statically linked.
    pub agent_executable: PathBuf,
    /// HTTP proxy for package downloads, as a URL.
    pub proxy: Option<String>,
    /// Package mirror, as a URL.
    pub mirror: Option<String>,
    /// Which QEMU to run.
    pub qemu: Qemu,
    /// Whether VMs go on when the manager stops in good order. When it is killed they do anyway.
    pub keep_vms: KeepVms,
    /// How much memory all VMs together may have; those that do not fit wait. No limit if absent.
    pub vm_memory: Option<ByteSize>,
}

/// Whether VMs and containers go on when the manager stops in good order: no, until it is said. Clones are the same one, as it may
/// turn out late that another manager follows at once.
#[derive(Debug, Clone, Default)]
pub struct KeepVms(Arc<AtomicBool>);

impl KeepVms {
    /// They go on from now on.
    pub fn keep(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Options {
    /// The default port.
    pub const DEFAULT_LISTEN: &'static str = "127.0.0.1:7420";

    /// The usual options; `http_proxy` of the environment is honoured by whoever calls this.
    pub fn new(clan_executable: impl Into<PathBuf>, agent_executable: impl Into<PathBuf>) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7420)),
            clan_executable: clan_executable.into(),
            agent_executable: agent_executable.into(),
            proxy: None,
            mirror: None,
            qemu: Qemu::Search,
            keep_vms: KeepVms::default(),
            vm_memory: None,
        }
    }
}

/// Why a manager does not start.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// Another manager owns the data directory.
    #[error("another manager uses {}", path.display())]
    AlreadyRunning {
        /// The data directory.
        path: PathBuf,
    },
    /// Another program listens on the port.
    #[error("another program uses the port {} on {}", addr.port(), addr.ip())]
    PortBusy {
        /// The address.
        addr: SocketAddr,
    },
    /// The address is not this computer's own.
    #[error("the manager listens on loopback only, and {addr} is not")]
    NotLoopback {
        /// The address.
        addr: SocketAddr,
    },
    /// The socket that was handed in is of no use.
    #[error("the socket handed in by LISTEN_FDS cannot be used: {why}")]
    BadActivation {
        /// What is wrong with it.
        why: String,
    },
    /// Listening failed.
    #[error("cannot listen on {on}")]
    Listen {
        /// On what.
        on: String,
        /// Why.
        source: std::io::Error,
    },
    /// The data directory cannot be used.
    #[error("the data directory cannot be used")]
    Disk(#[from] clan_store::StoreError),
    /// The image store cannot be used.
    #[error("the image store cannot be used")]
    Images(#[from] clan_build::StoreError),
}

impl ManagerError {
    /// What the person sees: with what to do.
    pub fn problem(&self) -> ApiProblem {
        let plain = |code| {
            let mut problem = ApiProblem::new(code, self.to_string());
            problem.why = problem::sources(self);
            problem
        };
        match self {
            Self::AlreadyRunning { .. } => plain(ErrorCode::Conflict)
                .hint("use that one; it answers `clan status`")
                .hint("or give this one a data folder of its own with `--data`"),
            Self::PortBusy { addr } => plain(ErrorCode::PortBusy).hint(format!(
                "choose another port: `clan manager --listen {}:{}`",
                addr.ip(),
                addr.port().wrapping_add(1).max(1024)
            )),
            Self::NotLoopback { .. } => plain(ErrorCode::BadRequest).hint("for example `--listen 127.0.0.1:7420`"),
            Self::BadActivation { .. } => plain(ErrorCode::BadRequest)
                .hint("hand in a TCP socket on loopback, and the Unix socket of the data folder"),
            Self::Listen { .. } => plain(ErrorCode::PermissionDenied),
            Self::Disk(error) => problem::disk(error),
            Self::Images(error) => problem::store(error),
        }
    }
}

/// The daemon on the base OS.
pub struct Manager {
    shared: Arc<Shared>,
    listeners: Listeners,
    /// Held while this manager lives.
    _lock: File,
}

/// What all parts of a manager share.
pub(crate) struct Shared {
    pub(crate) paths: Paths,
    pub(crate) options: Options,
    pub(crate) images: ImageStore,
    pub(crate) templates: Templates,
    pub(crate) trees: Trees,
    turns: Turns,
    pub(crate) tasks: Tasks,
    pub(crate) auth: Auth,
    /// Where the TCP listener really is.
    pub(crate) address: SocketAddr,
    /// Held while an image is built or fetched.
    pub(crate) building: tokio::sync::Mutex<()>,
    /// The machine that answered a newcomer's questions last: the first to be asked more.
    pub(crate) answered: Mutex<Option<MachineId>>,
    /// The image that was offered to a newcomer last: what was shown is mostly what is fetched next.
    pub(crate) offered: Mutex<Option<(ImageId, Manifest)>>,
    /// Endpoints on their way down, and what waits for orders; nobody has to wait for them but the manager's end.
    pub(crate) closing: TaskTracker,
    /// Held while a clan is added.
    pub(crate) admission: tokio::sync::Mutex<()>,
    clans: RwLock<BTreeMap<ClanId, Arc<Clan>>>,
    problems: Mutex<Vec<HealthProblem>>,
    stop: CancellationToken,
    keepers: CancellationToken,
}

impl Manager {
    /// Takes possession of a data directory, listens, and finds the VMs that run. Must be called within a tokio runtime.
    pub async fn open(data_dir: impl Into<PathBuf>, options: Options) -> Result<Self, ManagerError> {
        let paths = Paths::new(data_dir);
        for dir in [paths.root().to_owned(), paths.run(), paths.cache(), paths.tasks(), paths.clans()] {
            disk::create_dir(&dir)?;
        }
        let lock = lock(&paths)?;
        for dir in [paths.root().to_owned(), paths.run(), paths.tasks()] {
            disk::sweep(&dir);
        }
        let listeners = Listeners::bind(&paths, options.listen)?;
        let shared = Arc::new(Shared::open(paths, options, listeners.address())?);
        let Loaded { records, bad } = record::load_all(&shared.paths);
        for (dir, error) in bad {
            shared.report_unreadable(&dir, &error);
        }
        for record in records {
            let dir = shared.paths.clan(&record.id).dir;
            if let Err(error) = shared.adopt(record) {
                shared.report_unreadable(&dir, &error);
            }
        }
        Ok(Self { shared, listeners, _lock: lock })
    }

    /// Where the TCP listener is.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Where the command line finds this manager.
    pub fn socket(&self) -> PathBuf {
        self.shared.paths.socket()
    }

    /// A URL that opens the web page, signed in; works once and for a short time.
    pub fn login_url(&self) -> String {
        http::login_url(&self.shared, None)
    }

    /// Works until cancelled; then ends tasks and, unless they are to go on, VMs in good order.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), ManagerError> {
        let shared = self.shared;
        for clan in shared.clans() {
            shared.resume(clan);
        }
        tracing::info!(address = %shared.address, socket = %shared.paths.socket().display(), "the manager listens");
        let http = self.listeners.serve(shared.clone(), cancel.clone());
        http.await;
        shared.stop.cancel();
        shared.tasks.join().await;
        shared.closing.close();
        shared.closing.wait().await;
        shared.keepers.cancel();
        for clan in shared.clans() {
            clan.keeper.join().await;
        }
        tracing::info!("the manager has stopped");
        Ok(())
    }
}

/// One manager for a data directory.
fn lock(paths: &Paths) -> Result<File, ManagerError> {
    let path = paths.lock();
    let io = |source| DiskError::Io { action: "lock", path: path.clone(), source };
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ManagerError::AlreadyRunning { path: paths.root().to_owned() }),
        Err(errno) => Err(io(errno.into()).into()),
    }
}

impl Shared {
    fn open(paths: Paths, options: Options, address: SocketAddr) -> Result<Self, ManagerError> {
        let stop = CancellationToken::new();
        let (images, templates) = (ImageStore::open(paths.images())?, Templates::open(paths.templates()));
        templates.keep_images(|id| images.get(id).is_some());
        Ok(Self {
            images,
            templates,
            trees: Trees::open(paths.trees()),
            turns: Turns::for_this_computer(options.vm_memory),
            tasks: Tasks::open(&paths.tasks(), stop.clone()),
            auth: Auth::open(&paths.token())?,
            address,
            building: tokio::sync::Mutex::new(()),
            answered: Mutex::default(),
            offered: Mutex::default(),
            closing: TaskTracker::new(),
            admission: tokio::sync::Mutex::new(()),
            clans: RwLock::default(),
            problems: Mutex::default(),
            stop,
            keepers: CancellationToken::new(),
            paths,
            options,
        })
    }

    /// A manager without listeners, for tests.
    #[cfg(test)]
    pub(crate) fn for_tests(dir: &std::path::Path) -> Arc<Self> {
        let paths = Paths::new(dir);
        disk::create_dir(paths.root()).unwrap();
        Arc::new(
            Self::open(
                paths,
                Options::new("/nonexistent/clan", "/nonexistent/agent"),
                SocketAddr::from(([127, 0, 0, 1], 7420)),
            )
            .unwrap(),
        )
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Cancelled when the manager stops.
    pub(crate) fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// All clans, by name.
    pub(crate) fn clans(&self) -> Vec<Arc<Clan>> {
        let mut clans: Vec<_> = self.clans.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        clans.sort_by_cached_key(|c| c.name());
        clans
    }

    pub(crate) fn get(&self, id: &ClanId) -> Option<Arc<Clan>> {
        self.clans.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn find_named(&self, name: &ClanName) -> Option<Arc<Clan>> {
        self.clans().into_iter().find(|c| c.name() == *name)
    }

    /// The clan with a name, an id, or a unique beginning of an id.
    pub(crate) fn find(&self, text: &str) -> Result<Arc<Clan>, ApiProblem> {
        let clans = self.clans();
        let wanted = text.to_ascii_lowercase();
        if let Some(clan) = clans.iter().find(|c| c.name().as_str() == wanted) {
            return Ok(clan.clone());
        }
        let mut begins =
            clans.iter().filter(|c| wanted.len() >= LEAST_PREFIX && c.id().to_string().starts_with(&wanted));
        match (begins.next(), begins.next()) {
            (Some(clan), None) => Ok(clan.clone()),
            (Some(_), Some(_)) => {
                Err(ApiProblem::new(ErrorCode::Ambiguous, "more than one clan's id begins like this")
                    .hint("give more of the id, or the name"))
            }
            (None, _) => {
                let shown: String = text.chars().filter(|c| !c.is_control()).take(60).collect();
                let names: Vec<String> = clans.iter().map(|c| c.name().to_string()).collect();
                let problem =
                    ApiProblem::new(ErrorCode::NotFound, format!("this computer is in no clan called `{shown}`"));
                Err(if names.is_empty() {
                    problem.hint("found one with `clan create`, or join one with `clan join`")
                } else {
                    problem.hint(format!("there is: {}", names.join(", ")))
                })
            }
        }
    }

    /// A clan's name is part of its host names here, and so belongs to one clan.
    pub(crate) fn check_name_free(&self, name: &ClanName) -> Result<(), ApiProblem> {
        match self.find_named(name) {
            None => Ok(()),
            Some(other) => Err(ApiProblem::new(
                ErrorCode::NameTaken,
                format!("this computer is in a clan called `{name}` already"),
            )
            .why(format!("its id is {}", other.id().short()))
            .hint("choose another name, or leave that one first: `clan leave`")),
        }
    }

    /// No task works on the clan.
    pub(crate) fn check_idle(&self, clan: &Clan) -> Result<(), ApiProblem> {
        match self.tasks.running_on(&clan.name()) {
            None => Ok(()),
            Some(task) => {
                Err(ApiProblem::new(ErrorCode::Conflict, format!("a task works on this clan: {}", task.title))
                    .hint("wait for it, or cancel it"))
            }
        }
    }

    /// Takes a clan that is on disk into this manager's care.
    pub(crate) fn adopt(self: &Arc<Self>, record: ClanRecord) -> Result<Arc<Clan>, DiskError> {
        let paths = self.paths.clan(&record.id);
        let (key, log) = (record::load_key(&paths)?, PersonLog::load(&paths)?);
        let id = record.id;
        snapshots::sweep(&paths);
        let record = Arc::new(RecordCell::new(paths, record));
        let config = KeeperConfig {
            images: self.images.clone(),
            templates: self.templates.clone(),
            turns: self.turns.clone(),
            cache: self.paths.cache(),
            qemu: self.options.qemu.clone(),
            trees: self.trees.clone(),
            program: self.options.clan_executable.clone(),
            keep_vms: self.options.keep_vms.clone(),
            patience: Patience::default(),
        };
        let keeper = Keeper::spawn(record.clone(), config, self.keepers.child_token());
        let over = self.stop.child_token();
        let clan = Arc::new(Clan { record, keeper, key, log: tokio::sync::Mutex::new(log), over: over.clone() });
        self.closing.spawn(orders::keep(self.clone(), clan.clone(), over));
        self.clans.write().unwrap_or_else(PoisonError::into_inner).insert(id, clan.clone());
        Ok(clan)
    }

    /// Goes on with what an earlier manager was doing.
    fn resume(self: &Arc<Self>, clan: Arc<Clan>) {
        let record = clan.record.get();
        if record.phase == Phase::Ready {
            let (clan, stop) = (clan.clone(), self.stop.clone());
            self.closing.spawn(async move { stop.run_until_cancelled(clan.record.memory().recall()).await });
        }
        match record.phase {
            Phase::Ready if record.trial.is_some() && (record.wanted || record.held) => update::go_on(self, clan),
            Phase::Ready => {}
            Phase::Creating => drop(create::spawn(self, clan)),
            Phase::Joining => drop(join::spawn(self, clan)),
            Phase::Leaving => drop(leave::spawn(self, clan)),
            Phase::Removing => {
                let shared = self.clone();
                tokio::spawn(async move {
                    if let Err(problem) = shared.discard(&clan).await {
                        tracing::warn!(problem = problem.message, "what is left of a clan cannot be removed");
                    }
                });
            }
        }
    }

    /// How founding or joining ends: what is half-made goes, unless only the manager stops.
    pub(crate) async fn settle<T>(&self, clan: &Clan, outcome: Result<T, ApiProblem>) -> Result<T, ApiProblem> {
        match outcome {
            Err(problem) if self.is_stopping() => {
                tracing::info!(clan = %clan.name(), why = problem.message, "the next manager goes on with this");
                Err(ApiProblem::new(ErrorCode::Stopping, "the manager stopped")
                    .hint("it goes on with this when it is started again"))
            }
            Err(problem) => {
                if let Err(undo) = self.discard(clan).await {
                    tracing::warn!(problem = undo.message, "what is half-made cannot be removed");
                }
                Err(problem)
            }
            done => done,
        }
    }

    /// Ends a clan's VM and removes everything of the clan from this computer.
    pub(crate) async fn discard(&self, clan: &Clan) -> Result<(), ApiProblem> {
        clan.record.update(|r| r.phase = Phase::Removing).map_err(|e| problem::disk(&e))?;
        clan.over.cancel();
        clan.keeper.destroy().await;
        let (paths, id) = (self.paths.clone(), clan.id());
        crate::fetch::blocking(move || record::remove(&paths, &id)).await?.map_err(|e| problem::disk(&e))?;
        self.clans.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if clan.record.get().is_container() {
            self.keep_trees().await;
        }
        tracing::info!(clan = %clan.name(), "removed the clan from this computer");
        Ok(())
    }

    /// Removes unpacked images that no container here uses.
    pub(crate) async fn keep_trees(&self) {
        let records = self.clans().into_iter().map(|clan| clan.record.get()).filter(ClanRecord::is_container);
        let images: Vec<_> = records.filter_map(|record| self.images.get(&record.image?)).collect();
        self.trees.keep(&images).await;
    }

    /// What went wrong with the data directory.
    pub(crate) fn problems(&self) -> Vec<HealthProblem> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn report_unreadable(&self, dir: &std::path::Path, error: &DiskError) {
        let told = problem::disk(error);
        tracing::error!(dir = %dir.display(), problem = told.message, why = told.why, "a clan is not readable");
        let message = match told.why {
            Some(why) => format!("A clan on this computer is not readable: {} ({why}).", told.message),
            None => format!("A clan on this computer is not readable: {}.", told.message),
        };
        let problem = HealthProblem { severity: Severity::Error, clan: None, message, hints: told.hints };
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).push(problem);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::{put, record};

    #[tokio::test]
    async fn clans_are_found_by_name_id_and_unique_prefix() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        for (n, name) in [(1, "family"), (2, "work")] {
            let mut record = record(n, Phase::Ready);
            record.name = name.parse().unwrap();
            put(&shared.paths, &record, None);
            shared.adopt(record).unwrap();
        }
        let id = ClanId::from_bytes([1; 32]).to_string();
        for text in ["family", "Family", &id, &id[..6]] {
            assert_eq!(shared.find(text).ok().unwrap().name().as_str(), "family", "{text}");
        }
        assert_eq!(shared.find("nowhere").err().unwrap().code, ErrorCode::NotFound);
        assert_eq!(shared.find(&id[..1]).err().unwrap().code, ErrorCode::NotFound, "too short to mean anything");
        assert_eq!(shared.check_name_free(&"work".parse().unwrap()).unwrap_err().code, ErrorCode::NameTaken);
    }

    #[tokio::test]
    async fn a_failed_attempt_leaves_nothing_but_a_stopped_manager_leaves_it_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Shared::for_tests(dir.path());
        let made = record(1, Phase::Joining);
        put(&shared.paths, &made, Some("clan://join/x"));
        let clan = shared.adopt(made.clone()).unwrap();
        shared.stop.cancel();
        let outcome = shared.settle::<()>(&clan, Err(crate::tasks::cancelled())).await;
        assert_eq!(outcome.unwrap_err().code, ErrorCode::Stopping);
        assert!(shared.paths.clan(&made.id).link().exists());

        let again = Shared::for_tests(dir.path());
        let clan = again.adopt(made.clone()).unwrap();
        let used = problem::refusal(&clan_wire::peer::JoinRefusal::Used);
        assert_eq!(again.settle::<()>(&clan, Err(used)).await.unwrap_err().code, ErrorCode::InviteUsed);
        assert!(!again.paths.clan(&made.id).dir.exists());
        assert!(again.get(&made.id).is_none());
    }

    #[tokio::test]
    async fn a_data_directory_has_one_manager() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = Options::new("/nonexistent/clan", "/nonexistent/agent");
        options.listen.set_port(0);
        let first = Manager::open(dir.path(), options.clone()).await.unwrap();
        let second = Manager::open(dir.path(), options.clone()).await.err().unwrap();
        assert!(matches!(second, ManagerError::AlreadyRunning { .. }), "{second}");
        drop(first);
        Manager::open(dir.path(), options).await.unwrap();
    }

    #[tokio::test]
    async fn a_busy_port_is_named_with_the_way_out() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut options = Options::new("/nonexistent/clan", "/nonexistent/agent");
        options.listen = taken.local_addr().unwrap();
        let problem = Manager::open(dir.path(), options).await.err().unwrap().problem();
        assert_eq!(problem.code, ErrorCode::PortBusy);
        assert!(problem.message.contains(&taken.local_addr().unwrap().port().to_string()), "{problem:?}");
        assert!(problem.hints[0].contains("--listen"), "{problem:?}");
    }
}
