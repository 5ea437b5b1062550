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
use clan_types::{Channel, MachineId, Words};
use clan_wire::words::{ALPN_WORDS, MAX_MESSAGE, WordsRefusal, WordsRequest, WordsResponse, announcement};
use iroh::{Endpoint, EndpointAddr, endpoint::Connection};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::{
    core::{CoreHandle, now},
    net,
    relay::{self, Lobby},
};

/// For a whole conversation: two round trips, and two key agreements on a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often what is over is looked for, and relays are told again.
const TIDY: Duration = Duration::from_secs(30);
/// For telling one relay.
const TELL: Duration = Duration::from_secs(10);

/// The words that this machine waits for. In memory only: a restart makes them void.
pub(crate) struct WordsDesk {
    codes: Mutex<Codes>,
    conversations: AtomicU64,
    changed: watch::Sender<()>,
    /// Of other machines, where this one is a relay.
    lobby: Arc<Lobby>,
}

/// What became of a conversation.
enum Outcome {
    /// The newcomer has the link.
    Given,
    /// A machine of the clan told what it waits for.
    Noted,
    Refused(WordsRefusal),
}

impl WordsDesk {
    pub(crate) fn new(machine: MachineId) -> Self {
        Self {
            codes: Mutex::new(Codes::new(machine)),
            conversations: AtomicU64::new(0),
            changed: watch::Sender::new(()),
            lobby: Arc::default(),
        }
    }

    /// Which machines wait for words, as this one knows if it is a relay.
    pub(crate) fn lobby(&self) -> Arc<Lobby> {
        self.lobby.clone()
    }

    /// Waits for these words from now on.
    pub(crate) fn open(&self, words: &Words, link: &str) -> Result<(), OpenError> {
        self.codes().open(words, Zeroizing::new(link.as_bytes().to_vec()), now())?;
        self.changed.send_replace(());
        Ok(())
    }

    /// Answers one newcomer.
    pub(crate) async fn serve(&self, connection: Connection, core: &CoreHandle) {
        let id = ConversationId(self.conversations.fetch_add(1, Ordering::Relaxed));
        let outcome = timeout(PATIENCE, self.converse(id, &connection, core)).await;
        self.codes().hang_up(id);
        self.changed.send_replace(());
        let newcomer = net::machine_of(&connection);
        match outcome {
            Ok(Some(Outcome::Given)) => tracing::info!(%newcomer, "an invitation was given for its words"),
            Ok(Some(Outcome::Noted)) => tracing::debug!(machine = %newcomer, "a machine waits for words"),
            Ok(Some(Outcome::Refused(refusal))) => tracing::info!(%newcomer, %refusal, "no invitation was given"),
            Ok(None) | Err(_) => tracing::debug!(%newcomer, "a newcomer broke off"),
        }
        // The newcomer closes once it has read the answer.
        let _ = timeout(PATIENCE, connection.closed()).await;
    }

    /// `None` if the newcomer broke off.
    async fn converse(&self, id: ConversationId, connection: &Connection, core: &CoreHandle) -> Option<Outcome> {
        let newcomer = net::machine_of(connection);
        let (mut send, mut recv) = connection.accept_bi().await.ok()?;
        let mut outcome = Outcome::Given;
        for _ in 0..2 {
            let response = match recv_message::<WordsRequest, _>(&mut recv, MAX_MESSAGE).await.ok()? {
                WordsRequest::Wait { channels } => self.note(newcomer, channels, core),
                request => self.answer(id, &newcomer, request),
            };
            match &response {
                Ok(WordsResponse::Noted) => outcome = Outcome::Noted,
                Ok(_) => {}
                Err(refusal) => outcome = Outcome::Refused(*refusal),
            }
            send_message(&mut send, &response.unwrap_or_else(WordsResponse::Refused), MAX_MESSAGE).await.ok()?;
            if !matches!(outcome, Outcome::Given) {
                break;
            }
        }
        send.finish().ok()?;
        Some(outcome)
    }

    /// Remembers what a machine of the clan waits for, if this one is a relay.
    fn note(
        &self,
        machine: MachineId,
        channels: Vec<Channel>,
        core: &CoreHandle,
    ) -> Result<WordsResponse, WordsRefusal> {
        let view = core.view();
        let ours = view.state.machine_in_good_standing(&machine).is_some();
        if !ours || !relay::known(&view).iter().any(|(relay, _)| *relay == view.machine) {
            return Err(WordsRefusal::Malformed);
        }
        self.lobby.note(machine, channels);
        Ok(WordsResponse::Noted)
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
            WordsRequest::Wait { .. } => Err(WordsRefusal::Malformed),
        }
    }

    /// Held for a key agreement at most, never across an await.
    fn codes(&self) -> MutexGuard<'_, Codes> {
        self.codes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the LAN which channels this machine waits for, and its people what became of them, until cancelled.
pub(crate) async fn announce(desk: Arc<WordsDesk>, endpoint: Endpoint, core: CoreHandle, cancel: CancellationToken) {
    let (mut announced, mut changed) = (None, desk.changed.subscribe());
    loop {
        changed.mark_unchanged();
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
            // The desk, which is held, keeps it open.
            _ = changed.changed() => {}
            () = tokio::time::sleep(TIDY) => {}
        }
    }
}

/// Tells the clan's relays which channels this machine waits for, so that newcomers elsewhere find it there, until cancelled.
pub(crate) async fn tell_relays(desk: Arc<WordsDesk>, endpoint: Endpoint, core: CoreHandle, cancel: CancellationToken) {
    let (mut news, mut changed) = (News::new(Instant::now()), desk.changed.subscribe());
    loop {
        changed.mark_unchanged();
        let channels = desk.codes().channels();
        if news.are(&channels, Instant::now()) {
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tell_all(&desk, &endpoint, &core, &channels) => {}
            }
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            _ = changed.changed() => {}
            () = tokio::time::sleep_until(news.again) => {}
        }
    }
}

/// What relays were told, and when they are told again. A newcomer's attempt at some words is nothing to tell: strangers could
/// have relays called as often as they like.
struct News {
    told: Vec<Channel>,
    again: Instant,
}

impl News {
    fn new(now: Instant) -> Self {
        Self { told: Vec::new(), again: now + TIDY }
    }

    /// Whether relays are to be told now.
    fn are(&mut self, channels: &[Channel], now: Instant) -> bool {
        let is_due = now >= self.again;
        if is_due {
            self.again = now + TIDY;
        }
        let tell = self.told != channels || is_due && !channels.is_empty();
        self.told = channels.to_vec();
        tell
    }
}

async fn tell_all(desk: &WordsDesk, endpoint: &Endpoint, core: &CoreHandle, channels: &[Channel]) {
    let view = core.view();
    let urls = relay::urls(&view);
    let mut telling = JoinSet::new();
    for (machine, _) in relay::known(&view) {
        if machine == view.machine {
            desk.lobby.note(machine, channels.to_vec());
        } else if let Some(addr) = net::endpoint_addr(&view.addresses_of(&machine), &urls) {
            let (endpoint, channels) = (endpoint.clone(), channels.to_vec());
            telling.spawn(async move {
                let told = timeout(TELL, tell(&endpoint, addr, channels)).await;
                if !matches!(told, Ok(Ok(()))) {
                    tracing::debug!(%machine, ?told, "a relay does not know of this machine's words");
                }
            });
        }
    }
    while telling.join_next().await.is_some() {}
}

async fn tell(endpoint: &Endpoint, relay: EndpointAddr, channels: Vec<Channel>) -> Result<(), String> {
    let connection = endpoint.connect(relay, ALPN_WORDS).await.map_err(|e| e.to_string())?;
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
    let request = WordsRequest::Wait { channels };
    send_message(&mut send, &request, MAX_MESSAGE).await.map_err(|e| e.to_string())?;
    let answer = recv_message::<WordsResponse, _>(&mut recv, MAX_MESSAGE).await.map_err(|e| e.to_string());
    connection.close(0u32.into(), b"done");
    match answer? {
        WordsResponse::Noted => Ok(()),
        other => Err(format!("{other:?}")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relays_are_told_of_other_words_and_now_and_then_but_not_of_every_attempt() {
        let began = Instant::now();
        let words: Words = "river table moon fine".parse().unwrap();
        let mut news = News::new(began);
        assert!(!news.are(&[], began + TIDY), "nothing to tell");
        let waits = [words.channel()];
        assert!(news.are(&waits, began + TIDY));
        for _ in 0..3 {
            assert!(!news.are(&waits, began + TIDY + TIDY / 2), "an attempt");
        }
        assert!(news.are(&waits, began + 2 * TIDY), "relays forget");
        assert!(news.are(&[], began + 2 * TIDY + TIDY / 2), "it is over");
        assert!(!news.are(&[], began + 3 * TIDY));
    }
}
