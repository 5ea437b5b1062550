//! Joining: how a newcomer's machine asks to be admitted, and how any machine of the clan answers.

use std::time::Duration;

use clan_os::channel::{recv_message, send_message};
use clan_types::MachineId;
use clan_wire::{
    control::Redeem,
    peer::{ALPN_JOIN, EncodedEntry, JoinRefusal, JoinRequest, JoinResponse, MAX_MESSAGE},
};
use iroh::{Endpoint, RelayUrl, endpoint::Connection};
use tokio::time::timeout;

use crate::{core::CoreHandle, net};

const REQUEST_LIMIT: Duration = Duration::from_secs(20);
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Questions that one stranger may ask on a connection.
const MAX_REQUESTS: usize = 8;

/// Answers a newcomer's questions.
pub(crate) async fn serve(connection: Connection, core: CoreHandle) {
    let endpoint = net::machine_of(&connection);
    for _ in 0..MAX_REQUESTS {
        let answered = timeout(REQUEST_LIMIT, async {
            let (mut send, mut recv) = connection.accept_bi().await.ok()?;
            let request = recv_message::<JoinRequest, _>(&mut recv, MAX_MESSAGE).await.ok()?;
            let response = answer(request, endpoint, &core).await;
            send_message(&mut send, &response, MAX_MESSAGE).await.ok()?;
            send.finish().ok()
        });
        if !matches!(answered.await, Ok(Some(()))) {
            break;
        }
    }
    // The newcomer closes once it has read the answer.
    let _ = timeout(REQUEST_LIMIT, connection.closed()).await;
}

async fn answer(request: JoinRequest, endpoint: MachineId, core: &CoreHandle) -> JoinResponse {
    let outcome = match request {
        JoinRequest::Preview { proof } => {
            core.preview(proof, endpoint).await.map(|entries| JoinResponse::Preview { entries })
        }
        JoinRequest::Locate { proof } => {
            core.locate(proof, endpoint).await.map(|entries| JoinResponse::Preview { entries })
        }
        JoinRequest::Redeem { entries } => core.redeem(entries).await.map(|entries| JoinResponse::Admitted { entries }),
    };
    outcome.unwrap_or_else(|refusal| {
        tracing::info!(%endpoint, %refusal, "a newcomer was refused");
        JoinResponse::Refused(refusal)
    })
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

/// Asks the machines named by the link, one after the other, to admit this one; directly, or through `relays`.
pub(crate) async fn redeem(
    endpoint: &Endpoint,
    redeem: &Redeem,
    relays: &[RelayUrl],
) -> Result<Vec<EncodedEntry>, RedeemError> {
    let mut last = String::from("the link names no machine");
    for peer in &redeem.peers {
        let Some(addr) = net::endpoint_addr(peer, relays) else { continue };
        let attempt = timeout(CONNECT_LIMIT, async {
            let connection = endpoint.connect(addr, ALPN_JOIN).await.map_err(|e| e.to_string())?;
            let (mut send, mut recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
            let request = JoinRequest::Redeem { entries: redeem.entries.clone() };
            send_message(&mut send, &request, MAX_MESSAGE).await.map_err(|e| e.to_string())?;
            let response = recv_message::<JoinResponse, _>(&mut recv, MAX_MESSAGE).await.map_err(|e| e.to_string())?;
            connection.close(0u32.into(), b"done");
            Ok::<_, String>(response)
        });
        match attempt.await {
            Ok(Ok(JoinResponse::Admitted { entries })) => return Ok(entries),
            Ok(Ok(JoinResponse::Refused(JoinRefusal::NotReady))) => last = JoinRefusal::NotReady.to_string(),
            Ok(Ok(JoinResponse::Refused(refusal))) => return Err(RedeemError::Refused(refusal)),
            Ok(Ok(JoinResponse::Preview { .. })) => last = String::from("an answer to another question"),
            Ok(Err(error)) => last = error,
            Err(_) => last = format!("no answer within {} s", CONNECT_LIMIT.as_secs()),
        }
    }
    Err(RedeemError::Unreachable { asked: redeem.peers.len(), last })
}
