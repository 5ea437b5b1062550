//! The product's own guest.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clan_os::channel::{Channel, recv_message, send_message};
use clan_types::{ByteSize, Timestamp};
use clan_vm::{AccelKind, Begin, Console, Qemu, Vm, VmSpec, copy_data_disk, create_data_disk};
use clan_wire::agent::{AgentRequest, AgentResponse, ENTROPY, MAX_MESSAGE, Renewal};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Bench, FREED, Key, MEMORY, Results, age, memory, millis, settled};
use crate::LabError;

/// For anything that a guest does.
const LIMIT: Duration = Duration::from_secs(120);
const SETTLE: Duration = Duration::from_secs(60);
/// How long freed memory may take to come back.
const RETURN: Duration = Duration::from_secs(30);
const DISK: ByteSize = ByteSize::from_mib(2048);

/// A running guest; it ends with this.
struct Guest {
    vm: Vm,
    cancel: CancellationToken,
    _cancelled: DropGuard,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.vm.kill();
    }
}

impl Guest {
    async fn start(spec: VmSpec) -> Result<Self, LabError> {
        let vm = Vm::start(spec).await.map_err(|error| failed("start a VM", &error))?;
        let cancel = CancellationToken::new();
        Ok(Self { vm, cancel: cancel.clone(), _cancelled: cancel.drop_guard() })
    }

    fn age(&self) -> Result<Duration, LabError> {
        age(self.vm.pid()).ok_or_else(|| self.promise("it ended"))
    }

    fn memory(&self) -> Result<(f64, f64), LabError> {
        memory(self.vm.pid()).ok_or_else(|| self.promise("it ended"))
    }

    fn promise(&self, what: &str) -> LabError {
        LabError::Promise(format!("the guest: {what}; its console:\n{}", self.vm.console_tail(20).unwrap_or_default()))
    }

    async fn agent(&self) -> Result<Channel, LabError> {
        let port = self.vm.connect_agent().await.map_err(|error| failed("connect to the agent", &error))?;
        let (channel, driver) = Channel::host(port, "bench", self.cancel.child_token());
        tokio::spawn(driver);
        Ok(channel)
    }

    async fn ask(&self, agent: &Channel, request: &AgentRequest) -> Result<AgentResponse, LabError> {
        let exchange = async {
            let mut stream = agent.open().await.map_err(|error| failed("reach the agent", &error))?;
            let broken = |error| failed("ask the agent", &error);
            send_message(&mut stream, request, MAX_MESSAGE).await.map_err(broken)?;
            recv_message(&mut stream, MAX_MESSAGE).await.map_err(broken)
        };
        timeout(LIMIT, exchange).await.map_err(|_| self.promise("its agent does not answer"))?
    }

    /// What the shell on the console answers. It is asked again as long as there is none.
    async fn shell(&self, command: &str) -> Result<String, LabError> {
        let mut console = self.vm.connect_console().await.map_err(|error| failed("reach the console", &error))?;
        // What is typed is echoed: only what the shell makes of it has no quotes.
        let line = format!("\necho beg\"\"in; {command}; echo fin\"\"ish\n");
        let (mut said, began) = (String::new(), Instant::now());
        while began.elapsed() < LIMIT {
            console.write_all(line.as_bytes()).await.map_err(LabError::io("type on the console"))?;
            if let Some(answer) = hear(&mut console, &mut said).await? {
                return Ok(answer);
            }
        }
        Err(self.promise(&format!("its console says only: {said}")))
    }
}

/// Listens for an answer; for a few seconds only until it has begun.
async fn hear(console: &mut Console, said: &mut String) -> Result<Option<String>, LabError> {
    let mut buffer = [0; 4096];
    loop {
        let begun = said.split_once("begin\r\n").map(|(_, after)| after);
        if let Some((answer, _)) = begun.and_then(|after| after.split_once("finish\r\n")) {
            return Ok(Some(answer.trim().to_owned()));
        }
        let patience = if begun.is_some() { LIMIT } else { Duration::from_secs(3) };
        match timeout(patience, console.read(&mut buffer)).await {
            Err(_) => return Ok(None),
            Ok(Ok(0)) => return Err(LabError::Promise("the console closed".into())),
            Ok(Ok(length)) => said.push_str(&String::from_utf8_lossy(&buffer[..length])),
            Ok(Err(error)) => return Err(LabError::io("read the console")(error)),
        }
    }
}

/// A guest's state, saved where it has no secrets yet.
pub(super) struct Template {
    spec: VmSpec,
    state: PathBuf,
}

impl Template {
    /// Boots a guest, saves it and ends it, as the manager does.
    pub(super) async fn make(bench: &Bench<'_>, folder: &Path) -> Result<Self, LabError> {
        let spec = spec(bench, folder, MEMORY, Begin::BootToSave);
        create_data_disk(&spec.data_disk, DISK).await.map_err(|error| failed("make a disk", &error))?;
        let guest = Guest::start(spec.clone()).await?;
        let agent = guest.agent().await?;
        let began = Instant::now();
        for last in [false, true] {
            while !matches!(guest.ask(&agent, &AgentRequest::Seal).await?, AgentResponse::Done) {
                if began.elapsed() > LIMIT {
                    return Err(guest.promise("its controller does not come to the gate"));
                }
                sleep(Duration::from_millis(250)).await;
            }
            if !last {
                settled(guest.vm.pid(), SETTLE).await;
            }
        }
        let state = folder.join("state");
        guest.vm.save(&state).await.map_err(|error| failed("save a guest", &error))?;
        guest.vm.quit(Duration::from_secs(5)).await;
        Ok(Self { spec, state })
    }

    pub(super) fn state_mib(&self) -> Result<f64, LabError> {
        let meta = fs::metadata(&self.state).map_err(LabError::io("measure the saved state"))?;
        Ok(meta.len() as f64 / f64::from(1 << 20))
    }
}

fn spec(bench: &Bench<'_>, folder: &Path, memory: u64, begin: Begin) -> VmSpec {
    VmSpec {
        dir: folder.join("vm"),
        name: "bench".into(),
        image: bench.files.clone(),
        data_disk: folder.join("data.ext4"),
        passphrase: None,
        memory: ByteSize::from_mib(memory),
        cpus: 1,
        // What there is without KVM; the plain Debian is emulated, too.
        accelerator: AccelKind::Tcg,
        forwards: Vec::new(),
        qemu: Qemu::Search,
        begin,
    }
}

/// A boot on an empty disk: agent, services, memory.
pub(super) async fn boot(bench: &Bench<'_>, folder: &Path, results: &mut Results) -> Result<(), LabError> {
    let spec = spec(bench, folder, MEMORY, Begin::Boot);
    create_data_disk(&spec.data_disk, DISK).await.map_err(|error| failed("make a disk", &error))?;
    let began = Instant::now();
    let guest = Guest::start(spec).await?;
    let agent = guest.agent().await?;
    let answer = guest.ask(&agent, &AgentRequest::Ping).await?;
    let (answered, whole) = (guest.age()?, began.elapsed());
    results.add(Key::BootAgent, millis(answered));
    results.add(Key::BeforeQemu, millis(whole.saturating_sub(answered)));
    let AgentResponse::Pong { uptime_ms, .. } = answer else { return Err(guest.promise("a wrong answer")) };
    results.add(Key::BootServices, services(&guest, answered, uptime_ms).await?);
    settled(guest.vm.pid(), SETTLE).await;
    let (rss, pss) = guest.memory()?;
    results.add(Key::Rss, rss);
    results.add(Key::Pss, pss);
    Ok(())
}

/// When all services were up, as the guest noted it itself: whoever asks earlier slows them down. Milliseconds after QEMU's start.
async fn services(guest: &Guest, at: Duration, uptime_ms: u64) -> Result<f64, LabError> {
    let wait = "until systemctl -q is-active multi-user.target; do sleep 1; done";
    let noted =
        guest.shell(&format!("{wait}; systemctl show -P ActiveEnterTimestampMonotonic multi-user.target")).await?;
    let noted = noted.lines().last().and_then(|line| line.trim().parse::<f64>().ok());
    let noted = noted.ok_or_else(|| guest.promise("systemd does not say when it was through"))?;
    Ok(millis(at) - uptime_ms as f64 + noted / 1000.0)
}

/// A guest that goes on from the template, renewed as the manager does it.
pub(super) async fn restore(
    bench: &Bench<'_>,
    template: &Template,
    folder: &Path,
    results: &mut Results,
) -> Result<(), LabError> {
    let spec = VmSpec { begin: Begin::Saved(template.state.clone()), ..spec(bench, folder, MEMORY, Begin::Boot) };
    let began = Instant::now();
    copy_data_disk(&template.spec.data_disk, &spec.data_disk).map_err(|error| failed("copy a disk", &error))?;
    results.add(Key::CopyDisk, millis(began.elapsed()));
    let began = Instant::now();
    let guest = Guest::start(spec).await?;
    results.add(Key::RestoreMonitor, millis(guest.age()?));
    let agent = guest.agent().await?;
    let _ = agent.started().await;
    results.add(Key::RestoreChannel, millis(guest.age()?));
    guest.ask(&agent, &AgentRequest::Ping).await?;
    let (answered, whole) = (guest.age()?, began.elapsed());
    results.add(Key::RestoreAgent, millis(answered));
    results.add(Key::BeforeQemu, millis(whole.saturating_sub(answered)));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let now = Timestamp::from_millis(u64::try_from(now).unwrap_or_default());
    // A guest for a moment, on no network that matters: what it is renewed with need not be secret.
    let renewal = Renewal { now, entropy: vec![1; ENTROPY] };
    guest.ask(&agent, &AgentRequest::Renew(renewal.into())).await?;
    results.add(Key::RestoreRenewed, millis(guest.age()?));
    settled(guest.vm.pid(), SETTLE).await;
    let (rss, pss) = guest.memory()?;
    results.add(Key::RestoredRss, rss);
    results.add(Key::RestoredPss, pss);
    Ok(())
}

/// Memory that is written and freed in a guest, and what of it the base OS gets back.
pub(super) async fn give_back(bench: &Bench<'_>, folder: &Path, results: &mut Results) -> Result<(), LabError> {
    let spec = spec(bench, folder, 2 * MEMORY, Begin::Boot);
    create_data_disk(&spec.data_disk, DISK).await.map_err(|error| failed("make a disk", &error))?;
    let guest = Guest::start(spec).await?;
    guest.shell("until systemctl -q is-active multi-user.target; do sleep 1; done").await?;
    settled(guest.vm.pid(), SETTLE).await;
    let (before, _) = guest.memory()?;
    let write = format!(
        "mount -t tmpfs -o size={}m none /mnt && dd if=/dev/zero of=/mnt/big bs=1M count={FREED} 2>/dev/null",
        FREED + 10
    );
    guest.shell(&write).await?;
    let (full, _) = guest.memory()?;
    guest.shell("rm /mnt/big").await?;
    let freed = Instant::now();
    let mut least = full;
    let mut took = RETURN;
    while freed.elapsed() < RETURN {
        sleep(Duration::from_millis(250)).await;
        let (now, _) = guest.memory()?;
        least = least.min(now);
        if full - least > 0.9 * FREED as f64 {
            took = freed.elapsed();
            break;
        }
    }
    results.add(Key::Written, full - before);
    results.add(Key::GivenBack, full - least);
    results.add(Key::GivenBackAfter, millis(took));
    Ok(())
}

fn failed(what: &str, error: &dyn std::error::Error) -> LabError {
    LabError::Promise(format!("cannot {what}: {error}"))
}
