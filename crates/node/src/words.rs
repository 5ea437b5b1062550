//! Waiting for newcomers who were told four words: gives them the link, once. What counts is decided by
//! `clan_pairing`; here are the streams, the announcement on the LAN, and the memory.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clan_os::channel::{recv_message, send_message};
use clan_pairing::{Codes, ConversationId, OpenError, Report};
use clan_types::{MachineId, Words};
use clan_wire::words::{MAX_MESSAGE, WordsRefusal, WordsRequest, WordsResponse, announcement};
use iroh::{Endpoint, endpoint::Connection};
use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::{
    core::{CoreHandle, now},
    net,
};

/// For a whole conversation: two round trips, and two key agreements on a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often what is over is looked for.
const TIDY: Duration = Duration::from_secs(30);

/// The words that this machine waits for. In memory only: a restart makes them void.
pub(crate) struct WordsDesk {
    codes: Mutex<Codes>,
    conversations: AtomicU64,
    changed: Notify,
}

impl WordsDesk {
    pub(crate) fn new(machine: MachineId) -> Self {
        Self { codes: Mutex::new(Codes::new(machine)), conversations: AtomicU64::new(0), changed: Notify::new() }
    }

    /// Waits for these words from now on.
    pub(crate) fn open(&self, words: &Words, link: &str) -> Result<(), OpenError> {
        self.codes().open(words, Zeroizing::new(link.as_bytes().to_vec()), now())?;
        self.changed.notify_one();
        Ok(())
    }

    /// Answers one newcomer.
    pub(crate) async fn serve(&self, connection: Connection) {
        let id = ConversationId(self.conversations.fetch_add(1, Ordering::Relaxed));
        let outcome = timeout(PATIENCE, self.converse(id, &connection)).await;
        self.codes().hang_up(id);
        self.changed.notify_one();
        let newcomer = net::machine_of(&connection);
        match outcome {
            Ok(Some(Ok(()))) => tracing::info!(%newcomer, "an invitation was given for its words"),
            Ok(Some(Err(refusal))) => tracing::info!(%newcomer, %refusal, "no invitation was given"),
            Ok(None) | Err(_) => tracing::debug!(%newcomer, "a newcomer broke off"),
        }
        // The newcomer closes once it has read the answer.
        let _ = timeout(PATIENCE, connection.closed()).await;
    }

    /// `None` if the newcomer broke off.
    async fn converse(&self, id: ConversationId, connection: &Connection) -> Option<Result<(), WordsRefusal>> {
        let newcomer = net::machine_of(connection);
        let (mut send, mut recv) = connection.accept_bi().await.ok()?;
        let mut outcome = Ok(());
        for _ in 0..2 {
            let request = recv_message::<WordsRequest, _>(&mut recv, MAX_MESSAGE).await.ok()?;
            let response = self.answer(id, &newcomer, request);
            outcome = response.as_ref().map(drop).map_err(|refusal| *refusal);
            let response = response.unwrap_or_else(WordsResponse::Refused);
            send_message(&mut send, &response, MAX_MESSAGE).await.ok()?;
            if outcome.is_err() {
                break;
            }
        }
        send.finish().ok()?;
        Some(outcome)
    }

    fn answer(
        &self,
        id: ConversationId,
        newcomer: &MachineId,
        request: WordsRequest,
    ) -> Result<WordsResponse, WordsRefusal> {
        match request {
            WordsRequest::Begin { channel, share } => {
                let mut seed = Zeroizing::new([0; 32]);
                getrandom::fill(seed.as_mut_slice()).map_err(|_| WordsRefusal::Busy)?;
                self.codes().begin(id, newcomer, channel, &share, &seed, now()).map(WordsResponse::Share)
            }
            WordsRequest::Confirm { tag } => self.codes().confirm(id, &tag, now()).map(WordsResponse::Link),
        }
    }

    /// Held for a key agreement at most, never across an await.
    fn codes(&self) -> MutexGuard<'_, Codes> {
        self.codes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the LAN which channels this machine waits for, and its people what became of them, until cancelled.
pub(crate) async fn announce(desk: Arc<WordsDesk>, endpoint: Endpoint, core: CoreHandle, cancel: CancellationToken) {
    let mut announced = None;
    loop {
        desk.codes().forget(now());
        let data = announced_by(&desk);
        if announced.as_ref() != Some(&data) {
            endpoint.set_user_data_for_address_lookup(data.parse().ok());
            announced = Some(data);
        }
        let reports = desk.codes().reports();
        let told: Vec<String> = reports.iter().map(told).collect();
        core.problem("words", (!told.is_empty()).then(|| told.join(" "))).await;
        tokio::select! {
            () = cancel.cancelled() => break,
            () = desk.changed.notified() => {}
            () = tokio::time::sleep(TIDY) => {}
        }
    }
}

/// What the LAN is told.
pub(crate) fn announced_by(desk: &WordsDesk) -> String {
    announcement(&desk.codes().channels())
}

fn told(report: &Report) -> String {
    match report {
        Report::Void { channel, .. } => format!(
            "Somebody gave wrong words for the invitation that begins with `{}`: its words are void. \
             Make a new one with `clan invite`.",
            channel.word()
        ),
    }
}
