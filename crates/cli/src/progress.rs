//! Watching a task of the manager to its end: bars on a terminal, lines elsewhere; Ctrl-C cancels it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use clan_api::{ClientError, ErrorCode, EventStream, StepState, TaskEvent, TaskId, TaskInfo, TaskState};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{
    context::Context,
    error::CliError,
    printer::{Printer, Tone, harmless},
    words,
};

/// Log lines that are kept to be shown if the task fails.
const KEPT_LINES: usize = 15;
/// How long a manager that went away may take to come back: systemd takes a moment, a person some more.
const RETURN_LIMIT: Duration = Duration::from_secs(180);
/// So long nothing is said of it: a manager that is only busy, or is started again at once, is no news.
const QUIET: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(500);

/// Follows a task until it ends; its last state if it ended well.
pub(crate) async fn follow(context: &Context, task: TaskInfo) -> Result<TaskInfo, CliError> {
    let mut watch =
        Watch { screen: Screen::new(&context.printer), log: VecDeque::new(), verbose: context.verbose, last: task };
    let outcome = watch.until_it_ends(context).await;
    watch.screen.clear();
    outcome?;
    watch.end(&context.printer)
}

impl Watch {
    async fn until_it_ends(&mut self, context: &Context) -> Result<(), CliError> {
        self.screen.update(&self.last);
        let mut events: Option<EventStream> = None;
        let mut cancelled = false;
        while !self.last.state.is_final() {
            // The next manager goes on under another number.
            let id = self.last.id;
            let event = tokio::select! {
                biased;
                _ = tokio::signal::ctrl_c() => None,
                event = next_event(context, id, &mut events) => Some(event),
            };
            match event {
                Some(Ok(TaskEvent::Update { task })) => {
                    self.last = *task;
                    self.screen.update(&self.last);
                }
                Some(Ok(TaskEvent::Log { line })) => self.log(&line),
                Some(Err(Broken)) => {
                    events = None;
                    self.last = tokio::select! {
                        biased;
                        _ = tokio::signal::ctrl_c() => return Err(CliError::refused("interrupted", "stopped watching")
                            .why("the manager went away; the next one goes on")
                            .hint("start it with `clan manager`, then see how things stand: `clan status`")),
                        task = come_back(context, &self.last, &self.screen) => task?,
                    };
                    self.screen.update(&self.last);
                }
                None if cancelled => {
                    return Err(CliError::refused("interrupted", "stopped watching")
                        .why("the manager is still cancelling")
                        .hint("see how it stands: `clan status`"));
                }
                None => {
                    cancelled = true;
                    self.screen.note("Cancelling… (once more to stop watching)");
                    context.ask(context.client.cancel_task(id)).await?;
                }
            }
        }
        Ok(())
    }
}

/// The stream of events ended before the task.
struct Broken;

/// The next event; opens the stream if it is not. May be dropped at any time: no event is lost.
async fn next_event(context: &Context, id: TaskId, events: &mut Option<EventStream>) -> Result<TaskEvent, Broken> {
    let stream = match events {
        Some(stream) => stream,
        None => events.insert(context.client.task_events(id).await.map_err(|_| Broken)?),
    };
    stream.next().await.ok_or(Broken)?.map_err(|_| Broken)
}

/// Asks for the task until a manager answers: one that was killed may be started again, and goes on with what it can.
async fn come_back(context: &Context, task: &TaskInfo, screen: &Screen) -> Result<TaskInfo, CliError> {
    let gone = Instant::now();
    let mut told = false;
    loop {
        tokio::time::sleep(RETRY).await;
        let found = match context.client.task(task.id).await {
            Err(ClientError::Problem(problem)) if problem.code == ErrorCode::NotFound => {
                // Another manager, which has not heard of it: what is not at its end has no file.
                context.client.tasks().await.map(|tasks| successor(task, tasks))
            }
            found => found.map(Some),
        };
        match found {
            Ok(Some(found)) => {
                if found.id != task.id {
                    screen.note("The manager was started again, and goes on.");
                }
                return Ok(found);
            }
            Ok(None) => return Err(CliError::not_gone_on_with(&task.title)),
            Err(ClientError::Problem(problem)) => return Err((*problem).into()),
            Err(_) if gone.elapsed() > RETURN_LIMIT => return Err(CliError::manager_gone(&task.title)),
            Err(_) if gone.elapsed() > QUIET && !told => {
                told = true;
                let limit = words::span(RETURN_LIMIT);
                screen.note(&format!(
                    "The manager went away. Waiting up to {limit} for it to be started again, which goes on with this: `clan manager` \
                     (Ctrl-C stops waiting)"
                ));
            }
            Err(_) => {}
        }
    }
}

/// What the next manager made of a task: the latest that does the same for the same clan.
fn successor(task: &TaskInfo, tasks: Vec<TaskInfo>) -> Option<TaskInfo> {
    let same = |other: &TaskInfo| other.id > task.id && other.kind == task.kind && other.clan == task.clan;
    tasks.into_iter().filter(same).max_by_key(|other| other.id)
}

struct Watch {
    screen: Screen,
    log: VecDeque<String>,
    verbose: bool,
    last: TaskInfo,
}

impl Watch {
    fn log(&mut self, line: &str) {
        let line = harmless(line.trim_end()).into_owned();
        if self.verbose {
            self.screen.note(&line);
        } else {
            if self.log.len() == KEPT_LINES {
                self.log.pop_front();
            }
            self.log.push_back(line);
        }
    }

    fn end(self, printer: &Printer) -> Result<TaskInfo, CliError> {
        match self.last.state {
            TaskState::Done | TaskState::Running => Ok(self.last),
            TaskState::Cancelled => Err(CliError::refused("cancelled", format!("cancelled: {}", self.last.title))
                .why("you asked for it; what was done so far is undone")),
            TaskState::Failed => {
                if !printer.is_json() {
                    for line in &self.log {
                        printer.talk(&printer.err_style(Tone::Faint, &format!("  │ {line}")));
                    }
                }
                Err(self.last.problem.map_or_else(
                    || CliError::bug(format!("failed: {}", self.last.title), "the manager gave no reason"),
                    CliError::from,
                ))
            }
        }
    }
}

/// What the person sees meanwhile.
enum Screen {
    Bars { bar: ProgressBar, printer: Printer, shown: Vec<StepState>, counting: bool },
    Lines { printer: Printer, shown: Vec<StepState>, tenths: u64 },
}

impl Screen {
    fn new(printer: &Printer) -> Self {
        if printer.stderr_is_terminal() && !printer.is_json() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(12));
            bar.set_style(spinner(printer));
            bar.enable_steady_tick(Duration::from_millis(120));
            Self::Bars { bar, printer: printer.clone(), shown: Vec::new(), counting: false }
        } else {
            Self::Lines { printer: printer.clone(), shown: Vec::new(), tenths: 0 }
        }
    }

    fn update(&mut self, task: &TaskInfo) {
        self.steps(task);
        let running = task.steps.iter().find(|s| s.state == StepState::Running);
        match self {
            Self::Bars { bar, printer, counting, .. } => {
                let title = running.map_or(task.title.as_str(), |s| s.title.as_str());
                let bytes = task.progress.as_ref().and_then(|p| p.total.map(|total| (p.done, total)));
                match (bytes, *counting) {
                    (Some((done, total)), false) => {
                        bar.reset();
                        bar.set_length(total);
                        bar.set_position(done);
                        bar.set_style(bytes_bar(printer));
                        *counting = true;
                    }
                    (Some((done, total)), true) => {
                        bar.set_length(total);
                        bar.set_position(done);
                    }
                    (None, true) => {
                        bar.set_style(spinner(printer));
                        bar.reset();
                        *counting = false;
                    }
                    (None, false) => {}
                }
                let detail = task.detail.as_deref().filter(|d| !d.is_empty() && bytes.is_none());
                bar.set_message(
                    detail.map_or_else(
                        || harmless(title).into_owned(),
                        |d| format!("{}: {}", harmless(title), harmless(d)),
                    ),
                );
            }
            Self::Lines { printer, tenths, .. } => {
                let Some(progress) = &task.progress else {
                    *tenths = 0;
                    return;
                };
                let Some(total) = progress.total.filter(|t| *t > 0) else { return };
                let now = (u128::from(progress.done.min(total)) * 10 / u128::from(total)) as u64;
                if now > *tenths && now < 10 && !printer.is_json() {
                    let size = clan_types::ByteSize::from_bytes;
                    printer.talk(&format!("  {}0 % ({} of {})", now, size(progress.done), size(total)));
                }
                *tenths = now;
            }
        }
    }

    /// Says which steps began and ended since the last time.
    fn steps(&mut self, task: &TaskInfo) {
        let (Self::Bars { shown, .. } | Self::Lines { shown, .. }) = self;
        let before = std::mem::replace(shown, task.steps.iter().map(|s| s.state).collect());
        for (at, step) in task.steps.iter().enumerate() {
            let was = before.get(at).copied().unwrap_or(StepState::Pending);
            if was == step.state {
                continue;
            }
            let title = harmless(&step.title);
            let took = words::span(Duration::from_millis(step.elapsed_ms));
            match self {
                Self::Bars { printer, .. } => {
                    let line = match step.state {
                        StepState::Done => format!(
                            "{} {title} {}",
                            printer.err_style(Tone::Good, "✓"),
                            printer.err_style(Tone::Faint, &took)
                        ),
                        StepState::Failed => format!("{} {title}", printer.err_style(Tone::Bad, "✗")),
                        StepState::Skipped => printer.err_style(Tone::Faint, &format!("- {title}: not needed")),
                        StepState::Pending | StepState::Running => continue,
                    };
                    self.note(&line);
                }
                Self::Lines { printer, .. } if printer.is_json() => {}
                Self::Lines { printer, .. } => match step.state {
                    StepState::Running => printer.talk(&format!("{title}…")),
                    StepState::Done => printer.talk(&format!("{title}: done in {took}")),
                    StepState::Skipped => printer.talk(&format!("{title}: not needed")),
                    StepState::Failed => printer.talk(&format!("{title}: failed after {took}")),
                    StepState::Pending => {}
                },
            }
        }
    }

    /// A line above what moves.
    fn note(&self, line: &str) {
        match self {
            Self::Bars { bar, printer, .. } => bar.suspend(|| printer.talk(line)),
            Self::Lines { printer, .. } if printer.is_json() => {}
            Self::Lines { printer, .. } => printer.talk(line),
        }
    }

    fn clear(&self) {
        if let Self::Bars { bar, .. } = self {
            bar.finish_and_clear();
        }
    }
}

/// Shows a spinner while waiting for an answer that may take a while.
pub(crate) async fn waiting<T>(printer: &Printer, message: &'static str, answer: impl Future<Output = T>) -> T {
    if !printer.stderr_is_terminal() || printer.is_json() {
        return answer.await;
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(12));
    bar.set_style(spinner(printer));
    bar.set_message(message);
    bar.enable_steady_tick(Duration::from_millis(120));
    let answer = answer.await;
    bar.finish_and_clear();
    answer
}

fn spinner(printer: &Printer) -> ProgressStyle {
    style(if printer.stderr_has_colour() {
        "{spinner:.cyan} {wide_msg} {elapsed:.dim}"
    } else {
        "{spinner} {wide_msg} {elapsed}"
    })
}

fn bytes_bar(printer: &Printer) -> ProgressStyle {
    style(if printer.stderr_has_colour() {
        "{spinner:.cyan} {msg} {wide_bar:.cyan/dim} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta:.dim}"
    } else {
        "{spinner} {msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
    })
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner()).progress_chars("━╸─")
}

#[cfg(test)]
mod tests {
    use clan_api::TaskKind;

    use super::*;

    #[test]
    fn the_next_managers_task_is_the_latest_of_the_same_kind_for_the_same_clan() {
        let task = |id: u64, kind: TaskKind, clan: &str| TaskInfo {
            id: TaskId::from_u64(id),
            kind,
            title: "Join".into(),
            clan: clan.parse().ok(),
            state: TaskState::Running,
            started: clan_types::Timestamp::from_millis(id),
            finished: None,
            steps: Vec::new(),
            progress: None,
            detail: None,
            result: None,
            problem: None,
            log: Vec::new(),
        };
        let (lost, join) = (task(5, TaskKind::JoinClan, "family"), TaskKind::JoinClan);
        let others = vec![
            task(3, join, "family"),
            task(9, join, "work"),
            task(8, TaskKind::UpdateVm, "family"),
            task(7, join, "family"),
            task(6, join, "family"),
        ];
        assert_eq!(successor(&lost, others.clone()).unwrap().id, TaskId::from_u64(7));
        assert!(successor(&lost, others[..3].to_vec()).is_none(), "an earlier one, and those of others, are not it");
    }

    #[test]
    fn every_template_is_well_formed() {
        for template in [
            "{spinner:.cyan} {wide_msg} {elapsed:.dim}",
            "{spinner} {msg} {wide_bar:.cyan/dim} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }
}
