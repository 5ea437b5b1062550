//! The keeper of a clan whose machine is this computer itself: no VM to start, but a controller to stay in touch with, which
//! root, or systemd, runs.
//!
//! It is `Stopped` while the controller cannot be reached, with the reason; `Running` while it answers.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_os::channel::Channel;
use clan_types::ClanId;
use clan_wire::control::ControlRequest;
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    clan::RecordCell,
    guest::{self, Identity},
    keeper::{Command, VmView},
    link::{self, Outlets},
    memory, problem,
    record::Phase,
    tasks::now,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Pause between attempts to reach the controller; doubles up to the longest.
const RETRY: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(4);
/// How long a controller may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How long a controller may take to forget a clan: packets in flight are let go first.
const FORGET: Duration = Duration::from_secs(20);
/// Longest path of a Unix socket (unix(7)), without its final zero.
const MAX_SOCKET: usize = 107;

/// A socket's path as a request names it.
pub(crate) fn socket_path(text: &str) -> Result<PathBuf, ApiProblem> {
    let path = PathBuf::from(text);
    let bad = |why: &str| {
        Err(ApiProblem::new(ErrorCode::BadRequest, "that is no path of a controller's socket")
            .why(why)
            .hint("for example /run/clan/controller.sock"))
    };
    if !path.is_absolute() {
        return bad("it does not begin at the root folder");
    }
    if text.len() > MAX_SOCKET || text.chars().any(char::is_control) {
        return bad("it is longer than a socket's path can be, or has control characters");
    }
    Ok(path)
}

/// Who the controller is, if it runs, obeys us, and is free.
pub(crate) async fn look(socket: &Path) -> Result<Identity, ApiProblem> {
    let stream = connect(socket).await?;
    let cancel = CancellationToken::new();
    let (channel, driver) = Channel::host(stream, VERSION, cancel.clone());
    let asked = timeout(GREETING, guest::identify(&channel));
    let answer = tokio::select! {
        answer = asked => answer,
        ended = driver => {
            return Err(silent(socket).why(format!("it closed the connection: {}", ended.err().map_or_else(|| "without a reason".into(), |e| e.to_string()))));
        }
    };
    match answer {
        Ok(Ok(identity)) if identity.clan.is_some() => Err(taken(socket)),
        Ok(Ok(identity)) => Ok(identity),
        Ok(Err(error)) => Err(problem::guest(&error)),
        Err(_) => Err(silent(socket)),
    }
}

async fn connect(socket: &Path) -> Result<UnixStream, ApiProblem> {
    UnixStream::connect(socket).await.map_err(|error| unreachable(socket, &error))
}

fn unreachable(socket: &Path, error: &io::Error) -> ApiProblem {
    let shown = socket.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            ApiProblem::new(ErrorCode::PermissionDenied, "the clan's controller on this computer obeys another user")
                .why(format!("{shown}: {error}"))
                .hint("whoever runs it names its user: `clan controller --user NAME`")
        }
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ApiProblem::new(ErrorCode::ControllerDown, "the clan's controller does not run on this computer")
                .why(format!("nobody listens on {shown}"))
                .hint(format!("start it: {}", start_command(socket)))
        }
        _ => ApiProblem::new(ErrorCode::ControllerDown, "the clan's controller on this computer cannot be reached")
            .why(format!("{shown}: {error}")),
    }
}

/// How the controller of a socket is started: a service by its name, anything else by hand.
fn start_command(socket: &Path) -> String {
    let name = socket.strip_prefix("/run/clan").ok().and_then(|f| f.to_str()?.strip_suffix(".sock").map(str::to_owned));
    match name.as_deref() {
        Some("controller") => "`sudo clan controller --install`".into(),
        Some(name) => format!("`sudo clan controller --install --name {name}`"),
        None => format!("`clan controller --socket {} --state DIR`", socket.display()),
    }
}

fn silent(socket: &Path) -> ApiProblem {
    ApiProblem::new(ErrorCode::ControllerDown, "the clan's controller on this computer does not answer")
        .why(format!("somebody listens on {}, and says nothing in {} s", socket.display(), GREETING.as_secs()))
        .hint("look at its log, or start it again")
}

fn taken(socket: &Path) -> ApiProblem {
    ApiProblem::new(ErrorCode::Conflict, "this controller is a machine of a clan already")
        .why(format!("the one that listens on {}; a controller serves one clan", socket.display()))
        .hint("run another for this clan, `sudo clan controller --install --name NAME`, and name its socket with `--socket /run/clan/NAME.sock`")
}

/// Whether the controller is the clan's.
fn is_ours(found: Option<ClanId>, clan: &ClanId, phase: Phase, socket: &Path) -> Result<(), ApiProblem> {
    match found {
        Some(found) if found != *clan => Err(taken(socket)),
        None if matches!(phase, Phase::Ready | Phase::Leaving) => Err(ApiProblem::new(
            ErrorCode::ControllerDown,
            "the controller on this computer does not know the clan any more",
        )
        .why(format!("the one that listens on {} has another folder, or lost what was in it", socket.display()))
        .hint("start it with its former folder: `clan controller --state DIR`")
        .hint("or give this machine up: `clan vm delete --force`")),
        _ => Ok(()),
    }
}

/// The loop of such a keeper.
pub(crate) struct Integrated {
    pub(crate) record: Arc<RecordCell>,
    pub(crate) socket: PathBuf,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) publish: watch::Sender<VmView>,
    pub(crate) out: Outlets,
    pub(crate) cancel: CancellationToken,
}

impl Integrated {
    pub(crate) async fn run(mut self) {
        // The link is the only one that touches the channel; this loop only answers commands.
        let wanted = watch::Sender::new(self.record.get().wanted);
        let cancel = self.cancel.child_token();
        let link = Link {
            record: self.record.clone(),
            socket: self.socket.clone(),
            publish: self.publish.clone(),
            out: self.out.clone(),
            wanted: wanted.subscribe(),
        };
        let mut link = tokio::spawn({
            let cancel = cancel.clone();
            async move {
                tokio::select! {
                    () = cancel.cancelled() => {}
                    () = link.keep() => {}
                }
            }
        });
        loop {
            let command = tokio::select! {
                biased;
                () = self.cancel.cancelled() => break,
                command = self.commands.recv() => command,
            };
            match command {
                None => break,
                Some(Command::Want { run, reply }) => {
                    let outcome = self.record.update(|r| r.wanted = run).map_err(|e| problem::disk(&e));
                    if outcome.is_ok() {
                        wanted.send_replace(run);
                    }
                    let _ = reply.send(outcome);
                }
                Some(Command::Pause { reply, .. } | Command::Restart { reply }) => {
                    let _ = reply.send(Err(ApiProblem::new(ErrorCode::Conflict, "there is no virtual machine here")));
                }
                Some(Command::Destroy { reply }) => {
                    wanted.send_replace(true);
                    self.forget().await;
                    cancel.cancel();
                    let _ = (&mut link).await;
                    show(&self.publish, VmState::Stopped, None);
                    self.out.control.send_replace(None);
                    let _ = reply.send(());
                    return;
                }
            }
        }
        cancel.cancel();
        if let Err(error) = link.await {
            tracing::error!(%error, "the link to a controller broke off");
        }
        self.out.control.send_replace(None);
    }

    /// Has the controller forget the clan, as far as it can be told.
    async fn forget(&self) {
        let mut control = self.out.control.subscribe();
        let connected = timeout(GREETING, control.wait_for(Option::is_some)).await;
        let control = connected.ok().and_then(Result::ok).and_then(|c| c.clone());
        let told = match &control {
            Some(control) => {
                let forgotten = timeout(FORGET, guest::tell(control, &ControlRequest::Forget)).await;
                forgotten.map_err(|_| "it did not answer".to_owned()).and_then(|r| r.map_err(|e| e.to_string()))
            }
            None => Err("it does not answer".to_owned()),
        };
        if let Err(why) = told {
            let clan = self.record.get().name;
            tracing::warn!(%clan, why, socket = %self.socket.display(), "the controller keeps what it has of the clan: `clan controller --forget` there");
        }
    }
}

/// Stays connected to the controller.
struct Link {
    record: Arc<RecordCell>,
    socket: PathBuf,
    publish: watch::Sender<VmView>,
    out: Outlets,
    wanted: watch::Receiver<bool>,
}

impl Link {
    async fn keep(mut self) {
        let mut pause = RETRY;
        loop {
            if !*self.wanted.borrow_and_update() {
                show(&self.publish, VmState::Stopped, None);
                if self.wanted.changed().await.is_err() {
                    return;
                }
                pause = RETRY;
                continue;
            }
            let problem = match connect(&self.socket).await {
                Ok(stream) => {
                    let (answered, problem) = self.serve(stream).await;
                    if answered {
                        pause = RETRY;
                    }
                    problem
                }
                Err(problem) => problem,
            };
            self.out.control.send_replace(None);
            show(&self.publish, VmState::Stopped, Some(problem));
            tokio::select! {
                () = sleep(pause) => {}
                // The person asks for it: at once.
                _ = self.wanted.changed() => {}
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Serves one connection to its end. Whether it ever was of use, and why it ended.
    async fn serve(&self, stream: UnixStream) -> (bool, ApiProblem) {
        let cancel = CancellationToken::new();
        let _ended = cancel.clone().drop_guard();
        let (channel, driver) = Channel::host(stream, VERSION, cancel);
        let mut wanted = self.wanted.clone();
        tokio::select! {
            _ = driver => (self.out.control.borrow().is_some(), gone(&self.socket)),
            problem = self.converse(&channel) => (self.out.control.borrow().is_some(), problem),
            _ = wanted.wait_for(|w| !w) => (true, gone(&self.socket)),
        }
    }

    async fn converse(&self, channel: &Channel) -> ApiProblem {
        let identity = match timeout(GREETING, guest::identify(channel)).await {
            Ok(Ok(identity)) => identity,
            Ok(Err(error)) => return problem::guest(&error),
            Err(_) => return silent(&self.socket),
        };
        let record = self.record.get();
        if let Err(problem) = is_ours(identity.clan, &record.id, record.phase, &self.socket) {
            return problem;
        }
        self.out.control.send_replace(Some(channel.clone()));
        show(&self.publish, VmState::Running, None);
        tokio::select! {
            () = link::watch_until_silent(channel, &self.out) => {}
            () = memory::keep(channel, &self.record, &self.out) => {}
        }
        silent(&self.socket)
    }
}

fn gone(socket: &Path) -> ApiProblem {
    ApiProblem::new(ErrorCode::ControllerDown, "the clan's controller on this computer has ended")
        .why(format!("the connection to {} is gone", socket.display()))
        .hint(format!("start it: {}", start_command(socket)))
}

fn show(publish: &watch::Sender<VmView>, state: VmState, problem: Option<ApiProblem>) {
    publish.send_if_modified(|view| {
        let since = if view.state == state { view.since } else { now() };
        let next = VmView { problem, since, ..VmView::without_vm(state) };
        let changed = *view != next;
        *view = next;
        changed
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_controller_that_does_not_run_is_said_with_how_to_start_it() {
        let dir = tempfile::tempdir().unwrap();
        let problem = look(&dir.path().join("nobody.sock")).await.unwrap_err();
        assert_eq!(problem.code, ErrorCode::ControllerDown);
        assert!(problem.hints[0].contains("clan controller --socket"), "{problem:?}");
        assert_eq!(start_command(Path::new("/run/clan/controller.sock")), "`sudo clan controller --install`");
        assert_eq!(start_command(Path::new("/run/clan/work.sock")), "`sudo clan controller --install --name work`");
    }

    #[test]
    fn a_controller_of_another_clan_is_not_taken_for_ours() {
        let (ours, other) = (ClanId::from_bytes([1; 32]), ClanId::from_bytes([2; 32]));
        let check =
            |found, phase| is_ours(found, &ours, phase, Path::new("/run/clan/controller.sock")).map_err(|p| p.code);
        assert_eq!(check(Some(ours), Phase::Ready), Ok(()));
        assert_eq!(check(None, Phase::Joining), Ok(()));
        assert_eq!(check(Some(other), Phase::Joining), Err(ErrorCode::Conflict));
        assert_eq!(check(None, Phase::Ready), Err(ErrorCode::ControllerDown), "its folder is another one");
    }

    #[test]
    fn a_socket_is_named_by_its_whole_path() {
        assert!(socket_path("/run/clan/controller.sock").is_ok());
        for wrong in ["controller.sock", "", &format!("/{}", "x".repeat(200)), "/run/\n"] {
            assert_eq!(socket_path(wrong).unwrap_err().code, ErrorCode::BadRequest, "{wrong:?}");
        }
    }
}
