//! The loop that owns a VM.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_os::channel::Channel;
use clan_types::ByteSize;
use clan_vm::{AccelKind, Exit, ExitReason, Network, Vm, VmError};
use tokio::{
    sync::{mpsc, watch},
    time::sleep_until,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Command, KeeperConfig, VmView, go_on,
    room::DiskEvents,
    silence::Doom,
    stop::{POWER_OFF, POWER_OFF_QUICKLY, power_off},
    turns::{Place, Share, Short, Ticket, Turn, needed},
};
use crate::{clan::RecordCell, guest, link::Outlets, lock, problem, status, tasks::now, template};

/// Restarts of a VM that dies again and again, before it is given up.
const MAX_RESTARTS: u32 = 5;
/// The same while its image is on trial: it soon has its previous one again.
const MAX_RESTARTS_ON_TRIAL: u32 = 2;
/// A VM that ran for so long is stable: its earlier deaths are forgotten.
const STABLE: Duration = Duration::from_secs(300);
/// How often it is looked whether there is memory for a VM that waits for some.
const MEMORY_AGAIN: Duration = Duration::from_secs(2);
/// A VM that takes longer to start does not hold up the others any more.
const TURN_LIMIT: Duration = Duration::from_secs(60);
const CONSOLE_LINES: usize = 12;

/// How often a VM died of late.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    count: u32,
}

impl Restarts {
    /// A VM died after `uptime`: when to start it again, unless it is to be given up, which it is sooner `on_trial`.
    pub(crate) fn after(&mut self, uptime: Duration, on_trial: bool) -> Option<Duration> {
        if uptime >= STABLE {
            self.count = 0;
        }
        self.count += 1;
        let most = if on_trial { MAX_RESTARTS_ON_TRIAL } else { MAX_RESTARTS };
        (self.count <= most).then(|| Duration::from_secs(1 << (self.count - 1)))
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }
}

pub(super) struct Running {
    pub(super) vm: Vm,
    pub(super) since: Instant,
    pub(super) accelerator: Option<AccelKind>,
    /// From which it went on, instead of booting.
    pub(super) template: Option<String>,
    pub(super) links: CancellationToken,
    pub(super) tracker: TaskTracker,
    pub(super) stopping: bool,
    /// It is ended for its silence.
    pub(super) doom: Option<Doom>,
}

pub(super) struct Loop {
    pub(super) record: Arc<RecordCell>,
    pub(super) config: KeeperConfig,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) publish: watch::Sender<VmView>,
    pub(super) vm_publish: watch::Sender<Option<Vm>>,
    pub(super) out: Outlets,
    pub(super) running: Option<Running>,
    pub(super) restarts: Restarts,
    pub(super) retry_at: Option<Instant>,
    /// Held while the VM starts.
    pub(super) turn: Option<Turn>,
    pub(super) place: Option<Place>,
    /// It waits for memory, behind others.
    pub(super) hunger: Option<Ticket>,
    /// What the VM has of the memory that is for all.
    pub(super) share: Option<Share>,
    /// Boots of late that ended in silence.
    pub(super) silent: u32,
    /// Why it is started anew, until it is up.
    pub(super) note: Option<ApiProblem>,
    /// QEMU holds the guest, as the computer's disk is full; when that is looked at again.
    pub(super) full: Option<Instant>,
    pub(super) cancel: CancellationToken,
}

enum Event {
    Cancelled,
    Command(Option<Command>),
    Exit(Exit),
    Control,
    /// Its turn has come, or the queue has moved.
    Turn(Option<Turn>),
    DiskFull,
    Tick,
}

impl Loop {
    pub(super) async fn run(mut self) {
        match Vm::adopt(&self.record.paths().vm()).await {
            Ok(Some(vm)) => {
                tracing::info!(pid = vm.pid(), "found the VM running");
                // Nobody asked for it: a manager was killed while it copied the disk.
                if !self.record.get().paused
                    && vm.is_paused().await.is_ok_and(|paused| paused)
                    && let Err(error) = vm.resume().await
                {
                    tracing::warn!(%error, "the VM is paused, and does not go on");
                }
                if self.record.get().paused
                    && let Err(error) = vm.pause().await
                {
                    tracing::warn!(%error, "the VM shall be paused, and is not");
                }
                let full = vm.lacks_room().await.unwrap_or(false);
                self.share = Some(self.config.turns.share(self.record.get().memory));
                self.attach(vm, None, None, None);
                if full {
                    self.disk_is_full();
                }
                if !self.record.get().wanted {
                    self.begin_stop(POWER_OFF);
                }
            }
            Ok(None) => {}
            // Starting it is refused too while somebody holds its lock, so nothing is doubled.
            Err(error) => tracing::warn!(%error, "cannot tell whether the VM runs"),
        }
        go_on(&self.record);
        if self.running.is_none() {
            if self.record.get().wanted {
                self.retry_at = Some(Instant::now());
            } else {
                self.rest();
            }
        }
        let mut control = self.out.control.subscribe();
        let mut heard = None;
        loop {
            match self.next(&mut control, &mut heard).await {
                Event::Cancelled => break,
                Event::Command(None) => break,
                Event::Command(Some(Command::Want { run, reply })) => {
                    let outcome = self.record.update(|r| r.wanted = run).map_err(|e| problem::disk(&e));
                    if outcome.is_ok() {
                        self.wish(run).await;
                    }
                    let _ = reply.send(outcome);
                }
                Event::Command(Some(Command::Pause { paused, reply })) => {
                    let _ = reply.send(self.pause(paused).await);
                }
                Event::Command(Some(Command::Restart { reply })) => {
                    let _ = reply.send(self.restart());
                }
                Event::Command(Some(Command::Destroy { reply })) => {
                    if let Some(running) = self.running.take() {
                        running.vm.quit(Duration::from_secs(2)).await;
                        self.unlink(running).await;
                    }
                    self.show(VmState::Stopped, None);
                    let _ = reply.send(());
                    return;
                }
                Event::Exit(exit) => self.ended(exit).await,
                Event::Control => self.control_changed(control.borrow_and_update().is_some()),
                Event::Turn(Some(turn)) => self.take_turn(turn).await,
                Event::Turn(None) => self.wait_for_turn(),
                Event::DiskFull => self.disk_is_full(),
                Event::Tick => self.tick().await,
            }
        }
        self.shut_down().await;
    }

    async fn next(&mut self, control: &mut watch::Receiver<Option<Channel>>, heard: &mut Option<DiskEvents>) -> Event {
        let vm = self.running.as_ref().map(|r| r.vm.clone());
        if heard.as_ref().map(DiskEvents::pid) != vm.as_ref().map(Vm::pid) {
            *heard = vm.as_ref().map(DiskEvents::of);
        }
        let at = self.deadline();
        let place = &mut self.place;
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Event::Cancelled,
            exit = async { match &vm { Some(vm) => vm.wait_exit().await, None => std::future::pending().await } } => Event::Exit(exit),
            command = self.commands.recv() => Event::Command(command),
            Ok(()) = control.changed() => Event::Control,
            () = async { match heard { Some(heard) => heard.full().await, None => std::future::pending().await } } => Event::DiskFull,
            turn = async { match place { Some(place) => place.next().await, None => std::future::pending().await } } => {
                Event::Turn(turn)
            }
            () = async { match at { Some(at) => sleep_until(at.into()).await, None => std::future::pending().await } } => Event::Tick,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let doubt = self.running.as_ref().and_then(|r| Some(r.since + self.patience(r)?));
        let turn = self.running.as_ref().filter(|_| self.turn.is_some()).map(|r| r.since + TURN_LIMIT);
        [self.retry_at, doubt, turn, self.full].into_iter().flatten().min()
    }

    async fn tick(&mut self) {
        self.end_silent().await;
        self.look_for_room().await;
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            if self.running.is_none() && self.record.get().wanted && self.record.is_locked() {
                return self.rest();
            }
            // Whoever lacks memory takes no turn from others.
            if self.running.is_none() && self.record.get().wanted && self.has_memory(None) {
                match self.config.turns.now() {
                    Some(turn) => self.take_turn(turn).await,
                    None => {
                        self.place = Some(self.config.turns.queue());
                        self.wait_for_turn();
                    }
                }
            }
        }
        if self.running.as_ref().is_some_and(|r| r.since.elapsed() >= TURN_LIMIT) {
            self.turn = None;
        }
    }

    async fn take_turn(&mut self, mut turn: Turn) {
        self.place = None;
        if self.running.is_some() || !self.record.get().wanted {
            return;
        }
        if self.has_memory(Some(&mut turn)) {
            self.turn = Some(turn);
            self.start().await;
        }
        if self.running.is_none() {
            self.turn = None;
        }
    }

    fn wait_for_turn(&self) {
        let Some(place) = &self.place else { return };
        let why = format!("it waits for its turn, {}: other virtual machines are starting", place.rank());
        self.show(VmState::Starting, Some(ApiProblem::new(ErrorCode::VmNotReady, why)));
    }

    /// Sees that there is memory for the VM, and takes it if it is its turn. If there is none, the VM waits until there is
    /// some, as long as there is so much at all.
    fn has_memory(&mut self, turn: Option<&mut Turn>) -> bool {
        let asked = self.record.get().memory;
        let (total, available) = status::memory();
        let turns = &self.config.turns;
        let fits = match turn {
            Some(turn) => turn.claim(asked, available, self.hunger.as_ref(), self.share.take()).map(Some),
            None => turns.fits(asked, available, self.hunger.as_ref(), self.share.as_ref()).map(|()| None),
        };
        let short = match fits {
            Ok(share) => {
                if share.is_some() {
                    (self.share, self.hunger) = (share, None);
                }
                return true;
            }
            Err(short) => short,
        };
        let never = match turns.budget() {
            _ if asked > total => Some(problem::vm(&VmError::TooLarge { asked, available })),
            Some(budget) if needed(asked) > budget => Some(problem::beyond_budget(needed(asked), budget)),
            _ => None,
        };
        match never {
            Some(problem) => {
                self.hunger = None;
                self.fail(problem);
            }
            None => self.wait_for_memory(asked, short),
        }
        false
    }

    pub(super) fn wait_for_memory(&mut self, asked: ByteSize, short: Short) {
        let Short { left, budget } = short;
        if self.hunger.is_none() {
            tracing::info!(%asked, %left, "the VM waits for memory");
        }
        // What it cannot use now is for others.
        self.share = None;
        let turns = &self.config.turns;
        let rank = self.hunger.get_or_insert_with(|| turns.hunger(asked)).rank();
        self.retry_at = Some(Instant::now() + MEMORY_AGAIN);
        let of = match budget {
            Some(budget) => format!("the {budget} that virtual machines may have"),
            None => "this computer's".into(),
        };
        let why = format!("it waits for memory, {rank}: it needs {}, and {left} of {of} are left", needed(asked));
        let problem = ApiProblem::new(ErrorCode::VmNotReady, why);
        self.show(
            VmState::Starting,
            Some(problem.hint("stop another VM or close some programs; or `clan vm resize --memory`")),
        );
    }

    async fn wish(&mut self, run: bool) {
        if run {
            self.forget_deaths();
            // One that is on its way down is started anew when it is.
            if self.running.is_none() {
                self.show(VmState::Starting, None);
                self.retry_at = Some(Instant::now());
            } else if self.record.get().paused
                && let Err(problem) = self.pause(false).await
            {
                tracing::warn!(problem = problem.message, "the paused VM does not go on");
            }
        } else {
            self.retry_at = None;
            (self.place, self.hunger) = (None, None);
            if self.running.is_some() {
                self.begin_stop(POWER_OFF);
            } else {
                self.give_share_back();
                self.rest();
            }
        }
    }

    /// Shows a VM that does not run, and why it cannot, if so.
    pub(super) fn rest(&mut self) {
        if !self.record.is_locked() {
            return self.show(VmState::Stopped, None);
        }
        self.share = None;
        self.show(VmState::Locked, Some(lock::locked()));
    }

    /// One that is stopped only for as long as its disk or image is changed keeps its share.
    fn give_share_back(&mut self) {
        if !self.record.get().held {
            self.share = None;
        }
    }

    async fn unlink(&mut self, running: Running) {
        running.links.cancel();
        running.tracker.close();
        running.tracker.wait().await;
        self.vm_publish.send_replace(None);
    }

    /// The VM holds still, or goes on. What the person wants is on disk first: the next manager leaves it so.
    async fn pause(&mut self, paused: bool) -> Result<(), ApiProblem> {
        let Some(running) = self.running.as_ref().filter(|r| !r.stopping) else {
            return Err(ApiProblem::new(ErrorCode::VmNotReady, "the VM does not run").hint("start it: `clan vm start`"));
        };
        let vm = running.vm.clone();
        self.record.update(|r| r.paused = paused).map_err(|e| problem::disk(&e))?;
        let done = if paused { vm.pause().await } else { vm.resume().await };
        if let Err(error) = done {
            self.record.update(|r| r.paused = !paused).map_err(|e| problem::disk(&e))?;
            return Err(problem::vm(&error));
        }
        if paused {
            self.show(VmState::Paused, None);
            return Ok(());
        }
        let answers = self.out.control.borrow().is_some();
        self.show(if answers { VmState::Running } else { VmState::Starting }, None);
        // Its clock stood still.
        if let (Some(running), Some(agent)) = (&self.running, self.out.agent.borrow().clone()) {
            running.tracker.spawn(async move { template::renew(&agent).await });
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<(), ApiProblem> {
        self.record.update(|r| r.wanted = true).map_err(|e| problem::disk(&e))?;
        self.forget_deaths();
        if self.running.is_some() {
            self.begin_stop(POWER_OFF);
        } else {
            self.show(VmState::Starting, None);
            self.retry_at = Some(Instant::now());
        }
        Ok(())
    }

    fn forget_deaths(&mut self) {
        (self.restarts, self.silent, self.note) = (Restarts::default(), 0, None);
    }

    fn control_changed(&mut self, up: bool) {
        if self.record.get().paused || self.full.is_some() || self.running.as_ref().is_none_or(|r| r.stopping) {
            return;
        }
        if up {
            (self.turn, self.silent, self.note) = (None, 0, None);
            self.show(VmState::Running, None);
        } else if self.publish.borrow().state == VmState::Running {
            self.show(
                VmState::Running,
                Some(ApiProblem::new(ErrorCode::VmNotReady, "its controller does not answer just now")),
            );
        }
    }

    fn begin_stop(&mut self, grace: Duration) {
        let Some(running) = &mut self.running else { return };
        if running.stopping {
            return;
        }
        running.stopping = true;
        // Its end is seen by the loop.
        running.tracker.spawn(power_off(running.vm.clone(), self.out.agent.subscribe(), grace));
        self.show(VmState::Stopping, None);
    }

    async fn ended(&mut self, exit: Exit) {
        let Some(running) = self.running.take() else { return };
        (self.turn, self.full) = (None, None);
        let (stopping, uptime) = (running.stopping, running.since.elapsed());
        if let Err(error) = self.record.update(|r| r.paused = false) {
            tracing::warn!(%error, "the VM's record is not written");
        }
        let console = if stopping { None } else { running.vm.console_tail(CONSOLE_LINES).ok() };
        let doom = running.doom.clone();
        self.unlink(running).await;
        let wanted = self.record.get().wanted;
        if stopping || !wanted {
            if wanted {
                self.show(VmState::Starting, None);
                self.retry_at = Some(Instant::now());
            } else {
                self.give_share_back();
                self.rest();
            }
            return;
        }
        match doom {
            Some(Doom::Again(problem)) => {
                self.note = Some(problem);
                self.retry_at = Some(Instant::now());
                return self.show(VmState::Starting, None);
            }
            Some(Doom::Last(problem)) => return self.fail(problem),
            None => {}
        }
        let mut problem = ApiProblem::new(ErrorCode::VmFailed, format!("the VM ended: {}", describe(exit)));
        if let Some(console) = console.filter(|c| !c.trim().is_empty()) {
            problem =
                problem.why(format!("the last lines of its console: {}", guest::short(&console.replace('\n', " / "))));
        }
        self.died(problem.hint("look at its console: `clan vm logs --console`"), uptime);
    }

    /// Starts it again later, or gives it up.
    pub(super) fn died(&mut self, problem: ApiProblem, uptime: Duration) {
        match self.restarts.after(uptime, self.record.get().trial.is_some()) {
            Some(delay) => {
                tracing::warn!(
                    problem = problem.message,
                    why = problem.why,
                    delay_s = delay.as_secs(),
                    "starting the VM again"
                );
                self.retry_at = Some(Instant::now() + delay);
                self.show(VmState::Starting, Some(problem));
            }
            None => self.fail(problem.hint("start it again: `clan vm start`")),
        }
    }

    pub(super) fn fail(&mut self, problem: ApiProblem) {
        tracing::warn!(problem = problem.message, why = problem.why, "the VM is given up");
        self.share = None;
        self.show(VmState::Failed, Some(problem));
    }

    pub(super) fn show(&self, state: VmState, problem: Option<ApiProblem>) {
        let (pid, accelerator) = self.running.as_ref().map_or((None, None), |r| (Some(r.vm.pid()), r.accelerator));
        let exposure = self.running.as_ref().and_then(|r| match r.vm.network() {
            Network::Apart => None,
            Network::Exposed(exposure) => Some(exposure.clone()),
        });
        let unlimited = self.running.as_ref().and_then(|r| r.vm.unlimited()).map(ToString::to_string);
        let problem = problem.or_else(|| self.note.clone().filter(|_| state == VmState::Starting));
        let (restarts, queued) = (self.restarts.count, self.place.is_some() || self.hunger.is_some());
        self.publish.send_if_modified(|view| {
            let since = if view.state == state { view.since } else { now() };
            let next = VmView { state, problem, since, restarts, pid, accelerator, queued, exposure, unlimited };
            let changed = *view != next;
            *view = next;
            changed
        });
    }

    async fn shut_down(mut self) {
        let Some(running) = self.running.take() else { return };
        if !self.config.keep_vms.get() {
            // The wish stays on disk: the next manager starts it again.
            self.show(VmState::Stopping, None);
            power_off(running.vm.clone(), self.out.agent.subscribe(), POWER_OFF_QUICKLY).await;
        }
        self.unlink(running).await;
    }
}

fn describe(exit: Exit) -> String {
    match exit.reason {
        ExitReason::PoweredOff => "the guest powered itself off".into(),
        ExitReason::Reset => "the guest reset itself".into(),
        ExitReason::Panicked => "the guest's kernel panicked".into(),
        ExitReason::Quit => "QEMU was told to quit".into(),
        ExitReason::Signalled(signal) => format!("signal {signal} killed QEMU"),
        ExitReason::Failed(status) => format!("QEMU failed with status {status}"),
        ExitReason::NetworkLost => "its network ended, as pasta, which connects it, was killed or failed".into(),
        ExitReason::Unknown => "it ended while nobody watched".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_keeps_dying_is_given_up_after_growing_delays() {
        let mut restarts = Restarts::default();
        let delays: Vec<_> =
            (0..MAX_RESTARTS).map(|_| restarts.after(Duration::from_secs(3), false).unwrap().as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16]);
        assert_eq!(restarts.after(Duration::from_secs(3), false), None);
    }

    #[test]
    fn a_vm_that_dies_of_its_new_image_soon_has_its_previous_one() {
        let mut restarts = Restarts::default();
        let delays: Vec<_> = std::iter::from_fn(|| restarts.after(Duration::from_secs(3), true)).collect();
        assert_eq!(delays, [1, 2].map(Duration::from_secs));
    }

    #[test]
    fn a_vm_that_ran_well_starts_with_a_clean_slate() {
        let mut restarts = Restarts::default();
        for _ in 0..20 {
            assert_eq!(restarts.after(STABLE, false), Some(Duration::from_secs(1)));
        }
    }
}
