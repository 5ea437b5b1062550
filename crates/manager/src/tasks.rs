//! Things that take a while: their steps, progress, log lines, and what came of them.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use clan_api::{
    ApiProblem, ErrorCode, StepState, TaskId, TaskInfo, TaskKind, TaskProgress, TaskResult, TaskState, TaskStep,
};
use clan_types::{ClanName, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::disk;

/// Log lines that are kept of a task.
const MAX_LOG: usize = 1000;
const MAX_LINE: usize = 500;
/// Finished tasks that are kept.
const MAX_FINISHED: usize = 40;
/// The rate is measured over spans at least this long.
const RATE_SPAN: Duration = Duration::from_secs(1);

/// All tasks, running and finished.
#[derive(Clone)]
pub(crate) struct Tasks {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    tasks: Mutex<BTreeMap<TaskId, Arc<Task>>>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

/// One task, as its readers see it.
pub(crate) struct Task {
    id: TaskId,
    state: Mutex<Inner>,
    revision: watch::Sender<u64>,
    cancel: CancellationToken,
}

struct Inner {
    info: TaskInfo,
    log: VecDeque<String>,
    /// Number of the first line in `log`, counted from the task's beginning.
    first_line: u64,
    step_began: Instant,
    rate: Option<Rate>,
}

struct Rate {
    at: Instant,
    done: u64,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    task: TaskInfo,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tasks {
    /// Reads the finished tasks of a directory. `stop` ends the running ones.
    pub(crate) fn open(dir: &Path, stop: CancellationToken) -> Self {
        let mut tasks = BTreeMap::new();
        for path in disk::list(dir).into_iter().filter(|p| p.extension().is_some_and(|e| e == "json")) {
            let Some(saved) = disk::read_json::<Saved>(&path).ok().flatten() else {
                // Only history is lost.
                tracing::debug!(path = %path.display(), "a finished task is not readable");
                continue;
            };
            let mut info = saved.task;
            let log = std::mem::take(&mut info.log).into();
            let inner = Inner { log, first_line: 0, step_began: Instant::now(), rate: None, info };
            tasks.insert(inner.info.id, Arc::new(Task::new(inner, CancellationToken::new())));
        }
        Self {
            shared: Arc::new(Shared {
                dir: dir.to_owned(),
                tasks: Mutex::new(tasks),
                tracker: TaskTracker::new(),
                stop,
            }),
        }
    }

    /// Starts a task. `work` gets a handle to report by; its error ends the task as failed.
    pub(crate) fn spawn<F, W>(
        &self,
        kind: TaskKind,
        title: String,
        clan: Option<ClanName>,
        steps: &[&str],
        work: W,
    ) -> Arc<Task>
    where
        W: FnOnce(TaskHandle) -> F,
        F: Future<Output = Result<TaskResult, ApiProblem>> + Send + 'static,
    {
        let info = TaskInfo {
            id: TaskId::from_u64(0),
            kind,
            title,
            clan,
            state: TaskState::Running,
            started: now(),
            finished: None,
            steps: steps
                .iter()
                .map(|s| TaskStep { title: (*s).to_owned(), state: StepState::Pending, elapsed_ms: 0 })
                .collect(),
            progress: None,
            detail: None,
            result: None,
            problem: None,
            log: Vec::new(),
        };
        let mut inner = Inner { info, log: VecDeque::new(), first_line: 0, step_began: Instant::now(), rate: None };
        let task = {
            let mut tasks = lock(&self.shared.tasks);
            // Ids grow with time, so that the newest is the last.
            let mut number = inner.info.started.as_millis() << 12;
            while tasks.contains_key(&TaskId::from_u64(number)) {
                number += 1;
            }
            inner.info.id = TaskId::from_u64(number);
            let task = Arc::new(Task::new(inner, self.shared.stop.child_token()));
            tasks.insert(task.id, task.clone());
            task
        };
        let running = work(TaskHandle { task: task.clone() });
        let (shared, watched) = (self.shared.clone(), task.clone());
        // The work runs as a task of its own, so that a bug in it ends in a report rather than in silence.
        let work = self.shared.tracker.spawn(running);
        self.shared.tracker.spawn(async move {
            let outcome = work.await.unwrap_or_else(|error| {
                tracing::error!(task = %watched.id, %error, "a task broke off");
                Err(ApiProblem::new(ErrorCode::Internal, "the task broke off by a fault of Clan's own"))
            });
            watched.finish(outcome, shared.stop.is_cancelled());
            shared.keep(&watched);
        });
        task
    }

    /// One task.
    pub(crate) fn get(&self, id: TaskId) -> Option<Arc<Task>> {
        lock(&self.shared.tasks).get(&id).cloned()
    }

    /// All tasks, newest first, without log lines.
    pub(crate) fn list(&self) -> Vec<TaskInfo> {
        let tasks: Vec<_> = lock(&self.shared.tasks).values().rev().cloned().collect();
        tasks.iter().map(|t| t.info()).collect()
    }

    /// Whether a running task concerns the clan.
    pub(crate) fn running_on(&self, clan: &ClanName) -> Option<TaskInfo> {
        self.list().into_iter().find(|t| !t.state.is_final() && t.clan.as_ref() == Some(clan))
    }

    /// Waits until all running tasks have ended. Cancel `stop` first.
    pub(crate) async fn join(&self) {
        self.shared.tracker.close();
        self.shared.tracker.wait().await;
    }
}

impl Shared {
    /// Writes a finished task to disk, and forgets the oldest ones.
    fn keep(&self, task: &Task) {
        let saved = Saved { task: task.info_with_log() };
        if let Err(error) = disk::write_json(&self.path(task.id), &saved) {
            tracing::debug!(%error, "a finished task is not kept");
        }
        let mut tasks = lock(&self.tasks);
        let finished: Vec<TaskId> = tasks.values().filter(|t| t.is_final()).map(|t| t.id).collect();
        for id in finished.iter().take(finished.len().saturating_sub(MAX_FINISHED)) {
            tasks.remove(id);
            // A leftover file is only history.
            let _ = std::fs::remove_file(self.path(*id));
        }
    }

    fn path(&self, id: TaskId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }
}

impl Task {
    fn new(inner: Inner, cancel: CancellationToken) -> Self {
        Self { id: inner.info.id, state: Mutex::new(inner), revision: watch::Sender::new(0), cancel }
    }

    /// How it stands, without log lines.
    pub(crate) fn info(&self) -> TaskInfo {
        let inner = lock(&self.state);
        let mut info = inner.info.clone();
        if let Some(step) = info.steps.iter_mut().find(|s| s.state == StepState::Running) {
            step.elapsed_ms = millis(inner.step_began.elapsed());
        }
        info
    }

    /// How it stands, with log lines.
    pub(crate) fn info_with_log(&self) -> TaskInfo {
        let mut info = self.info();
        info.log = lock(&self.state).log.iter().cloned().collect();
        info
    }

    pub(crate) fn is_final(&self) -> bool {
        lock(&self.state).info.state.is_final()
    }

    /// Wakes at every change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Log lines from a number on, and the number after the last.
    pub(crate) fn log_since(&self, number: u64) -> (Vec<String>, u64) {
        let inner = lock(&self.state);
        let skip = usize::try_from(number.saturating_sub(inner.first_line)).unwrap_or(usize::MAX);
        (inner.log.iter().skip(skip).cloned().collect(), inner.first_line + inner.log.len() as u64)
    }

    /// Asks the task to end.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits for its end.
    #[cfg(test)]
    pub(crate) async fn finished(&self) -> TaskInfo {
        let mut watch = self.watch();
        while !self.is_final() {
            if watch.changed().await.is_err() {
                break;
            }
        }
        self.info()
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut lock(&self.state));
        self.revision.send_modify(|r| *r += 1);
    }

    fn finish(&self, outcome: Result<TaskResult, ApiProblem>, stopping: bool) {
        self.change(|inner| {
            let (state, step) = match &outcome {
                Ok(_) => (TaskState::Done, StepState::Done),
                Err(p) if p.code == ErrorCode::Cancelled => (TaskState::Cancelled, StepState::Failed),
                Err(_) => (TaskState::Failed, StepState::Failed),
            };
            end_step(inner, step);
            inner.info.state = state;
            inner.info.finished = Some(now());
            inner.info.detail = None;
            inner.info.progress = None;
            match outcome {
                Ok(result) => inner.info.result = Some(result),
                Err(problem) => inner.info.problem = Some(problem),
            }
            let info = &inner.info;
            match &info.problem {
                Some(problem) if state == TaskState::Failed && !stopping => {
                    tracing::info!(task = %info.id, title = info.title, problem = problem.message, why = problem.why, "task failed");
                }
                _ => tracing::info!(task = %info.id, title = info.title, ?state, "task ended"),
            }
        });
    }
}

fn end_step(inner: &mut Inner, state: StepState) {
    let elapsed = millis(inner.step_began.elapsed());
    if let Some(step) = inner.info.steps.iter_mut().find(|s| s.state == StepState::Running) {
        step.state = state;
        step.elapsed_ms = elapsed;
    }
    inner.info.progress = None;
    inner.info.detail = None;
    inner.rate = None;
}

/// What the work of a task reports by. Clones report for the same task.
#[derive(Clone)]
pub(crate) struct TaskHandle {
    task: Arc<Task>,
}

impl TaskHandle {
    /// Ends the running step and begins the one with this number.
    pub(crate) fn begin(&self, step: usize) {
        self.task.change(|inner| {
            end_step(inner, StepState::Done);
            inner.step_began = Instant::now();
            if let Some(step) = inner.info.steps.get_mut(step) {
                step.state = StepState::Running;
            }
        });
    }

    /// Ends the running step, which had nothing to do.
    pub(crate) fn skip(&self) {
        self.task.change(|inner| end_step(inner, StepState::Skipped));
    }

    /// What the running step does just now.
    pub(crate) fn detail(&self, text: impl Into<String>) {
        let text = bounded(text.into());
        self.task.change(|inner| inner.info.detail = Some(text));
    }

    /// The running step does nothing worth a word.
    pub(crate) fn no_detail(&self) {
        self.task.change(|inner| inner.info.detail = None);
    }

    /// How many bytes are done, of how many.
    pub(crate) fn progress(&self, done: u64, total: Option<u64>) {
        self.task.change(|inner| {
            let at = Instant::now();
            let before = inner.info.progress.as_ref().and_then(|p| p.rate);
            let rate = match &inner.rate {
                Some(last) if at - last.at < RATE_SPAN => before,
                Some(last) => {
                    let rate = done.saturating_sub(last.done) as f64 / (at - last.at).as_secs_f64();
                    inner.rate = Some(Rate { at, done });
                    Some(rate as u64)
                }
                None => {
                    inner.rate = Some(Rate { at, done });
                    None
                }
            };
            inner.info.progress = Some(TaskProgress { done, total, rate });
        });
    }

    /// Adds a log line.
    pub(crate) fn log(&self, line: impl Into<String>) {
        let line = bounded(line.into());
        self.task.change(|inner| {
            if inner.log.len() >= MAX_LOG {
                inner.log.pop_front();
                inner.first_line += 1;
            }
            inner.log.push_back(line);
        });
    }

    /// Cancelled when the person, or the manager's end, stops the task.
    pub(crate) fn cancel_token(&self) -> CancellationToken {
        self.task.cancel.clone()
    }

    /// Runs something until it ends or the task is cancelled.
    pub(crate) async fn unless_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, ApiProblem>>,
    ) -> Result<T, ApiProblem> {
        tokio::select! {
            biased;
            () = self.task.cancel.cancelled() => Err(cancelled()),
            outcome = work => outcome,
        }
    }
}

/// The person cancelled it.
pub(crate) fn cancelled() -> ApiProblem {
    ApiProblem::new(ErrorCode::Cancelled, "the task was cancelled")
}

/// The time, by this computer's clock.
pub(crate) fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(millis(since))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A line of bounded length without control characters: it may come from tools and guests.
fn bounded(text: String) -> String {
    if text.len() <= MAX_LINE && !text.chars().any(char::is_control) {
        return text;
    }
    text.chars().filter(|c| !c.is_control() || *c == '\t').take(MAX_LINE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks(dir: &Path) -> (Tasks, CancellationToken) {
        let stop = CancellationToken::new();
        (Tasks::open(dir, stop.clone()), stop)
    }

    fn spawn<F>(tasks: &Tasks, work: impl FnOnce(TaskHandle) -> F) -> Arc<Task>
    where
        F: Future<Output = Result<TaskResult, ApiProblem>> + Send + 'static,
    {
        tasks.spawn(TaskKind::CreateClan, "Create".into(), None, &["one", "two", "three"], work)
    }

    #[tokio::test]
    async fn steps_end_as_the_work_went() {
        let dir = tempfile::tempdir().unwrap();
        let (tasks, _stop) = tasks(dir.path());
        let task = spawn(&tasks, |handle| async move {
            handle.begin(0);
            handle.skip();
            handle.begin(1);
            handle.progress(5, Some(10));
            handle.log("a line\u{1b}[31m");
            Err(ApiProblem::new(ErrorCode::DiskFull, "the disk is full"))
        });
        let info = task.finished().await;
        let states: Vec<_> = info.steps.iter().map(|s| s.state).collect();
        assert_eq!(states, [StepState::Skipped, StepState::Failed, StepState::Pending]);
        assert_eq!(info.state, TaskState::Failed);
        assert_eq!(info.problem.unwrap().code, ErrorCode::DiskFull);
        assert_eq!(info.progress, None);
        assert_eq!(task.log_since(0).0, ["a line[31m"]);
    }

    #[tokio::test]
    async fn a_cancelled_task_ends_as_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let (tasks, _stop) = tasks(dir.path());
        let task = spawn(&tasks, |handle| async move { handle.unless_cancelled(std::future::pending()).await });
        assert!(!task.is_final());
        task.cancel();
        assert_eq!(task.finished().await.state, TaskState::Cancelled);
    }

    #[tokio::test]
    async fn a_task_that_panics_ends_as_failed() {
        let dir = tempfile::tempdir().unwrap();
        let (tasks, _stop) = tasks(dir.path());
        let task = spawn(&tasks, |_| async { panic!("a bug") });
        assert_eq!(task.finished().await.problem.unwrap().code, ErrorCode::Internal);
    }

    #[tokio::test]
    async fn finished_tasks_are_there_after_a_restart_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let (first, stop) = tasks(dir.path());
        for _ in 0..MAX_FINISHED + 5 {
            spawn(&first, |handle| async move {
                handle.log("kept");
                Ok(TaskResult::Nothing)
            })
            .finished()
            .await;
        }
        stop.cancel();
        first.join().await;
        let (again, _stop) = tasks(dir.path());
        let list = again.list();
        assert_eq!(list.len(), MAX_FINISHED);
        assert!(list.windows(2).all(|w| w[0].id > w[1].id), "newest first");
        assert_eq!(again.get(list[0].id).unwrap().info_with_log().log, ["kept"]);
    }

    #[tokio::test]
    async fn the_log_is_bounded_and_numbered_through() {
        let dir = tempfile::tempdir().unwrap();
        let (tasks, _stop) = tasks(dir.path());
        let task = spawn(&tasks, |handle| async move {
            for n in 0..MAX_LOG + 10 {
                handle.log(n.to_string());
            }
            Ok(TaskResult::Nothing)
        });
        task.finished().await;
        let (lines, next) = task.log_since(0);
        assert_eq!((lines.len(), lines[0].as_str()), (MAX_LOG, "10"));
        assert_eq!(task.log_since(next - 1).0, [(MAX_LOG + 9).to_string()]);
        assert!(task.log_since(next).0.is_empty());
    }
}
