use std::net::{Ipv6Addr, SocketAddr};

use clan_types::{
    ByteSize, ClanId, ClanName, ImageId, MachineId, MachineName, PersonId, PersonName, Role, ServiceName, Timestamp,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{TaskId, TaskInfo};

/// Everything that the web page and `clan status` show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Program version of the manager.
    pub version: String,
    /// The manager's data directory.
    pub data_dir: String,
    /// When this was taken, by the manager's clock.
    #[schema(value_type = u64)]
    pub now: Timestamp,
    /// This computer.
    pub host: HostInfo,
    /// How VMs run on this computer, and why so.
    pub accelerator: AcceleratorInfo,
    /// The clans that this computer is in, by name.
    pub clans: Vec<ClanInfo>,
    /// Their VMs, in the same order.
    pub vms: Vec<VmInfo>,
    /// Running and recent tasks, newest first, without their log lines.
    pub tasks: Vec<TaskInfo>,
    /// What needs attention.
    pub problems: Vec<HealthProblem>,
}

/// The base OS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    /// Host name.
    pub name: String,
    /// Processors.
    pub cpus: u32,
    /// Memory.
    #[schema(value_type = u64)]
    pub memory_total: ByteSize,
    /// Memory that programs can still take.
    #[schema(value_type = u64)]
    pub memory_available: ByteSize,
    /// Free space where the data directory is.
    #[schema(value_type = u64)]
    pub disk_available: ByteSize,
}

/// How VMs run on this computer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AcceleratorInfo {
    /// Which one is used.
    pub kind: AcceleratorKind,
    /// Why; one sentence.
    pub reason: String,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AcceleratorKind {
    /// The processor, by the kernel's KVM.
    Kvm,
    /// QEMU's emulation: works everywhere, slowly.
    Tcg,
}

/// How far a clan has come on this computer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClanPhase {
    /// It is being founded here.
    Creating,
    /// This computer is being admitted.
    Joining,
    /// This computer is in it.
    Ready,
    /// This computer is leaving it.
    Leaving,
}

/// A clan that this computer is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClanInfo {
    /// Id.
    #[schema(value_type = String)]
    pub id: ClanId,
    /// Name.
    #[schema(value_type = String)]
    pub name: ClanName,
    /// Short grouped text of the id, to compare by eye.
    pub fingerprint: String,
    /// How far it has come here.
    pub phase: ClanPhase,
    /// Who this computer's user is in it.
    #[schema(value_type = String)]
    pub person: PersonId,
    /// Their role, once known.
    #[schema(value_type = Option<String>)]
    pub role: Option<Role>,
    /// This computer's machine in it.
    #[schema(value_type = String)]
    pub machine_name: MachineName,
    /// Whether the VM's controller answers now; if not, what follows is as of `as_of`.
    pub online: bool,
    /// When the controller last told the following.
    #[schema(value_type = Option<u64>)]
    pub as_of: Option<Timestamp>,
    /// Its people.
    pub people: Vec<PersonInfo>,
    /// Its machines, this one first.
    pub machines: Vec<MachineInfo>,
    /// What they offer.
    pub services: Vec<ServiceInfo>,
    /// What the controller says needs attention, one sentence each.
    pub problems: Vec<String>,
}

/// A person of a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PersonInfo {
    /// Key.
    #[schema(value_type = String)]
    pub id: PersonId,
    /// Name.
    #[schema(value_type = String)]
    pub name: PersonName,
    /// Role: guest, member, admin or owner.
    #[schema(value_type = String)]
    pub role: Role,
    /// Whether it is this computer's user.
    pub this: bool,
    /// Has redeemed an invite that asks for approval, and is not in yet: see `clan approve`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waiting: bool,
}

/// A machine of a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineInfo {
    /// Key.
    #[schema(value_type = String)]
    pub id: MachineId,
    /// Name.
    #[schema(value_type = String)]
    pub name: MachineName,
    /// Whose it is.
    #[schema(value_type = String)]
    pub owner: PersonId,
    /// Name of its owner, if known.
    #[schema(value_type = Option<String>)]
    pub owner_name: Option<PersonName>,
    /// Address in the mesh.
    #[schema(value_type = String)]
    pub address: Ipv6Addr,
    /// Host name in the mesh: `<machine>.<clan>.clan`.
    pub host_name: String,
    /// Whether it is this computer's VM.
    pub this: bool,
    /// How it is reached; absent while it is not.
    pub path: Option<PathInfo>,
    /// When it was last heard of.
    #[schema(value_type = Option<u64>)]
    pub last_seen: Option<Timestamp>,
    /// Program version, if known.
    pub version: Option<String>,
    /// Name of the machine that speaks the mesh for it, if it is a standard WireGuard machine.
    #[schema(value_type = Option<String>)]
    pub behind: Option<MachineName>,
    /// Who may steer it, as it says itself, if known.
    #[serde(default)]
    pub control_mode: Option<ControlMode>,
    /// The image that it runs, if it is known to run one.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub image: Option<ImageId>,
}

/// How a machine is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathInfo {
    /// Which kind of path carries the packets.
    pub kind: PathKind,
    /// Remote address, if the path has one.
    #[schema(value_type = Option<String>)]
    pub remote: Option<SocketAddr>,
    /// Round trip in microseconds, if measured.
    pub rtt_us: Option<u64>,
    /// Why this path and no better one.
    pub why: String,
}

/// Kinds of path, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathKind {
    /// The machine itself.
    Local,
    /// WireGuard over plain UDP.
    Direct,
    /// WireGuard inside a direct QUIC connection.
    QuicDirect,
    /// WireGuard inside a QUIC connection through a relay.
    Relayed,
}

/// A service of a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServiceInfo {
    /// Name.
    #[schema(value_type = String)]
    pub name: ServiceName,
    /// One line for people.
    pub title: String,
    /// How it is spoken to; only `http` opens in a browser.
    pub kind: ServiceKind,
    /// Where it runs.
    #[schema(value_type = String)]
    pub machine: MachineName,
    /// TCP port there.
    pub port: u16,
    /// Host name in the mesh: `<service>.<clan>.clan`.
    pub host_name: String,
    /// Whether it works, as far as is known.
    pub healthy: bool,
}

/// How a service is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServiceKind {
    /// HTTP/1.1.
    Http,
    /// Another TCP protocol.
    Tcp,
}

/// What a VM does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Not running.
    Stopped,
    /// Not running, and cannot start: its disk is encrypted, and the manager does not know the passphrase.
    Locked,
    /// Running, its controller does not answer yet.
    Starting,
    /// Running, and its controller answers.
    Running,
    /// Halted by the person; its memory is kept.
    Paused,
    /// On its way down.
    Stopping,
    /// Ended against the person's wish, and not started again; `reason` says why.
    Failed,
}

/// Who may steer a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ControlMode {
    /// This computer's user.
    Local,
    /// The clan's admins.
    Remote,
    /// Both.
    Shared,
}

impl From<clan_types::ControlMode> for ControlMode {
    fn from(mode: clan_types::ControlMode) -> Self {
        match mode {
            clan_types::ControlMode::Local => Self::Local,
            clan_types::ControlMode::Remote => Self::Remote,
            clan_types::ControlMode::Shared => Self::Shared,
        }
    }
}

impl From<ControlMode> for clan_types::ControlMode {
    fn from(mode: ControlMode) -> Self {
        match mode {
            ControlMode::Local => Self::Local,
            ControlMode::Remote => Self::Remote,
            ControlMode::Shared => Self::Shared,
        }
    }
}

/// What a clan's machine is on this computer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Flavour {
    /// A virtual machine.
    #[default]
    Vm,
    /// A container.
    Container,
    /// The computer itself, by a controller that runs on it.
    Integrated,
}

/// A clan's machine on this computer: mostly a VM. Of a container memory, disk and processors bound nothing. Of an integrated one memory, disk, processors, image and ports are
/// those of no VM: zero, and absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Id: that of its clan, as each clan has one VM here.
    #[schema(value_type = String)]
    pub id: ClanId,
    /// Name of its clan.
    #[schema(value_type = String)]
    pub clan: ClanName,
    /// The machine that it is in the clan.
    #[schema(value_type = String)]
    pub machine: MachineName,
    /// What it is.
    #[serde(default)]
    pub flavour: Flavour,
    /// Where the controller of an integrated machine is found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// What it does now.
    pub state: VmState,
    /// Why it is in this state, where that is not plain.
    pub reason: Option<String>,
    /// Since when.
    #[schema(value_type = u64)]
    pub since: Timestamp,
    /// Whether it shall run.
    pub wanted: bool,
    /// How many times it was started again since it last was stable.
    pub restarts: u32,
    /// Process id of QEMU, or of what stands for a container.
    pub pid: Option<u32>,
    /// What executes it, while it runs.
    pub accelerator: Option<AcceleratorKind>,
    /// While it runs: why its guest can reach what listens on this computer's loopback, and what to do about it. Absent
    /// where it cannot.
    #[serde(default)]
    pub exposure: Option<String>,
    /// While it runs: why nothing but a lower priority bounds what it takes of this computer. Absent where its processor time, memory
    /// and processes are bounded.
    #[serde(default)]
    pub unlimited: Option<String>,
    /// Memory of the guest.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// Processors of the guest.
    pub cpus: u32,
    /// Size of its data disk.
    #[schema(value_type = u64)]
    pub disk: ByteSize,
    /// Whether its data disk is encrypted on this computer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    /// Whether the manager does not know the passphrase of that disk: the VM starts only when somebody has said it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub locked: bool,
    /// What the data disk takes on this computer now.
    #[schema(value_type = u64)]
    pub disk_used: ByteSize,
    /// The image it runs.
    #[schema(value_type = Option<String>)]
    pub image: Option<ImageId>,
    /// What the clan publishes, if that is another image. `clan vm update` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<PublishedImage>,
    /// UDP port of this computer that leads to its QUIC endpoint.
    pub quic_port: u16,
    /// UDP port of this computer that leads to its WireGuard socket.
    pub wireguard_port: u16,
    /// Who may steer it.
    pub control_mode: ControlMode,
    /// The latest statistics.
    pub stats: Option<StatsPoint>,
    /// The task that works on it.
    #[schema(value_type = Option<String>)]
    pub task: Option<TaskId>,
}

/// An image that a clan publishes: its newcomers run it, and its machines give it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishedImage {
    /// Which.
    #[schema(value_type = String)]
    pub image: ImageId,
    /// One line for people.
    pub title: String,
}

/// What a guest measured at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatsPoint {
    /// When, by the manager's clock.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// Busy share of all processors, in thousandths.
    pub cpu_permille: u16,
    /// Memory of the guest.
    #[schema(value_type = u64)]
    pub memory_total: ByteSize,
    /// Memory not available to programs.
    #[schema(value_type = u64)]
    pub memory_used: ByteSize,
    /// Size of the data disk's file system.
    #[schema(value_type = u64)]
    pub disk_total: ByteSize,
    /// Of which used.
    #[schema(value_type = u64)]
    pub disk_used: ByteSize,
    /// Bytes received since boot.
    #[schema(value_type = u64)]
    pub net_received: ByteSize,
    /// Bytes sent since boot.
    #[schema(value_type = u64)]
    pub net_sent: ByteSize,
    /// Seconds since boot.
    pub uptime_s: u64,
}

/// A VM's statistics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// The latest, if there is one.
    pub latest: Option<StatsPoint>,
    /// Up to the last ten minutes, oldest first.
    pub history: Vec<StatsPoint>,
    /// Systemd units of interest.
    pub units: Vec<UnitInfo>,
}

/// A systemd unit of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnitInfo {
    /// Such as `nginx.service`.
    pub name: String,
    /// As `systemctl is-active` says.
    pub state: String,
}

/// How pressing a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Things work, but not as well as they could.
    Warning,
    /// Something does not work.
    Error,
}

/// Something that needs attention.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthProblem {
    /// How pressing.
    pub severity: Severity,
    /// The clan that it concerns; absent for the whole computer.
    #[schema(value_type = Option<String>)]
    pub clan: Option<ClanName>,
    /// What is wrong: one sentence.
    pub message: String,
    /// What the person can do.
    pub hints: Vec<String>,
}
