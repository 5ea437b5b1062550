//! Another image for this machine: what whoever steers it wants, the manager of its computer does. Here the right to it is judged, and
//! what is done is written down; the manager judges once more, by what the person signs for it.

use std::{
    sync::{Mutex as SyncMutex, PoisonError},
    time::Duration,
};

use clan_os::channel::{MessageError, Stream, recv_message, send_message};
use clan_types::ImageId;
use clan_wire::{
    helm::{Answer, Deed, MAX_ANSWER, MAX_CALL, Proof, Refusal, Request},
    order::{Asks, MAX_ORDER, Says},
};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    time::timeout,
};

use super::{Caller, Failure, Helm};
use crate::{
    core::{CoreHandle, now},
    report::chain,
};

/// How long the manager may take to be there: it comes back from an order before in less.
const THERE: Duration = Duration::from_secs(3);
/// How long each side may take for its part of an order.
const PART: Duration = Duration::from_secs(10);

/// Where the manager waits for an order.
#[derive(Default)]
pub(super) struct Desk {
    waiting: SyncMutex<Option<Stream>>,
    came: Notify,
}

/// What is wanted.
pub(super) struct Wanted {
    pub(super) image: ImageId,
    /// The entry that it takes back, and the image that this entry led to.
    pub(super) reverts: Option<(u64, ImageId)>,
    pub(super) dry_run: bool,
}

impl Desk {
    /// The latest manager counts: one before it is gone.
    pub(super) fn wait(&self, manager: Stream) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(manager);
        self.came.notify_one();
    }

    async fn manager(&self) -> Option<Stream> {
        let there = async {
            loop {
                let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
                match waiting {
                    Some(manager) => return manager,
                    None => self.came.notified().await,
                }
            }
        };
        timeout(THERE, there).await.ok()
    }
}

fn gone(why: &str) -> Failure {
    Failure::Failed(format!("the manager of its computer does not answer: {why}"))
}

async fn heard<T: DeserializeOwned, R: AsyncRead + Unpin + ?Sized>(from: &mut R, limit: usize) -> Result<T, String> {
    let said: Result<T, MessageError> =
        timeout(PART, recv_message(from, limit)).await.map_err(|_| format!("nothing within {} s", PART.as_secs()))?;
    said.map_err(|error| chain(&error))
}

async fn ask(manager: &mut Stream, asks: &Asks) -> Result<Says, Failure> {
    send_message(manager, asks, MAX_ORDER).await.map_err(|error| gone(&chain(&error)))?;
    match heard(manager, MAX_ORDER).await.map_err(|why| gone(&why))? {
        Says::Refused(refusal) => Err(refusal.into()),
        says => Ok(says),
    }
}

impl Helm {
    /// What an entry of the journal had the machine run before, if that is what it tells.
    pub(super) fn image_before(&self, number: u64) -> Option<(ImageId, ImageId)> {
        let kept = self.kept.borrow();
        match kept.journal().iter().find(|entry| entry.number == number)?.what {
            Deed::Image { before, after, .. } => Some((before, after)),
            _ => None,
        }
    }

    /// Has the machine run another image, if the manager agrees.
    pub(super) async fn order<W, R>(
        &self,
        caller: &Caller,
        request: &Request,
        Wanted { image, reverts, dry_run }: Wanted,
        send: &mut W,
        recv: &mut R,
        core: &CoreHandle,
    ) -> Result<Answer, Failure>
    where
        W: AsyncWrite + Unpin + Send,
        R: AsyncRead + Unpin + Send,
    {
        if !self.host.is_guest() {
            return Err(Refusal::NoImage.into());
        }
        let mut manager = self.desk.manager().await.ok_or_else(|| gone("it is not there"))?;
        let Says::Sign(challenge) = ask(&mut manager, &Asks::Order { image, dry_run }).await? else {
            return Err(gone("it says something else"));
        };
        let asked = send_message(send, &Answer::Sign { image, challenge }, MAX_ANSWER).await;
        asked.map_err(|error| Failure::Failed(chain(&error)))?;
        let proof: Proof = heard(recv, MAX_CALL).await.map_err(Failure::Failed)?;
        let before = match ask(&mut manager, &Asks::Signed(proof)).await? {
            Says::Accepted { before } => before,
            Says::Unchanged => return Ok(Answer::Unchanged),
            Says::Sign(_) | Says::Refused(_) => return Err(gone("it says something else")),
        };
        let (number, expected) = reverts.unzip();
        if let Some(number) = number.filter(|_| expected != Some(before)) {
            return Err(Refusal::Stale { number, now: before.short() }.into());
        }
        let done = self.change(caller, request, dry_run, core, |kept, by| {
            Ok(Some(kept.note(by, Deed::Image { before, after: image, reverts: number }, now())))
        })?;
        if !dry_run {
            // INVARIANT: who it was is on disk before the manager begins.
            send_message(&mut manager, &Asks::Noted, MAX_ORDER).await.map_err(|error| gone(&chain(&error)))?;
            crate::streams::finish(manager).await;
        }
        Ok(done)
    }

    /// Writes down that the base OS user gives the machine another image.
    pub(crate) fn note_image(&self, before: ImageId, after: ImageId, core: &CoreHandle) -> Result<(), String> {
        let by = self.actor(&Caller::Here, &core.view());
        let noted = self.write(|kept| {
            kept.note(by, Deed::Image { before, after, reverts: None }, now());
            Ok(())
        });
        noted.map_err(|failure| match failure {
            Failure::Refused(refusal) => refusal.to_string(),
            Failure::Failed(why) => why,
        })
    }

    /// The manager waits for an order.
    pub(crate) fn wait(&self, manager: Stream) {
        self.desk.wait(manager);
    }
}
