//! From a recovery phrase to a link for this computer: which clan it belongs to, and where its machines are.

use std::time::Duration;

use clan_api::{ApiProblem, ErrorCode, FindRecovery};
use clan_ledger::{Entry, Intake, Ledger};
use clan_os::channel::{recv_message, recv_page, send_message};
use clan_types::{InviteLink, InviteSecret, MachineId, PeerAddr, PhraseError, Purpose, RecoveryPhrase};
use clan_wire::peer::{ALPN_JOIN, DeviceProof, JoinRequest, JoinResponse, MAX_JOIN_REQUEST, MAX_MESSAGE};
use ed25519_dalek::SigningKey;
use futures_util::StreamExt;
use iroh::{Endpoint, EndpointAddr, TransportAddr};
use iroh_mdns_address_lookup::DiscoveryEvent;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use zeroize::Zeroizing;

use crate::{fetch::Passing, guest, problem};

/// A guest tells where it is every three seconds or so.
const SEARCH: Duration = Duration::from_secs(15);
const CONNECT: Duration = Duration::from_secs(6);
const ANSWER: Duration = Duration::from_secs(15);
/// Machines on the network that are asked.
const MAX_ASKED: usize = 64;

/// A device link that the phrase's key stands behind. It goes to the caller and nowhere else.
pub(crate) async fn find(request: &FindRecovery) -> Result<InviteLink, ApiProblem> {
    let phrase: RecoveryPhrase = request.phrase.parse().map_err(|e| unusable(&e))?;
    let seed = Zeroizing::new(phrase.key_seed());
    let secret = InviteSecret::from_bytes(*seed);
    if let Some(text) = &request.link {
        // Whatever the link is for, it says which clan, and where that is.
        let link = InviteLink::in_text(text).map_err(|e| problem::link(&e))?;
        return Ok(InviteLink { purpose: Purpose::Device, secret, ..link });
    }
    let passing = Passing::new()?;
    let lookup = passing.lookup().cloned();
    let Some(lookup) = lookup else {
        return Err(nobody().why("this network carries no multicast, by which machines tell where they are"));
    };
    let mut events = lookup.subscribe().await;
    let endpoint = passing.bind().await?;
    let outcome = search(&endpoint, &mut events, &SigningKey::from_bytes(&seed)).await;
    endpoint.close().await;
    let (ledger, peer) = outcome.ok_or_else(nobody)?;
    let clan = ledger.clan();
    if ledger.state().clan_name.is_none() {
        return Err(ApiProblem::new(ErrorCode::Untrusted, "the machine that answered does not hold a clan"));
    }
    Ok(InviteLink { purpose: Purpose::Device, clan, secret, peers: vec![peer], relays: Vec::new() })
}

async fn search(
    endpoint: &Endpoint,
    events: &mut (impl futures_util::Stream<Item = DiscoveryEvent> + Unpin),
    key: &SigningKey,
) -> Option<(Ledger, PeerAddr)> {
    let mut asked = JoinSet::new();
    let mut count = 0;
    let over = sleep(SEARCH);
    tokio::pin!(over);
    loop {
        let event = tokio::select! {
            () = &mut over => return None,
            Some(answered) = asked.join_next() => {
                if let Ok(Some(found)) = answered {
                    return Some(found);
                }
                continue;
            }
            event = events.next() => event?,
        };
        let DiscoveryEvent::Discovered { endpoint_info, .. } = event else { continue };
        if count >= MAX_ASKED {
            continue;
        }
        count += 1;
        let (endpoint, key) = (endpoint.clone(), key.clone());
        asked.spawn(async move { ask(&endpoint, endpoint_info.to_endpoint_addr(), &key).await });
    }
}

async fn ask(endpoint: &Endpoint, addr: EndpointAddr, key: &SigningKey) -> Option<(Ledger, PeerAddr)> {
    let id = |key: iroh::PublicKey| MachineId::from_bytes(*key.as_bytes());
    let machine = id(addr.id);
    let addrs = addr.addrs.iter().filter_map(|addr| match addr {
        TransportAddr::Ip(addr) => Some(*addr),
        _ => None,
    });
    let peer = PeerAddr { machine, addrs: addrs.take(16).collect() };
    let connection = timeout(CONNECT, endpoint.connect(addr, ALPN_JOIN)).await.ok()?.ok()?;
    let answer = timeout(ANSWER, async {
        let (mut send, mut recv) = connection.open_bi().await.ok()?;
        let proof = DeviceProof::new(key, &machine, &id(endpoint.id()));
        send_message(&mut send, &JoinRequest::Locate { proof, have: Vec::new() }, MAX_JOIN_REQUEST).await.ok()?;
        let JoinResponse::Preview = recv_message(&mut recv, MAX_MESSAGE).await.ok()? else { return None };
        let first = recv_page(&mut recv).await.ok()?;
        Some((recv, first))
    });
    let (mut recv, first) = answer.await.ok()??;
    // Which clan it is only the entries say.
    let clan = first.entries.iter().find_map(|bytes| Entry::decode(bytes).ok())?.clan();
    let mut intake = Intake::new(Ledger::open(clan));
    intake.take(first.entries.iter().map(Vec::as_slice), !first.more).ok()?;
    let ledger =
        if first.more { guest::take_ledger(&mut recv, intake, ANSWER).await.ok()? } else { intake.into_ledger() };
    connection.close(0u32.into(), b"done");
    Some((ledger, peer))
}

fn nobody() -> ApiProblem {
    ApiProblem::new(ErrorCode::Unreachable, "no machine on this network belongs to a clan that knows this phrase")
        .hint("a machine of the clan must run, and be on the same network as this computer")
        .hint("or name one: somebody's `clan invite` prints a link, for `clan recover --link`")
}

fn unusable(error: &PhraseError) -> ApiProblem {
    let problem = ApiProblem::new(ErrorCode::PhraseInvalid, error.to_string());
    match error {
        PhraseError::Unknown { nearest: Some(word), .. } => problem.hint(format!("did you mean `{word}`?")),
        PhraseError::Unknown { nearest: None, .. } | PhraseError::Checksum => {
            problem.hint("compare it with what you wrote down, word by word")
        }
        PhraseError::Count(_) => problem.hint("type all twelve, in their order, with blanks between them"),
    }
}
