//! Requests whose stream goes on after the answer: a connection to a service, the journal.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clan_os::channel::{Stream, send_message};
use clan_types::{MachineName, ServiceName, mesh_address};
use clan_wire::control::{ControlResponse, MAX_MESSAGE};
use tokio::{io::copy_bidirectional, net::TcpStream, time::timeout};

use crate::{
    control::Access,
    report::{Journal, Scope},
};

const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Joins the stream to a service in the clan.
pub(crate) async fn connect(mut stream: Stream, access: &Access, service: &ServiceName, machine: Option<&MachineName>) {
    let view = access.core.view();
    let status = access.status(&view).await;
    let mut offers: Vec<_> =
        status.services.iter().filter(|s| s.name == *service && machine.is_none_or(|m| *m == s.machine)).collect();
    offers.sort_by_key(|s| !s.healthy);
    let target = offers.first().and_then(|s| {
        let owner = status.machines.iter().find(|m| m.name == s.machine)?;
        Some(SocketAddr::new(IpAddr::V6(mesh_address(&view.clan, &owner.id)), s.port))
    });
    let Some(target) = target else {
        let failed = ControlResponse::Failed(format!("nobody in the clan offers `{service}`"));
        let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
        return finish(stream).await;
    };
    let mut tcp = match timeout(CONNECT_LIMIT, TcpStream::connect(target)).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => {
            let failed = ControlResponse::Failed(format!("`{service}` does not answer: {error}"));
            let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
            return finish(stream).await;
        }
        Err(_) => {
            let failed = ControlResponse::Failed(format!("`{service}` does not answer"));
            let _ = send_message(&mut stream, &failed, MAX_MESSAGE).await;
            return finish(stream).await;
        }
    };
    let _ = tcp.set_nodelay(true);
    if send_message(&mut stream, &ControlResponse::Connected, MAX_MESSAGE).await.is_ok() {
        let _ = copy_bidirectional(&mut stream, &mut tcp).await;
    }
}

/// Passes the journal on.
pub(crate) async fn journal(mut stream: Stream, scope: &Scope, lines: u32, follow: bool) {
    match Journal::open(scope, lines, follow) {
        Ok(journal) => {
            if send_message(&mut stream, &ControlResponse::Raw, MAX_MESSAGE).await.is_ok() {
                journal.pass(stream, follow).await;
            }
        }
        Err(why) => {
            let _ = send_message(&mut stream, &ControlResponse::Failed(why), MAX_MESSAGE).await;
            finish(stream).await;
        }
    }
}

/// Ends our direction and waits until the manager ended its own: what was written has then arrived.
pub(crate) async fn finish(mut stream: Stream) {
    let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
    let _ = timeout(CONNECT_LIMIT, tokio::io::copy(&mut stream, &mut tokio::io::sink())).await;
}
