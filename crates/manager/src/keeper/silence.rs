//! Guests that do not answer: how long that is borne, and what is tried then. Each thing is tried once.

use std::time::Duration;

use clan_api::{ApiProblem, ErrorCode, VmState};
use clan_vm::{AccelKind, probe};

use super::{
    owner::{Loop, Running},
    stop::QUIT,
};
use crate::guest;

const CONSOLE_LINES: usize = 12;

/// How long a guest may be silent after its QEMU was started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// One that need not boot answers within a fraction of a second.
    pub(crate) template: Duration,
    /// Under KVM an agent answers within two seconds.
    pub(crate) kvm: Duration,
    /// Emulated, on a busy computer, an agent takes some ten seconds.
    pub(crate) boot: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { template: seconds(20), kvm: seconds(30), boot: seconds(120) }
    }
}

/// What comes after a VM that is ended for its silence.
#[derive(Debug, Clone)]
pub(super) enum Doom {
    /// It is started anew, in another way or once more.
    Again(ApiProblem),
    /// It is given up.
    Last(ApiProblem),
}

impl Loop {
    /// How long the guest may be silent from its start, if it is.
    pub(super) fn patience(&self, running: &Running) -> Option<Duration> {
        let silent = !running.stopping
            && running.doom.is_none()
            && self.out.agent.borrow().is_none()
            && self.publish.borrow().state == VmState::Starting;
        let patience = self.config.patience;
        silent.then_some(match (running.accelerator, &running.template) {
            (_, Some(_)) => patience.template,
            (Some(AccelKind::Kvm), None) => patience.kvm,
            _ => patience.boot,
        })
    }

    /// Ends a guest that was silent for too long. What comes next is decided here, and done when it has ended.
    pub(super) async fn end_silent(&mut self) {
        let Some(running) = &self.running else { return };
        let Some(limit) = self.patience(running).filter(|patience| running.since.elapsed() >= *patience) else {
            return;
        };
        let vm = running.vm.clone();
        let again = |message: &str| Doom::Again(ApiProblem::new(ErrorCode::TimedOut, message));
        let doom = match (&running.template, running.accelerator) {
            (Some(template), _) => {
                self.config.templates.remove(template);
                again("the VM did not go on from its template: it boots instead")
            }
            (None, Some(AccelKind::Kvm)) => {
                let why = "A guest did not come up with hardware acceleration, so it is emulated.";
                probe::distrust(&self.config.cache, why).await;
                again(
                    "the VM did not come up with hardware acceleration: it is emulated until this computer boots anew",
                )
            }
            (None, _) => {
                let mut problem = ApiProblem::new(
                    ErrorCode::TimedOut,
                    format!("the VM did not answer within {} s of its start", limit.as_secs()),
                );
                let console = vm.console_tail(CONSOLE_LINES).unwrap_or_default();
                problem = problem.why(match guest::short(&console.replace('\n', " / ")) {
                    _ if self.record.get().encrypted => {
                        "its console is not kept, as its disk is encrypted: watch one with `clan vm console`".into()
                    }
                    nothing if nothing.trim().is_empty() => "its console is empty: its kernel does not start".into(),
                    said => format!("the last lines of its console: {said}"),
                });
                self.silent += 1;
                if self.silent > 1 {
                    Doom::Last(problem.hint("start it again: `clan vm start`"))
                } else {
                    Doom::Again(problem)
                }
            }
        };
        let (Doom::Again(problem) | Doom::Last(problem)) = &doom;
        tracing::warn!(problem = problem.message, why = problem.why, "a silent VM is ended");
        if let Some(running) = &mut self.running {
            running.doom = Some(doom);
        }
        vm.quit(QUIT).await;
    }
}
