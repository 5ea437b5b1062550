//! The services that this machine runs for its clan: started here, checked here, announced in the beacon.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use clan_types::ServiceName;
use clan_wire::beacon::{ServiceKind, ServiceOffer};
use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{core::CoreHandle, helm::Helm, host::Starter, sockets};

const CHECK_LIMIT: Duration = Duration::from_secs(5);
const CHECK_HEALTHY: Duration = Duration::from_secs(5);
const CHECK_UNHEALTHY: Duration = Duration::from_millis(300);

/// A service that the image brings along.
struct Known {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    /// The same, where there is no systemd.
    program: &'static [&'static str],
    kind: ServiceKind,
    port: u16,
}

const KNOWN: [Known; 1] = [Known {
    name: "web",
    title: "Welcome page",
    unit: "nginx.service",
    program: &["nginx", "-g", "daemon off;"],
    kind: ServiceKind::Http,
    port: 80,
}];
/// Before a program that ended is started again, and for one to end that was told to.
const PAUSE: Duration = Duration::from_secs(1);
const WEB_ROOT: &str = "/var/lib/clan/www";

/// The services that the image has.
pub(crate) fn known() -> Vec<ServiceName> {
    KNOWN.iter().filter_map(|known| known.name.parse().ok()).collect()
}

/// Runs the services that are wanted, and no others, and keeps the beacon true about them.
pub(crate) async fn run(helm: Arc<Helm>, core: CoreHandle, starter: Starter, cancel: CancellationToken) {
    let mut hands = match starter {
        Starter::Systemd => Hands::Systemd,
        Starter::Controller => Hands::Own(HashMap::new()),
    };
    serve(&helm, &core, &mut hands, &cancel).await;
    hands.let_go().await;
}

/// Until cancelled.
async fn serve(helm: &Helm, core: &CoreHandle, hands: &mut Hands, cancel: &CancellationToken) {
    let (mut changed, mut running) = (helm.watch(), Vec::new());
    loop {
        changed.mark_unchanged();
        let wanted = helm.services();
        let known = find(&wanted);
        if running != wanted {
            switch(&find(&running), &known, core, hands).await;
            running = wanted;
        }
        if known.is_empty() {
            core.change_own(|own| own.services = Vec::new()).await;
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = changed.changed() => continue,
            }
        }
        let mut offers = Vec::new();
        for (name, service) in &known {
            let healthy = timeout(CHECK_LIMIT, answers(service)).await.unwrap_or(false);
            offers.push(ServiceOffer {
                name: name.clone(),
                title: service.title.to_owned(),
                kind: service.kind,
                port: service.port,
                healthy,
            });
        }
        let pause = if offers.iter().all(|o| o.healthy) { CHECK_HEALTHY } else { CHECK_UNHEALTHY };
        core.change_own(move |own| own.services = offers).await;
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = changed.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

fn find(wanted: &[ServiceName]) -> Vec<(ServiceName, &'static Known)> {
    let find = |name: &ServiceName| {
        let known = KNOWN.iter().find(|known| known.name == name.as_str());
        if known.is_none() {
            tracing::warn!(service = %name, "this image has no such service");
        }
        Some((name.clone(), known?))
    };
    wanted.iter().filter_map(find).collect()
}

/// Stops what is wanted no more, and starts what is wanted now.
async fn switch(
    before: &[(ServiceName, &Known)],
    after: &[(ServiceName, &Known)],
    core: &CoreHandle,
    hands: &mut Hands,
) {
    let lacks = |all: &[(ServiceName, &Known)], name: &ServiceName| all.iter().all(|(other, _)| other != name);
    for (_, service) in before.iter().filter(|(name, _)| lacks(after, name)) {
        hands.stop(service).await;
    }
    if after.is_empty() {
        return;
    }
    if let Err(error) = write_page(core, Path::new(WEB_ROOT)).await {
        tracing::error!(%error, "the welcome page could not be written");
    }
    for (_, service) in after.iter().filter(|(name, _)| lacks(before, name)) {
        hands.start(service).await;
    }
}

/// What starts and stops services.
enum Hands {
    Systemd,
    /// Programs that run, by the names of their services, each with what ends it.
    Own(HashMap<&'static str, (CancellationToken, JoinHandle<()>)>),
}

impl Hands {
    async fn start(&mut self, service: &Known) {
        match self {
            Self::Systemd => systemctl("start", service.unit).await,
            Self::Own(programs) => {
                let over = CancellationToken::new();
                let program = tokio::spawn(keep(service.program, over.clone()));
                programs.insert(service.name, (over, program));
            }
        }
    }

    async fn stop(&mut self, service: &Known) {
        match self {
            Self::Systemd => systemctl("stop", service.unit).await,
            Self::Own(programs) => {
                if let Some((over, program)) = programs.remove(service.name) {
                    over.cancel();
                    let _ = program.await;
                }
            }
        }
    }

    /// Ends what would not go on by itself.
    async fn let_go(self) {
        let Self::Own(programs) = self else { return };
        for (over, program) in programs.into_values() {
            over.cancel();
            let _ = program.await;
        }
    }
}

/// Keeps a program running until cancelled, and ends it then.
async fn keep(program: &'static [&'static str], over: CancellationToken) {
    let Some((name, args)) = program.split_first() else { return };
    loop {
        sockets::still().await;
        match Command::new(name).args(args).stdin(Stdio::null()).kill_on_drop(true).spawn() {
            Ok(mut child) => tokio::select! {
                () = over.cancelled() => return end(child).await,
                ended = child.wait() => tracing::warn!(name, ?ended, "a service ended"),
            },
            Err(error) => tracing::error!(name, %error, "a service could not be started"),
        }
        tokio::select! {
            () = over.cancelled() => return,
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

async fn end(mut child: Child) {
    if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
    let _ = timeout(PAUSE, child.wait()).await;
}

async fn systemctl(verb: &str, unit: &str) {
    sockets::still().await;
    match Command::new("systemctl").args([verb, "--no-block", unit]).status().await {
        Ok(status) if status.success() => tracing::info!(unit, verb, "told a service"),
        Ok(status) => tracing::error!(unit, verb, %status, "a service did not do as it was told"),
        Err(error) => tracing::error!(unit, %error, "systemctl could not be run"),
    }
}

async fn answers(service: &Known) -> bool {
    let Ok(mut stream) = TcpStream::connect(("::1", service.port)).await else { return false };
    match service.kind {
        ServiceKind::Tcp => true,
        ServiceKind::Http => {
            let request = b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n";
            let mut head = [0u8; 12];
            stream.write_all(request).await.is_ok()
                && stream.read_exact(&mut head).await.is_ok()
                && head.starts_with(b"HTTP/1.")
                && head[9] < b'5'
        }
    }
}

/// The page that the `web` service shows until its owner puts their own there.
async fn write_page(core: &CoreHandle, root: &Path) -> std::io::Result<()> {
    let view = core.view();
    let machine = view.state.machine_in_good_standing(&view.machine).map(|m| m.name.to_string()).unwrap_or_default();
    let page = page(view.clan_name.as_str(), &machine);
    let root = PathBuf::from(root);
    tokio::fs::create_dir_all(&root).await?;
    tokio::fs::write(root.join("index.html.new"), page).await?;
    tokio::fs::rename(root.join("index.html.new"), root.join("index.html")).await
}

/// Names are DNS labels: nothing in them needs escaping.
fn page(clan: &str, machine: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{clan}</title>\n<style>\nbody{{font:1.1rem/1.6 system-ui,sans-serif;max-width:36rem;margin:18vh auto;padding:0 1.5rem;\
         color:#1c2430;background:#f6f7f9}}\nh1{{font-size:2.4rem;margin:0}}\n\
         @media(prefers-color-scheme:dark){{body{{color:#e6e9ee;background:#14181f}}}}\n</style>\n\
         <h1>{clan}</h1>\n<p>You are looking at a page that the machine <strong>{machine}</strong> serves to the clan \
         <strong>{clan}</strong>. Nobody outside can see it.</p>\n</html>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_the_clan_and_the_machine() {
        let page = page("family", "founder");
        assert!(page.contains("<h1>family</h1>") && page.contains("<strong>founder</strong>"));
    }
}
