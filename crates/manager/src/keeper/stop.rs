//! How a VM is stopped.

use std::time::Duration;

use clan_os::channel::Channel;
use clan_vm::Vm;
use clan_wire::agent::AgentRequest;
use tokio::{sync::watch, time::timeout};

use crate::guest;

/// How long services get to stop.
pub(super) const POWER_OFF: Duration = Duration::from_secs(90);
/// The same, while the manager itself stops.
pub(super) const POWER_OFF_QUICKLY: Duration = Duration::from_secs(30);
pub(super) const QUIT: Duration = Duration::from_secs(10);

/// Stops a VM: the guest's services first, then the guest, then QEMU.
pub(super) async fn power_off(vm: Vm, mut agent: watch::Receiver<Option<Channel>>, grace: Duration) {
    // One that holds still cannot stop.
    if vm.is_paused().await.is_ok_and(|paused| paused)
        && let Err(error) = vm.resume().await
    {
        tracing::warn!(%error, "the paused VM does not go on");
    }
    // One that has just started is given the time to listen.
    let connected = timeout(Duration::from_secs(10), agent.wait_for(Option::is_some))
        .await
        .ok()
        .and_then(Result::ok)
        .and_then(|c| c.clone());
    if let Some(channel) = connected {
        for (request, patience) in [(AgentRequest::PowerOff, grace), (AgentRequest::PowerOffNow, QUIT)] {
            if let Err(error) = guest::ask_agent(&channel, &request, Duration::from_secs(5)).await {
                tracing::debug!(%error, "the agent did not confirm the power-off");
            }
            if timeout(patience, vm.wait_exit()).await.is_ok() {
                return;
            }
        }
    }
    tracing::warn!(pid = vm.pid(), "the guest does not power off: QEMU is told to quit");
    vm.quit(QUIT).await;
}
