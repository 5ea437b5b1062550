//! Everything that the web page shows, from what is known now.

use clan_api::{
    AcceleratorInfo, AcceleratorKind, ApiProblem, ClanInfo, ClanPhase, ErrorCode, Flavour, HealthProblem, HostInfo,
    MachineInfo, PathInfo, PathKind, PersonInfo, Pong, PublishedImage, ServiceInfo, ServiceKind, Severity, StatsPoint,
    Status, UnitInfo, VmInfo, VmState, VmStats,
};
use clan_ledger::Published;
use clan_types::{ByteSize, PersonId, Timestamp};
use clan_vm::{AccelKind, probe};
use clan_wire::{beacon, control};
use futures_util::future::join_all;

use crate::{
    clan::{Clan, fingerprint},
    guest::{self, short},
    link::Told,
    manager::Shared,
    paths::Paths,
    problem,
    record::{self, Phase},
    tasks::now,
};

/// Tasks that the page lists.
const MAX_TASKS: usize = 30;
/// Names that are told to whoever named none of them.
const MAX_NAMES: usize = 12;
const LOW_DISK: ByteSize = ByteSize::from_mib(512);

/// Everything in one.
pub(crate) async fn status(shared: &Shared) -> Status {
    let clans = shared.clans();
    let host = host(&shared.paths);
    let accelerator = accelerator(shared).await;
    let mut tasks = shared.tasks.list();
    tasks.truncate(MAX_TASKS);
    let mut problems = shared.problems();
    if host.disk_available < LOW_DISK {
        problems.push(HealthProblem {
            severity: Severity::Warning,
            clan: None,
            message: format!(
                "Only {} of disk are free where {} is.",
                host.disk_available,
                shared.paths.root().display()
            ),
            hints: vec!["free some space".into()],
        });
    }
    let seen = join_all(clans.iter().map(|clan| clan.seen())).await;
    for (clan, seen) in clans.iter().zip(&seen) {
        problems.extend(clan_problems(clan, seen.as_ref()));
    }
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        data_dir: shared.paths.root().display().to_string(),
        now: now(),
        host,
        accelerator,
        clans: clans.iter().zip(&seen).map(|(clan, seen)| info(clan, seen.as_ref())).collect(),
        vms: clans.iter().zip(&seen).map(|(c, seen)| vm_info(shared, c, seen.as_ref())).collect(),
        tasks,
        problems,
    }
}

fn clan_problems(clan: &Clan, seen: Option<&Told>) -> Vec<HealthProblem> {
    let view = clan.keeper.view();
    let mut problems = Vec::new();
    let name = clan.name();
    if let Some(problem) = view.problem {
        let severity = if view.state == VmState::Failed { Severity::Error } else { Severity::Warning };
        problems.push(HealthProblem {
            severity,
            clan: Some(name.clone()),
            message: match problem.why {
                Some(why) if clan.record.get().is_integrated() => format!("{}: {why}", problem.message),
                _ => problem.message,
            },
            hints: problem.hints,
        });
    }
    if let Some(exposure) = view.exposure {
        problems.push(HealthProblem {
            severity: Severity::Warning,
            clan: Some(name.clone()),
            message: format!("{name}: {}", exposure.why),
            hints: vec![exposure.remedy],
        });
    }
    if view.pid.is_some() && clan.record.is_locked() {
        problems.push(HealthProblem {
            severity: Severity::Warning,
            clan: Some(name.clone()),
            message: format!("{name}: its disk is encrypted, and this manager does not know the passphrase: when the VM ends, it does not start again"),
            hints: vec!["unlock it: `clan vm unlock`".into()],
        });
    }
    for message in seen.iter().flat_map(|told| &told.status.problems).take(20) {
        problems.push(HealthProblem {
            severity: Severity::Warning,
            clan: Some(name.clone()),
            message: short(message),
            hints: Vec::new(),
        });
    }
    problems
}

/// Memory of this computer: all of it, and what programs could have now.
pub(crate) fn memory() -> (ByteSize, ByteSize) {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |label: &str| {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(label));
        let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        ByteSize::from_bytes(kib.saturating_mul(1024))
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

/// This computer.
pub(crate) fn host(paths: &Paths) -> HostInfo {
    let (memory_total, memory_available) = memory();
    HostInfo {
        name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)),
        memory_total,
        memory_available,
        disk_available: problem::available(paths.root()).unwrap_or_default(),
    }
}

/// How VMs run here.
pub(crate) async fn accelerator(shared: &Shared) -> AcceleratorInfo {
    let verdict = probe::accelerator(&shared.paths.cache()).await;
    let reason = match verdict.remedy {
        Some(remedy) => format!("{} {remedy}", verdict.reason),
        None => verdict.reason,
    };
    AcceleratorInfo { kind: kind(verdict.kind), reason }
}

fn kind(kind: AccelKind) -> AcceleratorKind {
    match kind {
        AccelKind::Kvm => AcceleratorKind::Kvm,
        AccelKind::Tcg => AcceleratorKind::Tcg,
    }
}

/// All clans.
pub(crate) async fn clans(shared: &Shared) -> Vec<ClanInfo> {
    let clans = shared.clans();
    join_all(clans.iter().map(|clan| clan_info(clan))).await
}

/// A clan.
pub(crate) async fn clan_info(clan: &Clan) -> ClanInfo {
    info(clan, clan.seen().await.as_ref())
}

fn info(clan: &Clan, seen: Option<&Told>) -> ClanInfo {
    let (record, person) = (clan.record.get(), clan.person());
    let status = seen.map(|told| told.status.as_ref());
    let mut machines: Vec<MachineInfo> =
        status.map(|s| s.machines.iter().map(|m| machine(m, s)).collect()).unwrap_or_default();
    machines.sort_by(|a, b| (!a.this, &a.name).cmp(&(!b.this, &b.name)));
    ClanInfo {
        id: record.id,
        fingerprint: fingerprint(&record.id),
        phase: match record.phase {
            Phase::Creating => ClanPhase::Creating,
            Phase::Joining => ClanPhase::Joining,
            Phase::Ready => ClanPhase::Ready,
            Phase::Leaving | Phase::Removing => ClanPhase::Leaving,
        },
        person,
        role: status.and_then(|s| s.people.iter().find(|p| p.id == person)).map(|p| p.role),
        machine_name: record.machine,
        online: clan.keeper.control().is_some(),
        as_of: seen.map(|told| told.at),
        people: status.map(|s| people(s, &person)).unwrap_or_default(),
        machines,
        services: status.map(|s| s.services.iter().map(|v| service(v, s)).collect()).unwrap_or_default(),
        problems: status.map(|s| s.problems.iter().take(50).map(|p| short(p)).collect()).unwrap_or_default(),
        name: record.name,
    }
}

fn people(status: &control::NodeStatus, this: &PersonId) -> Vec<PersonInfo> {
    let info = |person: &control::PersonStatus, waiting: bool| PersonInfo {
        id: person.id,
        name: person.name.clone(),
        role: person.role,
        this: person.id == *this,
        waiting,
    };
    let waiting = status.pending.iter().map(|person| info(person, true));
    status.people.iter().map(|person| info(person, false)).chain(waiting).collect()
}

fn machine(machine: &control::MachineStatus, status: &control::NodeStatus) -> MachineInfo {
    MachineInfo {
        id: machine.id,
        name: machine.name.clone(),
        owner: machine.owner,
        owner_name: status.people.iter().find(|p| p.id == machine.owner).map(|p| p.name.clone()),
        address: machine.address,
        host_name: format!("{}.{}.clan", machine.name, status.clan_name),
        this: machine.this,
        path: machine.path.as_ref().map(path),
        last_seen: machine.last_seen,
        version: machine.version.as_deref().map(short),
        behind: machine
            .behind
            .and_then(|via| status.machines.iter().find(|front| front.id == via).map(|front| front.name.clone())),
        control_mode: machine.control.map(Into::into),
        image: machine.image,
    }
}

/// Sends one echo to a machine, through the clan's machine here.
pub(crate) async fn ping(clan: &Clan, text: &str) -> Result<Pong, ApiProblem> {
    let status = clan.state().await?;
    let found = find_machine(&status, text)?;
    let control = clan.control().map_err(|e| problem::guest(&e))?;
    let request = control::ControlRequest::Ping { machine: found.id };
    match guest::open(&control, &request, guest::PATIENCE).await {
        Ok((_, control::ControlResponse::Pong { rtt_us, path: way })) => {
            let info = machine(found, &status);
            let path = way.as_ref().map(path);
            Ok(Pong {
                machine: info.id,
                name: info.name,
                host_name: info.host_name,
                address: info.address,
                rtt_us,
                path,
            })
        }
        Ok(_) => Err(problem::guest(&guest::GuestError::Unexpected { what: "send an echo" })),
        Err(error) => Err(problem::guest(&error)),
    }
}

/// The machine of a name, plain or as the name service has it (`desk.family.clan`), or of an id.
pub(crate) fn find_machine<'a>(
    status: &'a control::NodeStatus,
    text: &str,
) -> Result<&'a control::MachineStatus, ApiProblem> {
    let wanted = text.trim().trim_end_matches('.').to_ascii_lowercase();
    let zone = format!(".{}.clan", status.clan_name);
    let name = wanted.strip_suffix(&zone).unwrap_or(&wanted);
    let found = status.machines.iter().find(|m| m.name.as_str() == name || m.id.to_string() == wanted);
    found.ok_or_else(|| {
        let names: Vec<&str> = status.machines.iter().map(|m| m.name.as_str()).take(MAX_NAMES).collect();
        ApiProblem::new(
            ErrorCode::NotFound,
            format!("the clan {} has no machine called `{}`", status.clan_name, short(text)),
        )
        .hint(format!("there is: {}", names.join(", ")))
        .hint("see all: `clan machines`")
    })
}

fn path(path: &control::PathStatus) -> PathInfo {
    PathInfo {
        kind: match path.kind {
            control::PathKind::Local => PathKind::Local,
            control::PathKind::Direct => PathKind::Direct,
            control::PathKind::QuicDirect => PathKind::QuicDirect,
            control::PathKind::Relayed => PathKind::Relayed,
        },
        remote: path.remote,
        rtt_us: path.rtt_us,
        why: short(&path.why),
    }
}

fn service(service: &control::ServiceStatus, status: &control::NodeStatus) -> ServiceInfo {
    ServiceInfo {
        name: service.name.clone(),
        title: short(&service.title),
        kind: match service.kind {
            beacon::ServiceKind::Http => ServiceKind::Http,
            beacon::ServiceKind::Tcp => ServiceKind::Tcp,
        },
        machine: service.machine.clone(),
        port: service.port,
        host_name: format!("{}.{}.clan", service.name, status.clan_name),
        healthy: service.healthy,
    }
}

/// A VM.
pub(crate) fn vm_info(shared: &Shared, clan: &Clan, seen: Option<&Told>) -> VmInfo {
    let (record, view) = (clan.record.get(), clan.keeper.view());
    let disk_used = std::fs::metadata(clan.record.paths().data_disk()).map(|m| {
        use std::os::unix::fs::MetadataExt;
        m.blocks().saturating_mul(512)
    });
    // What an earlier run of the VM measured is history.
    let running = matches!(view.state, VmState::Running | VmState::Stopping);
    // The controller's word counts: it is the one that enforces it.
    let control = seen.map_or(record.control, |told| told.status.control);
    let published = clan.record.memory().published().and_then(|published| other_image(&record, &published));
    VmInfo {
        id: record.id,
        published,
        task: shared.tasks.running_on(&record.name).map(|t| t.id),
        clan: record.name,
        machine: record.machine,
        flavour: match record.flavour {
            record::Flavour::Vm => Flavour::Vm,
            record::Flavour::Container => Flavour::Container,
            record::Flavour::Integrated { .. } => Flavour::Integrated,
        },
        socket: match record.flavour {
            record::Flavour::Vm | record::Flavour::Container => None,
            record::Flavour::Integrated { socket } => Some(socket.display().to_string()),
        },
        state: view.state,
        reason: view.problem.map(|p| match p.why {
            Some(why) => format!("{}: {why}", p.message),
            None => p.message,
        }),
        since: view.since,
        wanted: record.wanted,
        restarts: view.restarts,
        pid: view.pid,
        accelerator: view.accelerator.map(kind),
        exposure: view.exposure.map(|e| format!("{} {}", e.why, e.remedy)),
        unlimited: view.unlimited,
        memory: record.memory,
        cpus: u32::from(record.cpus),
        disk: record.disk,
        encrypted: record.encrypted,
        locked: clan.record.is_locked(),
        disk_used: ByteSize::from_bytes(disk_used.unwrap_or(0)),
        image: record.image,
        quic_port: record.ports.quic,
        wireguard_port: record.ports.wireguard,
        control_mode: control.into(),
        stats: if running { clan.keeper.with_stats(|s| s.points.back().map(point)) } else { None },
    }
}

/// What a clan publishes, if the machine here runs another image.
fn other_image(record: &record::ClanRecord, published: &Published) -> Option<PublishedImage> {
    let description = &published.description;
    let runs = record.image.filter(|_| record.phase == Phase::Ready && !record.is_integrated())?;
    (runs != description.image)
        .then(|| PublishedImage { image: description.image, title: short(description.title.as_str()) })
}

/// A VM's statistics.
pub(crate) fn vm_stats(clan: &Clan) -> VmStats {
    clan.keeper.with_stats(|stats| VmStats {
        latest: stats.points.back().map(point),
        history: stats.points.iter().map(point).collect(),
        units: stats
            .points
            .back()
            .map(|(_, s)| s.units.iter().map(|u| UnitInfo { name: short(&u.name), state: short(&u.state) }).collect())
            .unwrap_or_default(),
    })
}

fn point((at, stats): &(Timestamp, control::GuestStats)) -> StatsPoint {
    StatsPoint { at: *at, ..point_of(stats) }
}

/// What a guest measured, at its own time.
pub(crate) fn point_of(stats: &control::GuestStats) -> StatsPoint {
    StatsPoint {
        at: stats.at,
        cpu_permille: stats.cpu_permille.min(1000),
        memory_total: stats.memory_total,
        memory_used: stats.memory_used,
        disk_total: stats.disk_total,
        disk_used: stats.disk_used,
        net_received: stats.net_received,
        net_sent: stats.net_sent,
        uptime_s: stats.uptime_s,
    }
}

#[cfg(test)]
mod tests {
    use clan_ledger::VmDescription;
    use clan_types::ImageId;

    use super::*;
    use crate::record::{ClanRecord, Flavour, tests::record};

    #[test]
    fn another_image_is_told_to_those_who_could_run_it_and_do_not() {
        let (old, new) = (ImageId::from_bytes([1; 32]), ImageId::from_bytes([2; 32]));
        let description = VmDescription {
            image: new,
            title: "newer".parse().unwrap(),
            memory: ByteSize::from_mib(128),
            cpus: 1,
            disk: ByteSize::from_mib(64),
        };
        let (network, applications, by) = (Default::default(), Default::default(), PersonId::from_bytes([3; 32]));
        let published = Published { description, network, applications, by };
        let told = |record: &ClanRecord| other_image(record, &published).map(|other| other.image);
        let runs = ClanRecord { image: Some(old), ..record(1, Phase::Ready) };
        assert_eq!(told(&runs), Some(new));
        assert_eq!(told(&ClanRecord { flavour: Flavour::Container, ..runs.clone() }), Some(new));
        assert_eq!(told(&ClanRecord { image: Some(new), ..runs.clone() }), None);
        assert_eq!(told(&ClanRecord { image: None, ..runs.clone() }), None);
        assert_eq!(told(&ClanRecord { phase: Phase::Leaving, ..runs.clone() }), None);
        let socket = "/run/clan/controller.sock".into();
        assert_eq!(told(&ClanRecord { flavour: Flavour::Integrated { socket }, ..runs }), None);
    }
}
