//! Whether the endpoint still has its sockets, and when no program may be started.
//!
//! When the network changes, the endpoint closes its UDP sockets and binds them again. Between `fork` and `exec` a program
//! that is being started has them too: the port is then still in use, binding fails, and is never tried again
//! (<https://github.com/n0-computer/net-tools/issues/200>). So nothing is started while the endpoint may be at it, and
//! whether it has its sockets is looked up: without them the machine hears nobody, and the controller must begin anew.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clan_os::addresses;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::own;

/// How often the sockets are looked for, beside after a change.
const EVERY: Duration = Duration::from_secs(5);
/// The endpoint waits a quarter of a second for a change to end, looks around, and binds.
const SETTLE: Duration = Duration::from_secs(1);
/// A network that does not come to rest holds nothing up for longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Sockets are absent for a moment whenever they are bound anew.
const AGAIN: Duration = Duration::from_millis(300);

/// Whether the endpoints of this process leave their sockets as they are. Of the process, as its children have all that it has.
static STILL: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(true));

/// Waits until a program may be started.
pub(crate) async fn still() {
    // What waited long enough is started all the same: that a socket is lost would be seen, and mended.
    let _ = timeout(PATIENCE, STILL.subscribe().wait_for(|still| *still)).await;
}

/// Whether a program may be started now.
pub(crate) fn is_still() -> bool {
    *STILL.borrow()
}

/// Ends a controller that hears nobody.
#[derive(Debug, Clone)]
pub(crate) struct Alarm {
    raised: Arc<AtomicBool>,
    cancel: CancellationToken,
}

impl Alarm {
    /// `cancel` ends the controller.
    pub(crate) fn new(cancel: CancellationToken) -> Self {
        Self { raised: Arc::default(), cancel }
    }

    pub(crate) fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
        self.cancel.cancel();
    }

    pub(crate) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }
}

/// Raises the alarm when one of the bound sockets is gone for good; until cancelled.
pub(crate) async fn watch(bound: Vec<SocketAddr>, alarm: Alarm, cancel: CancellationToken) {
    let mut changes = own::changes();
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
            () = own::next(&mut changes) => {
                let moving = Moving::begin();
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = settled(&mut changes) => {}
                }
                drop(moving);
            }
        }
        if lost(&bound) {
            tokio::time::sleep(AGAIN).await;
            if lost(&bound) && !cancel.is_cancelled() {
                tracing::error!(sockets = ?bound, "the QUIC endpoint lost a socket: the controller begins anew");
                return alarm.raise();
            }
        }
    }
}

/// No program is started while this is kept.
struct Moving;

impl Moving {
    fn begin() -> Self {
        STILL.send_replace(false);
        Self
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        STILL.send_replace(true);
    }
}

/// Until nothing more has changed for a while.
async fn settled(changes: &mut Option<addresses::Changes>) {
    let quiet = async { while timeout(SETTLE, own::next(changes)).await.is_ok() {} };
    let _ = timeout(PATIENCE, quiet).await;
}

/// Whether nobody on this computer has the ports. What the kernel does not say is no loss.
fn lost(bound: &[SocketAddr]) -> bool {
    let ports = |file: &str| fs::read_to_string(file).ok().map(|table| ports(&table));
    let (v4, v6) = (ports("/proc/self/net/udp"), ports("/proc/self/net/udp6"));
    bound.iter().any(|socket| {
        let table = if socket.is_ipv4() { &v4 } else { &v6 };
        table.as_ref().is_some_and(|ports| !ports.contains(&socket.port()))
    })
}

/// The local ports in a table of the kernel's, as `proc_net_udp(5)` has it: `sl: address:port` in hexadecimal.
fn ports(table: &str) -> BTreeSet<u16> {
    let port = |line: &str| u16::from_str_radix(line.split_whitespace().nth(1)?.rsplit_once(':')?.1, 16).ok();
    table.lines().skip(1).filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn ports_are_read_from_the_kernels_tables() {
        let table = "   sl  local_address rem_address   st tx_queue\n  \
                     5: 0100007F:0035 00000000:0000 07 00000000:00000000\n  \
                     6: 00000000000000000000000000000000:EA61 0:0 07\n";
        assert_eq!(ports(table), BTreeSet::from([53, 60001]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_is_gone_raises_the_alarm_and_one_that_is_there_does_not() {
        for family in ["127.0.0.1:0", "[::1]:0"] {
            let (kept, other) = (UdpSocket::bind(family).unwrap(), UdpSocket::bind(family).unwrap());
            let bound = vec![kept.local_addr().unwrap(), other.local_addr().unwrap()];
            let (over, cancel) = (CancellationToken::new(), CancellationToken::new());
            let alarm = Alarm::new(over.clone());
            let watch = tokio::spawn(watch(bound, alarm.clone(), cancel.clone()));
            assert!(timeout(EVERY * 20, over.cancelled()).await.is_err(), "both sockets are there");
            drop(other);
            over.cancelled().await;
            assert!(alarm.is_raised());
            watch.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_started_while_the_network_changes_but_not_for_ever() {
        still().await;
        let moving = Moving::begin();
        assert!(!is_still());
        let waiting = tokio::spawn(still());
        tokio::time::sleep(SETTLE).await;
        assert!(!waiting.is_finished());
        drop(moving);
        waiting.await.unwrap();
        let _moving = Moving::begin();
        still().await;
    }
}
