//! Joining: how a newcomer's machine asks to be admitted, and how any machine of the clan answers.

use std::time::Duration;

use clan_ledger::{Intake, Ledger};
use clan_os::channel::{recv_message, recv_page, send_message};
use clan_types::{MachineId, PeerAddr};
use clan_wire::{
    control::Redeem,
    peer::{ALPN_JOIN, JoinRefusal, JoinRequest, JoinResponse, MAX_JOIN_REQUEST, MAX_MESSAGE, Vector, have},
};
use iroh::{
    Endpoint, RelayUrl,
    endpoint::{Connection, RecvStream, SendStream},
};
use tokio::{io::AsyncRead, time::timeout};

use crate::{core::CoreHandle, net, report::chain, status};

const REQUEST_LIMIT: Duration = Duration::from_secs(20);
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Of each machine that is named to a newcomer.
const MAX_ADDRESSES: usize = 16;
/// Questions that one stranger may ask on a connection.
const MAX_REQUESTS: usize = 8;

/// Answers a newcomer's questions until they go; or until they stay as a machine of the clan, with which the stream that is
/// given is to be used.
pub(crate) async fn serve(connection: &Connection, core: &CoreHandle) -> Option<(SendStream, RecvStream)> {
    let endpoint = net::machine_of(connection);
    for _ in 0..MAX_REQUESTS {
        let asked = timeout(REQUEST_LIMIT, async {
            let (mut send, mut recv) = connection.accept_bi().await.ok()?;
            let request = recv_message::<JoinRequest, _>(&mut recv, MAX_JOIN_REQUEST).await.ok()?;
            let Some((response, have)) = answer(request, endpoint, core).await else {
                return Some(Next::Stays(send, recv));
            };
            send_message(&mut send, &response, MAX_MESSAGE).await.ok()?;
            let follows = matches!(response, JoinResponse::Preview | JoinResponse::Admitted { .. });
            Some(Next::Ledger(send, follows.then_some(have)))
        });
        let (mut send, have) = match asked.await {
            Ok(Some(Next::Ledger(send, have))) => (send, have),
            Ok(Some(Next::Stays(send, recv))) => return Some((send, recv)),
            Ok(None) | Err(_) => break,
        };
        if let Some(have) = have
            && core.send_ledger(&mut send, have).await.is_err()
        {
            break;
        }
        if send.finish().is_err() {
            break;
        }
    }
    // The newcomer closes once it has read the answer.
    let _ = timeout(REQUEST_LIMIT, connection.closed()).await;
    None
}

/// What follows an answer.
enum Next {
    /// The ledger, if any of it, but for what the newcomer has.
    Ledger(SendStream, Option<Vector>),
    Stays(SendStream, RecvStream),
}

/// The answer, and what the newcomer has of the ledger already; `None` if it stays, and talks as a machine of the clan does.
async fn answer(request: JoinRequest, endpoint: MachineId, core: &CoreHandle) -> Option<(JoinResponse, Vector)> {
    let (outcome, have) = match request {
        JoinRequest::Stay => return None,
        JoinRequest::Preview { proof, have } => {
            (core.preview(proof, endpoint).await.map(|()| JoinResponse::Preview), have)
        }
        JoinRequest::Locate { proof, have } => {
            (core.locate(proof, endpoint).await.map(|()| JoinResponse::Preview), have)
        }
        JoinRequest::Redeem { entries, have } => {
            (core.redeem(entries).await.map(|()| JoinResponse::Admitted { peers: status::others(&core.view()) }), have)
        }
    };
    let response = outcome.unwrap_or_else(|refusal| {
        tracing::info!(%endpoint, %refusal, "a newcomer was refused");
        JoinResponse::Refused(refusal)
    });
    Some((response, have))
}

/// Why this machine was not admitted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RedeemError {
    /// The clan said no.
    #[error("{0}")]
    Refused(JoinRefusal),
    /// No machine that could admit us answered.
    #[error("none of {asked} machines answered; the last attempt: {last}")]
    Unreachable {
        /// How many were asked.
        asked: usize,
        /// What went wrong with the last one.
        last: String,
    },
}

/// What a machine of the clan gives whom it has admitted.
pub(crate) struct Admitted {
    /// The connection to that machine, on which this one may [stay](crate::peer::stay).
    pub(crate) connection: Connection,
    /// The clan's ledger.
    pub(crate) ledger: Ledger,
    /// Other machines, and where they are.
    pub(crate) peers: Vec<PeerAddr>,
}

/// Asks the machines named by the link, one after the other, to admit this one; directly, or through `relays`. Goes on
/// from `ledger`, which is what is known of the clan's, and from what a machine gave that broke off.
pub(crate) async fn redeem(
    endpoint: &Endpoint,
    redeem: &Redeem,
    relays: &[RelayUrl],
    ledger: Ledger,
) -> Result<Admitted, RedeemError> {
    let mut last = String::from("the link names no machine");
    let mut intake = Intake::new(ledger);
    for peer in &redeem.peers {
        let Some(addr) = net::endpoint_addr(peer, relays) else { continue };
        let attempt = timeout(CONNECT_LIMIT, async {
            let connection = endpoint.connect(addr, ALPN_JOIN).await.map_err(|e| e.to_string())?;
            let (mut send, mut recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
            let request = JoinRequest::Redeem { entries: redeem.entries.clone(), have: have(intake.ledger().vector()) };
            send_message(&mut send, &request, MAX_JOIN_REQUEST).await.map_err(|e| e.to_string())?;
            let response = recv_message::<JoinResponse, _>(&mut recv, MAX_MESSAGE).await.map_err(|e| e.to_string())?;
            Ok::<_, String>((connection, recv, response))
        });
        match attempt.await {
            Ok(Ok((connection, mut recv, JoinResponse::Admitted { mut peers }))) => {
                match take(&mut recv, &mut intake).await {
                    Ok(()) => {
                        peers.truncate(status::MAX_OTHERS);
                        peers.iter_mut().for_each(|peer| peer.addrs.truncate(MAX_ADDRESSES));
                        return Ok(Admitted { connection, ledger: intake.into_ledger(), peers });
                    }
                    Err(why) => {
                        connection.close(0u32.into(), b"done");
                        last = why;
                    }
                }
            }
            Ok(Ok((_, _, JoinResponse::Refused(JoinRefusal::NotReady)))) => last = JoinRefusal::NotReady.to_string(),
            Ok(Ok((_, _, JoinResponse::Refused(refusal)))) => return Err(RedeemError::Refused(refusal)),
            Ok(Ok((_, _, JoinResponse::Preview))) => last = String::from("an answer to another question"),
            Ok(Err(error)) => last = error,
            Err(_) => last = format!("no answer within {} s", CONNECT_LIMIT.as_secs()),
        }
    }
    Err(RedeemError::Unreachable { asked: redeem.peers.len(), last })
}

/// Takes the pages of a ledger.
pub(crate) async fn take<R>(recv: &mut R, intake: &mut Intake) -> Result<(), String>
where
    R: AsyncRead + Unpin + ?Sized,
{
    loop {
        let page = timeout(REQUEST_LIMIT, recv_page(recv)).await;
        let page = page.map_err(|_| "the ledger stands still".to_owned())?.map_err(|e| chain(&e))?;
        let entries = page.entries.iter().map(Vec::as_slice);
        intake.take(entries, !page.more).map_err(|e| format!("the ledger is not taken: {e}"))?;
        if !page.more {
            return Ok(());
        }
        // Thousands of signatures were checked: others have their turn.
        tokio::task::yield_now().await;
    }
}
