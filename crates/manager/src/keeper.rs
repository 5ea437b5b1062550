//! The owner of one clan's VM: starts it, finds it again, watches it, starts it anew when it dies, stops it.
//!
//! ```text
//!            want                channel of the controller
//!  Stopped ───────▶ Starting ───────────────────────────────▶ Running
//!     ▲               │  ▲ died: backoff, at most `MAX_RESTARTS` times      │
//!     │               ▼  └────────────────────────────────────────┤ died
//!     │             Failed(why) ◀── too many, or nothing to be gained          │ want not
//!     └──────────────────────────────── Stopping ◀────────────────┘
//! ```
//!
//! One whose disk is encrypted, and whose passphrase nobody has said, is Locked instead of Stopped, or of Starting.
//!
//! INVARIANT: only the loop of [`owner`] starts QEMU for its clan, and it looks for a running one first.

mod owner;
mod room;
mod silence;
mod start;
mod stop;
mod turns;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_build::ImageStore;
use clan_os::channel::Channel;
use clan_types::Timestamp;
use clan_vm::{AccelKind, Qemu, Vm, container::Container, network::Exposure};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    clan::RecordCell,
    contained::Contained,
    integrated::Integrated,
    link::{Outlets, Stats, Told},
    manager::KeepVms,
    record::Flavour,
    tasks::now,
    template::Templates,
    trees::Trees,
};

use owner::Loop;
pub(crate) use owner::Restarts;
pub(crate) use silence::Patience;
pub(crate) use start::{GUEST_QUIC, GUEST_WIREGUARD, free_ports};
pub(crate) use turns::{Turns, needed};

/// What a VM does now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmView {
    pub(crate) state: VmState,
    /// Why, where that is not plain; in state failed always.
    pub(crate) problem: Option<ApiProblem>,
    pub(crate) since: Timestamp,
    pub(crate) restarts: u32,
    pub(crate) pid: Option<u32>,
    pub(crate) accelerator: Option<AccelKind>,
    /// It waits for other VMs that start, or for memory.
    pub(crate) queued: bool,
    /// Why its guest reaches this computer's loopback, if it does.
    pub(crate) exposure: Option<Exposure>,
    /// Why it may take as much of this computer as it likes, if it runs and may.
    pub(crate) unlimited: Option<String>,
}

impl VmView {
    /// Where no QEMU runs.
    pub(crate) fn without_vm(state: VmState) -> Self {
        Self {
            state,
            problem: None,
            since: now(),
            restarts: 0,
            pid: None,
            accelerator: None,
            queued: false,
            exposure: None,
            unlimited: None,
        }
    }
}

/// What keepers share.
#[derive(Debug, Clone)]
pub(crate) struct KeeperConfig {
    pub(crate) images: ImageStore,
    pub(crate) templates: Templates,
    pub(crate) turns: Turns,
    pub(crate) cache: PathBuf,
    pub(crate) qemu: Qemu,
    pub(crate) trees: Trees,
    /// This executable, by which containers are started.
    pub(crate) program: PathBuf,
    /// Whether VMs go on when the manager stops.
    pub(crate) keep_vms: KeepVms,
    pub(crate) patience: Patience,
}

pub(crate) enum Command {
    /// The VM shall run, or not; on disk once answered.
    Want { run: bool, reply: oneshot::Sender<Result<(), ApiProblem>> },
    /// The VM shall hold still, or go on; it is so once answered.
    Pause { paused: bool, reply: oneshot::Sender<Result<(), ApiProblem>> },
    /// The VM is stopped, and started again as it is wanted.
    Restart { reply: oneshot::Sender<Result<(), ApiProblem>> },
    /// Ends the VM without asking it, and the keeper; answered when both are over.
    Destroy { reply: oneshot::Sender<()> },
}

/// The way to a keeper.
pub(crate) struct Keeper {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<VmView>,
    vm: watch::Receiver<Option<Vm>>,
    container: watch::Receiver<Option<Container>>,
    out: Outlets,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Starts the keeper of a clan. It finds a running VM, or starts one if one is wanted.
    pub(crate) fn spawn(record: Arc<RecordCell>, config: KeeperConfig, cancel: CancellationToken) -> Self {
        let (sender, commands) = mpsc::channel(16);
        let view = VmView::without_vm(VmState::Stopped);
        let (publish, view) = watch::channel(view);
        let (vm_publish, vm) = watch::channel(None);
        let (container_publish, container) = watch::channel(None);
        let out = Outlets::new();
        if record.get().is_container() {
            let owner =
                Contained { record, config, commands, publish, container: container_publish, out: out.clone(), cancel };
            let task = tokio::spawn(owner.run());
            return Self { commands: sender, view, vm, container, out, task: Mutex::new(Some(task)) };
        }
        if let Flavour::Integrated { socket } = record.get().flavour {
            let owner = Integrated { record, socket, commands, publish, out: out.clone(), cancel };
            let task = tokio::spawn(owner.run());
            return Self { commands: sender, view, vm, container, out, task: Mutex::new(Some(task)) };
        }
        let owner = Loop {
            record,
            config,
            commands,
            publish,
            vm_publish,
            out: out.clone(),
            running: None,
            restarts: Restarts::default(),
            retry_at: None,
            turn: None,
            place: None,
            hunger: None,
            share: None,
            silent: 0,
            note: None,
            full: None,
            cancel,
        };
        let task = tokio::spawn(owner.run());
        Self { commands: sender, view, vm, container, out, task: Mutex::new(Some(task)) }
    }

    /// What the VM does now.
    pub(crate) fn view(&self) -> VmView {
        self.view.borrow().clone()
    }

    /// Wakes when what the VM does changes.
    pub(crate) fn watch(&self) -> watch::Receiver<VmView> {
        self.view.clone()
    }

    /// The VM, while one runs.
    pub(crate) fn vm(&self) -> Option<Vm> {
        self.vm.borrow().clone()
    }

    /// The container, while one runs.
    pub(crate) fn container(&self) -> Option<Container> {
        self.container.borrow().clone()
    }

    /// The channel to the agent; wakes when it comes or goes.
    pub(crate) fn watch_agent(&self) -> watch::Receiver<Option<Channel>> {
        self.out.agent.subscribe()
    }

    /// The channel to the controller, if it answers now.
    pub(crate) fn control(&self) -> Option<Channel> {
        self.out.control.borrow().clone()
    }

    /// The channel to the controller; wakes when it comes or goes.
    pub(crate) fn watch_control(&self) -> watch::Receiver<Option<Channel>> {
        self.out.control.subscribe()
    }

    /// What the controller told last.
    pub(crate) fn told(&self) -> Option<Told> {
        self.out.told.borrow().clone()
    }

    /// The latest statistics.
    pub(crate) fn with_stats<T>(&self, read: impl FnOnce(&Stats) -> T) -> T {
        read(&self.out.stats.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The VM shall run, or not. Returns once that is on disk, not once it is so.
    pub(crate) async fn want(&self, run: bool) -> Result<(), ApiProblem> {
        self.ask(|reply| Command::Want { run, reply }).await
    }

    async fn ask(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), ApiProblem>>) -> Command,
    ) -> Result<(), ApiProblem> {
        let (reply, answer) = oneshot::channel();
        let stopping = || ApiProblem::new(ErrorCode::Stopping, "the manager is stopping");
        self.commands.send(command(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// The VM shall hold still, or go on. Returns once it does.
    pub(crate) async fn pause(&self, paused: bool) -> Result<(), ApiProblem> {
        self.ask(|reply| Command::Pause { paused, reply }).await
    }

    /// Begins to stop the VM, which is started again when it has ended.
    pub(crate) async fn restart(&self) -> Result<(), ApiProblem> {
        self.ask(|reply| Command::Restart { reply }).await
    }

    /// Ends the VM without asking it, and the keeper. Returns when both are over.
    pub(crate) async fn destroy(&self) {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Destroy { reply }).await.is_ok() {
            let _ = answer.await;
        }
        self.join().await;
    }

    /// Waits for the keeper's end, after its token was cancelled.
    pub(crate) async fn join(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "a VM's keeper broke off");
        }
    }
}

/// What an earlier manager held, and was killed before it let it run again, is to run.
pub(crate) fn go_on(record: &RecordCell) {
    if record.get().held
        && let Err(error) = record.update(|r| (r.wanted, r.held) = (true, false))
    {
        tracing::warn!(%error, "the machine's record is not written");
    }
}

#[cfg(test)]
mod tests;
