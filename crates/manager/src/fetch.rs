//! What a newcomer's manager fetches from machines of the clan: the ledger, and the image. As a client only.

use std::{
    net::SocketAddr,
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use clan_api::{ApiProblem, ErrorCode};
use clan_ledger::{AuthorId, Intake, InviteProblem, Ledger, Published, VmDescription};
use clan_os::channel::{recv_message, send_message};
use clan_relay::Names;
use clan_types::{ClanId, DeviceId, InviteId, InviteLink, MachineId, PeerAddr, Purpose, RelayAddr};
use clan_wire::peer::{
    ALPN_JOIN, EncodedEntry, InviteProof, JoinRefusal, JoinRequest, JoinResponse, MAX_JOIN_REQUEST, MAX_MESSAGE,
    Vector, have,
};
use ed25519_dalek::SigningKey;
use iroh::{
    Endpoint, EndpointAddr, RelayUrl, SecretKey, TransportAddr,
    endpoint::{Connection, QuicTransportConfig, presets},
};
use iroh_mdns_address_lookup::MdnsAddressLookup;
use rustls::{CipherSuite, crypto::CryptoProvider};
use tokio::time::timeout;

use crate::{guest, problem, publish, tasks::now};

mod image;
mod race;

use race::{Due, Race};

const CONNECT: Duration = Duration::from_secs(12);
const PREVIEW: Duration = Duration::from_secs(10);
/// A transfer that stands still for so long is tried anew.
const STALL: Duration = Duration::from_secs(30);
/// Addresses that discovery may add to those of a link, for each machine.
const MAX_FOUND: usize = 8;

/// A passing identity on the network, as which a newcomer asks.
pub(crate) struct Passing {
    secret: SecretKey,
    lookup: Option<MdnsAddressLookup>,
    relays: Names,
}

impl Passing {
    /// A fresh one. A machine of a link may have moved to another address of the same LAN, or wait for words there: it
    /// announces itself, and we only listen.
    pub(crate) fn new() -> Result<Self, ApiProblem> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|e| no_endpoint(&e))?;
        let secret = SecretKey::from_bytes(&secret);
        // Where there is no multicast, a link's addresses have to do.
        let lookup = MdnsAddressLookup::builder()
            .advertise(false)
            .build(secret.public())
            .inspect_err(|error| tracing::debug!(%error, "no discovery on this network"))
            .ok();
        Ok(Self { secret, lookup, relays: Names::default() })
    }

    /// What machines announce on this LAN, if it can be heard.
    pub(crate) fn lookup(&self) -> Option<&MdnsAddressLookup> {
        self.lookup.as_ref()
    }

    /// Where relays are, for its endpoint.
    pub(crate) fn names(&self) -> Names {
        self.relays.clone()
    }

    /// The endpoint.
    pub(crate) async fn bind(self) -> Result<PassingEndpoint, ApiProblem> {
        let transport = QuicTransportConfig::builder().keep_alive_interval(Duration::from_secs(5)).build();
        let mut builder = clan_relay::prepare(Endpoint::builder(presets::Minimal), &self.relays)
            .crypto_provider(Arc::new(portable_crypto()))
            .secret_key(self.secret)
            .transport_config(transport);
        if let Some(lookup) = self.lookup {
            builder = builder.address_lookup(lookup);
        }
        builder.bind().await.map(PassingEndpoint).map_err(|e| no_endpoint(&e))
    }
}

/// An endpoint that ends in good order even where whoever asked hangs up in the middle: machines that were asked hear of it at once
/// instead of waiting until they give up.
pub(crate) struct PassingEndpoint(Endpoint);

impl Deref for PassingEndpoint {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.0
    }
}

impl Drop for PassingEndpoint {
    fn drop(&mut self) {
        if !self.0.is_closed()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let endpoint = self.0.clone();
            // Ends by itself within a few round trips, and with the manager.
            runtime.spawn(async move { endpoint.close().await });
        }
    }
}

fn no_endpoint(why: &dyn std::fmt::Display) -> ApiProblem {
    ApiProblem::new(ErrorCode::Internal, "cannot open a network endpoint").why(why.to_string())
}

/// Where a link leads, or a member goes: what is left of it without its secret.
struct Way {
    purpose: Purpose,
    clan: ClanId,
    peers: Vec<PeerAddr>,
    relays: Vec<RelayAddr>,
    /// Whether a member goes it, whom nobody has to invite.
    member: bool,
}

/// Fetches by right of an invitation link, or of being a member.
pub(crate) struct Fetcher {
    endpoint: PassingEndpoint,
    way: Way,
    invite_key: SigningKey,
    /// The machine that answered last.
    answered: Mutex<Option<MachineId>>,
    /// What a machine gave of the ledger before it broke off.
    part: Mutex<Option<Ledger>>,
    /// The link's relays, by their names in the endpoint.
    relays: Vec<RelayUrl>,
}

/// What came of asking every machine of a link.
enum Round {
    Found(Box<Found>),
    Refused(Box<ApiProblem>),
    Silence,
}

/// What a link leads to, checked by ourselves.
pub(crate) struct Found {
    pub(crate) ledger: Ledger,
    /// The VM that the clan's machines are to run, if it names one: with a network layer that is known here.
    pub(crate) published: Option<Published>,
}

impl Found {
    /// The VM that the clan's machines are to run, if it names one.
    pub(crate) fn description(&self) -> Option<&VmDescription> {
        self.published.as_ref().map(|published| &published.description)
    }
}

impl Fetcher {
    /// Opens an endpoint of a passing identity. `first` is the machine to ask first, if it is one of the link's.
    pub(crate) async fn open(link: InviteLink, first: Option<MachineId>) -> Result<Self, ApiProblem> {
        let key = SigningKey::from_bytes(link.secret.expose());
        Self::open_with(link, key, first).await
    }

    /// The same by right of a device's key instead of the link's secret.
    pub(crate) async fn open_with(
        link: InviteLink,
        key: SigningKey,
        first: Option<MachineId>,
    ) -> Result<Self, ApiProblem> {
        let InviteLink { purpose, clan, peers, relays, .. } = link;
        Self::on(Way { purpose, clan, peers, relays, member: false }, key, first).await
    }

    /// The same by right of a device's key, from machines that its own one knows.
    pub(crate) async fn of_member(
        clan: ClanId,
        key: SigningKey,
        peers: Vec<PeerAddr>,
        relays: Vec<RelayAddr>,
    ) -> Result<Self, ApiProblem> {
        Self::on(Way { purpose: Purpose::Device, clan, peers, relays, member: true }, key, None).await
    }

    async fn on(way: Way, key: SigningKey, first: Option<MachineId>) -> Result<Self, ApiProblem> {
        let passing = Passing::new()?;
        let names = passing.relays.clone();
        let endpoint = passing.bind().await?;
        let machine = MachineId::from_bytes(*endpoint.id().as_bytes());
        let proof = InviteProof::new(&key, &way.clan, &machine);
        let relays = clan_relay::introduce(&endpoint, &names, &way.relays, Some(&proof)).await;
        Ok(Self { endpoint, way, invite_key: key, answered: Mutex::new(first), part: Mutex::new(None), relays })
    }

    /// What the link is for.
    pub(crate) fn purpose(&self) -> Purpose {
        self.way.purpose
    }

    /// The device whose key this fetcher has, for links that are for one.
    pub(crate) fn device(&self) -> DeviceId {
        AuthorId::of(&self.invite_key).device()
    }

    /// Hands entries of a device in good standing to a machine of the link, and gives the clan's, those included.
    pub(crate) async fn admit(&self, entries: Vec<EncodedEntry>) -> Result<Ledger, ApiProblem> {
        let began = Instant::now();
        let (mut last, peers, entries) = (None, self.ordered(), &entries);
        // More than one may take them: what is in a ledger already it is not in twice.
        let mut race = Race::new(&peers, |peer, due| {
            self.ask(peer, due, move |have| JoinRequest::Redeem { entries: entries.clone(), have })
        });
        while let Some(answer) = race.next().await {
            match answer {
                Ok((JoinResponse::Admitted { .. }, ledger)) => return Ok(ledger),
                Ok((JoinResponse::Refused(refusal @ JoinRefusal::NotReady), _)) => last = Some(refusal.to_string()),
                Ok((JoinResponse::Refused(refusal), _)) => return Err(problem::refusal(&refusal)),
                Ok((JoinResponse::Preview, _)) => last = Some("an answer to another question".into()),
                Err(why) => last = Some(why),
            }
        }
        Err(self.unreachable(began.elapsed(), last))
    }

    /// The invite.
    pub(crate) fn invite(&self) -> InviteId {
        InviteId::from_bytes(self.invite_key.verifying_key().to_bytes())
    }

    /// The machines of the link, with the addresses at which they were found besides those that the link names.
    pub(crate) async fn peers(&self) -> Vec<PeerAddr> {
        let mut peers = self.ordered();
        for peer in &mut peers {
            let Ok(id) = iroh::PublicKey::from_bytes(peer.machine.as_bytes()) else { continue };
            let Some(info) = self.endpoint.remote_info(id).await else { continue };
            let found = info.addrs().filter_map(|known| match known.addr() {
                TransportAddr::Ip(addr) => Some(*addr),
                _ => None,
            });
            let new: Vec<SocketAddr> = found.filter(|addr| !peer.addrs.contains(addr)).take(MAX_FOUND).collect();
            peer.addrs.extend(new);
        }
        peers
    }

    /// The relays of the link.
    pub(crate) fn relays(&self) -> Vec<RelayAddr> {
        self.way.relays.clone()
    }

    /// Closes the endpoint in good order.
    pub(crate) async fn close(self) {
        self.endpoint.close().await;
    }

    fn proof(&self) -> InviteProof {
        InviteProof::new(&self.invite_key, &self.way.clan, &MachineId::from_bytes(*self.endpoint.id().as_bytes()))
    }

    /// Asks the machines of the link what it leads to, and checks the answers until one is right.
    pub(crate) async fn preview(&self) -> Result<Found, ApiProblem> {
        let began = Instant::now();
        let mut last = None;
        // Twice: a machine that has just started may lose the first question.
        for _ in 0..2 {
            match self.preview_round(&mut last).await {
                Round::Found(found) => return Ok(*found),
                Round::Refused(problem) => return Err(*problem),
                Round::Silence => {}
            }
        }
        Err(self.unreachable(began.elapsed(), last))
    }

    async fn preview_round(&self, last: &mut Option<String>) -> Round {
        let peers = self.ordered();
        let mut refused = None;
        let mut race = Race::new(&peers, |peer, due| async move {
            let request = |have| JoinRequest::Preview { proof: self.proof(), have };
            (peer.machine, self.ask(peer, due, request).await)
        });
        while let Some(answered) = race.next().await {
            match answered {
                (machine, Ok((JoinResponse::Preview, ledger))) => match self.check(ledger) {
                    Ok(found) => {
                        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine);
                        return Round::Found(Box::new(found));
                    }
                    Err(problem) => refused = Some(problem),
                },
                (_, Ok((JoinResponse::Refused(JoinRefusal::NotReady), _))) => {
                    *last = Some(JoinRefusal::NotReady.to_string());
                }
                // It may not have heard of the invite yet.
                (_, Ok((JoinResponse::Refused(refusal @ JoinRefusal::UnknownInvite), _))) => {
                    refused.get_or_insert(problem::refusal(&refusal));
                }
                (_, Ok((JoinResponse::Refused(refusal), _))) => {
                    return Round::Refused(Box::new(problem::refusal(&refusal)));
                }
                (_, Ok((JoinResponse::Admitted { .. }, _))) => *last = Some("an answer to another question".into()),
                (_, Err(why)) => *last = Some(why),
            }
        }
        refused.map_or(Round::Silence, |problem| Round::Refused(Box::new(problem)))
    }

    /// The machine that answered last.
    pub(crate) fn answered(&self) -> Option<MachineId> {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machines of the link, the one that answered before in front.
    fn ordered(&self) -> Vec<PeerAddr> {
        let answered = self.answered();
        let mut peers = self.way.peers.clone();
        peers.sort_by_key(|peer| Some(peer.machine) != answered);
        peers
    }

    /// INVARIANT: nothing is believed that does not follow from the clan's id, which came with the link: the founding
    /// entry hashes to it, and every other entry is signed by somebody it leads to.
    fn check(&self, ledger: Ledger) -> Result<Found, ApiProblem> {
        let state = ledger.state();
        if state.clan_name.is_none() {
            return Err(ApiProblem::new(
                ErrorCode::Untrusted,
                "the machine that answered does not hold the clan of this link",
            )
            .hint("ask for a new link: `clan invite` makes one"));
        }
        match self.way.purpose {
            Purpose::Join => {
                state.check_invite(&self.invite(), now()).map_err(|p| problem::refusal(&refusal_of(p)))?;
            }
            Purpose::Device if state.device_in_good_standing(&self.device()).is_some() => {}
            Purpose::Device => return Err(problem::refusal(&JoinRefusal::Revoked)),
        }
        let published = state.published.clone();
        if let Some(published) = &published {
            publish::check_network(&published.network)?;
        }
        Ok(Found { ledger, published })
    }

    fn unreachable(&self, waited: Duration, last: Option<String>) -> ApiProblem {
        let addrs: Vec<String> =
            self.way.peers.iter().flat_map(|p| p.addrs.iter().map(SocketAddr::to_string)).collect();
        let mut problem = ApiProblem::new(ErrorCode::Unreachable, "no machine of the clan answers").why(format!(
            "tried {} for {} s{}",
            if addrs.is_empty() { "no address, as none is named".to_owned() } else { addrs.join(", ") },
            waited.as_secs(),
            last.map(|l| format!("; the last attempt: {l}")).unwrap_or_default()
        ));
        if self.way.member {
            return problem.hint("try again when other machines of the clan are there: `clan machines`");
        }
        problem =
            problem.hint("the computer of whoever invited you must be on, and its clan running: `clan status` there");
        problem.hint("if it is on another network, its UDP port must be reachable from yours")
    }

    /// Where a machine is; `None` if it cannot exist.
    fn addr(&self, peer: &PeerAddr) -> Option<EndpointAddr> {
        let id = iroh::PublicKey::from_bytes(peer.machine.as_bytes()).ok()?;
        let direct = peer.addrs.iter().copied().map(TransportAddr::Ip);
        Some(EndpointAddr::from_parts(id, direct.chain(self.relays.iter().cloned().map(TransportAddr::Relay))))
    }

    async fn connect(&self, peer: &PeerAddr, alpn: &[u8]) -> Result<Connection, String> {
        let addr = self.addr(peer).ok_or_else(|| "the link names a machine that cannot exist".to_owned())?;
        match timeout(CONNECT, self.endpoint.connect(addr, alpn)).await {
            Ok(connected) => connected.map_err(|e| e.to_string()),
            Err(_) => Err(format!("no answer within {} s", CONNECT.as_secs())),
        }
    }

    /// Asks a machine, and takes the ledger that may follow its answer: on top of what was had from one that broke off.
    async fn ask(
        &self,
        peer: &PeerAddr,
        due: Due,
        request: impl FnOnce(Vector) -> JoinRequest,
    ) -> Result<(JoinResponse, Ledger), String> {
        let connection = self.connect(peer, ALPN_JOIN).await?;
        let begun = self.part().take().unwrap_or_else(|| Ledger::open(self.way.clan));
        let request = request(have(begun.vector()));
        let answer = timeout(PREVIEW, async {
            let (mut send, mut recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
            send_message(&mut send, &request, MAX_JOIN_REQUEST).await.map_err(|e| e.to_string())?;
            let response = recv_message(&mut recv, MAX_MESSAGE).await.map_err(|e| e.to_string())?;
            Ok::<_, String>((recv, response))
        });
        let answer = answer.await.unwrap_or_else(|_| Err(format!("no answer within {} s", PREVIEW.as_secs())));
        let outcome = match answer {
            Ok((mut recv, response @ (JoinResponse::Preview | JoinResponse::Admitted { .. }))) => {
                due.heard();
                let taken = guest::take_ledger(&mut recv, Intake::new(begun), STALL).await;
                taken.map(|ledger| (response, ledger))
            }
            Ok((_, refused)) => Ok((refused, begun)),
            Err(why) => Err((Some(begun), why)),
        };
        connection.close(0u32.into(), b"done");
        outcome.map_err(|(begun, why)| {
            let mut part = self.part();
            if begun.as_ref().map(Ledger::len) > part.as_ref().map(Ledger::len) {
                *part = begun;
            }
            why
        })
    }

    fn part(&self) -> MutexGuard<'_, Option<Ledger>> {
        self.part.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// ChaCha20 before AES: the machines that answer are VMs, and an emulated processor has no fast AES. The server follows
/// the client's order.
fn portable_crypto() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
    provider
}

fn refusal_of(invite: InviteProblem) -> JoinRefusal {
    match invite {
        InviteProblem::Unknown => JoinRefusal::UnknownInvite,
        InviteProblem::Used => JoinRefusal::Used,
        InviteProblem::Expired => JoinRefusal::Expired,
        InviteProblem::Revoked => JoinRefusal::Revoked,
    }
}

/// Runs something that blocks on the disk.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiProblem> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ApiProblem::new(ErrorCode::Internal, "a disk operation broke off"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_endpoint_of_a_broken_off_request_is_closed_in_good_order() {
        let passing = Passing { secret: SecretKey::from_bytes(&[7; 32]), lookup: None, relays: Names::default() };
        let endpoint = passing.bind().await.unwrap();
        let closed = endpoint.closed();
        let kept = Endpoint::clone(&endpoint);
        drop(endpoint);
        timeout(Duration::from_secs(20), closed).await.expect("it closes though a part of it is still in use");
        kept.close().await;
    }
}
