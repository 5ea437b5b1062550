//! The one contract that the command line and the web page share with the manager: data types of the HTTP API, its
//! OpenAPI document, and a client over the manager's Unix socket.
//!
//! All paths start with [`BASE`]. Identifiers are lower-case base32 text, sizes are bytes, times are milliseconds since
//! 1970-01-01T00:00:00Z. Errors are [`ApiProblem`]s (RFC 9457, `application/problem+json`).

mod authority;
mod client;
mod devices;
mod helm;
mod images;
mod mesh;
mod openapi;
mod ping;
mod problem;
mod relays;
mod requests;
mod status;
mod tasks;
mod vms;

pub use authority::{
    AdmissionDecision, AuthorKind, ClanLog, ClanLogEntry, ClanLogQuery, DecideAdmission, InviteInfo, InviteState,
    NamedKind, Rename, Renamed, Revocation, RevocationKind, Revoke, RoleChange, SetRole,
};
pub use client::{ByteStream, ClientError, Console, EventStream, ManagerClient};
pub use devices::{AddDevice, DeviceInfo, DeviceKind, DeviceOffer, RemoveDeviceQuery, RemovedDevice};
pub use helm::{
    ChangeSetting, ControlChange, ControlSuggestion, MachineChange, MachineDeed, MachineEntry, MachineReport,
    MachineSetting, RevertChange, SetControl, SuggestControl, TERMINAL_UPGRADE, TerminalQuery, UpdateMachine,
};
pub use images::{ImageGc, ImageGcQuery, ImageInfo, Publication, PublishImage, PublishedVm};
pub use mesh::{AddWireguard, GroupInfo, RemoveNamed, RuleInfo, SetGroup, SetRule, WireguardMachine};
pub use openapi::openapi;
pub use ping::Pong;
pub use problem::{ApiProblem, ErrorCode, PROBLEM_TYPE};
pub use relays::{RelayChange, RelayInfo, SetRelay};
pub use requests::{
    Agreed, ContainerPlan, CreateClan, CreateInvite, CreatedClan, DeleteQuery, FindInvitation, FindRecovery,
    FoundInvitation, IntegratedPlan, Invite, JoinClan, JoinPreview, LogQuery, LogSource, Login, MakeLogin,
    OpenedService, PreviewJoin, Transfer, VmPlan,
};
pub use status::{
    AcceleratorInfo, AcceleratorKind, ClanInfo, ClanPhase, ControlMode, Flavour, HealthProblem, HostInfo, MachineInfo,
    PathInfo, PathKind, PersonInfo, PublishedImage, ServiceInfo, ServiceKind, Severity, StatsPoint, Status, UnitInfo,
    VmInfo, VmState, VmStats,
};
pub use tasks::{
    StepState, TaskEvent, TaskId, TaskIdError, TaskInfo, TaskKind, TaskProgress, TaskResult, TaskState, TaskStep,
};
pub use vms::{
    ChangePassphrase, ImageSource, MakeSnapshot, ResizeVm, SnapshotInfo, UnlockVm, UpdatePlan, UpdateVm, VmSize,
};

/// What all paths of the API start with.
pub const BASE: &str = "/api/v1";
/// Token of the HTTP `Upgrade` that turns a connection into a VM's console: raw bytes both ways.
pub const CONSOLE_UPGRADE: &str = "clan-console";
