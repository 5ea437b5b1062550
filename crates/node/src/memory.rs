//! What the manager, whose memory is not on this machine's disk, has of the ledger that this machine may lack.

use clan_os::channel::{Stream, recv_page, send_message};
use clan_wire::{
    control::{ControlResponse, MAX_MESSAGE},
    peer::Vector,
};
use tokio::time::timeout;

use crate::{
    control::REQUEST_LIMIT,
    core::{CoreError, CoreHandle},
    report::chain,
    streams,
};

/// Gives what is new since `have`.
pub(crate) async fn give(mut stream: Stream, core: &CoreHandle, have: Vector) {
    let has = ControlResponse::Entries(core.view().vector.to_vec());
    let sent = send_message(&mut stream, &has, MAX_MESSAGE).await;
    if sent.is_ok() && core.send_ledger(&mut stream, have).await.is_ok() {
        streams::finish(stream).await;
    }
}

/// Takes the pages that follow, then what became of them.
pub(crate) async fn take(stream: &mut Stream, core: &CoreHandle, restored: bool) -> ControlResponse {
    loop {
        let page = match timeout(REQUEST_LIMIT, recv_page(stream)).await {
            Ok(Ok(page)) => page,
            Ok(Err(error)) => return ControlResponse::Failed(chain(&error)),
            Err(_) => return ControlResponse::Failed("what is remembered stands still".to_owned()),
        };
        let more = page.more;
        match core.insert(page.entries).await {
            // One that does not fit does not cost the others.
            Ok(()) | Err(CoreError::Rejected(_)) => {}
            Err(error) => return ControlResponse::Failed(chain(&error)),
        }
        if !more {
            return ControlResponse::Remembered { sure: core.remembered(restored).await };
        }
    }
}
