use clan_types::{
    AppName, ByteSize, ClanId, ClanName, ImageId, InviteId, MachineName, NetworkLayer, Passphrase, PersonName, Role,
    ServiceName, Timestamp,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{AcceleratorInfo, ApiProblem, ControlMode, TaskInfo};

/// Founds a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateClan {
    /// Its name.
    #[schema(value_type = String)]
    pub name: ClanName,
    /// The founder's name.
    #[schema(value_type = String)]
    pub person: PersonName,
    /// Name of this computer's machine.
    #[schema(value_type = String)]
    pub machine: MachineName,
    /// Memory of the VM in bytes; default 512 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub memory: Option<ByteSize>,
    /// Size of the VM's data disk in bytes; default 2 GiB, taken as it fills.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub disk: Option<ByteSize>,
    /// Processors of the VM; default all up to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Socket of a controller on this computer, which then is the machine itself; absent for a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrate: Option<String>,
    /// Who may steer this computer's machine; default the local user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<ControlMode>,
    /// Whether the machine is a container, instead of a VM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub container: bool,
    /// Encrypts the VM's data disk, which then opens by nothing but this: it is in the manager's memory only. At least 8 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub passphrase: Option<Passphrase>,
    /// Makes a recovery phrase for the owner, which the answer tells once.
    #[serde(default)]
    pub recovery: bool,
}

/// Asks what a link leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PreviewJoin {
    /// The invitation link.
    pub link: String,
    /// Socket of a controller on this computer, which then is the machine itself; absent for a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrate: Option<String>,
    /// Whether the machine is a container, instead of a VM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub container: bool,
    /// Memory of the VM, bytes; as the clan recommends if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub memory: Option<ByteSize>,
    /// Size that its data disk may grow to, bytes; as the clan recommends if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub disk: Option<ByteSize>,
    /// Processors of the VM; as the clan recommends if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
}

/// Looks for an invitation in what a person pasted or typed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FindInvitation {
    /// A link, with whatever is around and in it; or four words, whose machine is looked for on the local network.
    pub text: String,
    /// Where to look for the machine of words instead: a relay of its clan, as host or `host:port`; the port is mostly 443.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<String>,
}

/// Looks for the clan that a recovery phrase belongs to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FindRecovery {
    /// The twelve words.
    pub phrase: String,
    /// Any link to the clan; without one, its machines are looked for on the local network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

impl std::fmt::Debug for FindRecovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FindRecovery(…)")
    }
}

/// A clan that is being founded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedClan {
    /// The task that founds it.
    #[serde(flatten)]
    pub task: TaskInfo,
    /// The owner's recovery phrase, if it was asked for. It is told here, once, and not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_phrase: Option<String>,
}

/// An invitation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FoundInvitation {
    /// The link. Words work once: keep it until it was used.
    pub link: String,
}

/// What must be transferred before a VM can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Bytes of the whole.
    #[schema(value_type = u64)]
    pub total: ByteSize,
    /// Bytes that are not here yet; zero if everything is here. What an attempt that broke off left counts as here.
    #[schema(value_type = u64)]
    pub missing: ByteSize,
}

/// A VM that is to become a machine of a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmPlan {
    /// The image that will run.
    #[schema(value_type = String)]
    pub image: ImageId,
    /// Its title.
    pub image_title: String,
    /// What must be downloaded.
    pub download: Transfer,
    /// Memory that the VM will have.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// Size that its data disk may grow to.
    #[schema(value_type = u64)]
    pub disk: ByteSize,
    /// Processors that it will have.
    pub cpus: u32,
    /// How it will run here.
    pub accelerator: AcceleratorInfo,
}

/// A container that is to become a machine of a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContainerPlan {
    /// The image that will run.
    #[schema(value_type = String)]
    pub image: ImageId,
    /// Its title.
    pub image_title: String,
    /// What must be downloaded.
    pub download: Transfer,
    /// What the image takes on this computer once it is unpacked, about. What the machine writes is beside that, and nothing
    /// bounds it.
    #[schema(value_type = u64)]
    pub unpacked: ByteSize,
    /// The most memory that what is in it takes, where that can be bounded; a warning says where not.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// As many processors it takes at most, likewise.
    pub cpus: u32,
    /// Why there can be none here now, and what to do; absent if there can.
    pub problem: Option<ApiProblem>,
}

/// A computer that is to become a machine of a clan itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IntegratedPlan {
    /// Socket of the controller.
    pub socket: String,
    /// Why it cannot be used now, and what to do; absent if it can.
    pub problem: Option<ApiProblem>,
}

/// What a link leads to, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinPreview {
    /// Id of the clan.
    #[schema(value_type = String)]
    pub clan: ClanId,
    /// Its name.
    #[schema(value_type = String)]
    pub clan_name: ClanName,
    /// Short grouped text of its id, to compare by eye with what the inviter sees.
    pub fingerprint: String,
    /// Who made the invite.
    #[schema(value_type = String)]
    pub inviter: PersonName,
    /// Role that the newcomer gets.
    #[schema(value_type = String)]
    pub role: Role,
    /// When the invite expires.
    #[schema(value_type = u64)]
    pub expires: Timestamp,
    /// Whose device this computer becomes, if the link is for that: nobody comes in, and names are of no concern.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub device_of: Option<PersonName>,
    /// Names of the people in the clan.
    #[schema(value_type = Vec<String>)]
    pub people: Vec<PersonName>,
    /// Names of its machines: a newcomer's must differ.
    #[schema(value_type = Vec<String>)]
    pub machines: Vec<MachineName>,
    /// The VM that will run; absent where this computer itself is to be the machine, or the clan names no image.
    pub vm: Option<VmPlan>,
    /// The container that will run, if that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerPlan>,
    /// How this computer itself will be the machine, if that was asked for.
    pub integrated: Option<IntegratedPlan>,
    /// Who is to steer it, as the clan suggests.
    pub control_mode: ControlMode,
    /// What carries packets between the clan's machines.
    #[serde(default)]
    #[schema(value_type = String)]
    pub network_layer: NetworkLayer,
    /// The applications in the image, as far as its publisher has said; each runs once it is switched on.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub applications: Vec<AppName>,
    /// What to consider before joining, one sentence each.
    pub warnings: Vec<String>,
}

/// Joins a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinClan {
    /// The invitation link.
    pub link: String,
    /// The newcomer's name.
    #[schema(value_type = String)]
    pub person: PersonName,
    /// Name of this computer's machine.
    #[schema(value_type = String)]
    pub machine: MachineName,
    /// Memory of the VM in bytes; default what the preview says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub memory: Option<ByteSize>,
    /// Size of the VM's data disk in bytes; default what the preview says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub disk: Option<ByteSize>,
    /// Processors of the VM; default what the preview says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Socket of a controller on this computer, which then is the machine itself; absent for a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrate: Option<String>,
    /// Who may steer this computer's machine; default the local user, whatever the clan suggests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<ControlMode>,
    /// Whether the machine is a container, instead of a VM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub container: bool,
    /// What the person was shown and agreed to. If the clan has published something else since, nothing is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreed: Option<Agreed>,
    /// Encrypts the VM's data disk, which then opens by nothing but this: it is in the manager's memory only. At least 8 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub passphrase: Option<Passphrase>,
}

/// What a person was shown of a clan's VM or container, before they agreed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Agreed {
    /// The image.
    #[schema(value_type = String)]
    pub image: ImageId,
    /// What carries its packets.
    #[schema(value_type = String)]
    pub network_layer: NetworkLayer,
    /// The applications in the image.
    #[schema(value_type = Vec<String>)]
    pub applications: Vec<AppName>,
}

/// Makes an invite.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateInvite {
    /// Role of who redeems it; default member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub role: Option<Role>,
    /// How many may redeem it; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
    /// Seconds until it expires; default 24 hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<u64>,
    /// Whether an admin is to approve each newcomer; default no.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub approval: bool,
}

/// An invite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Invite {
    /// The link. Whoever has it may join: it is shown once and not kept.
    pub link: String,
    /// Id.
    #[schema(value_type = String)]
    pub invite: InviteId,
    /// Clan that it leads to.
    #[schema(value_type = String)]
    pub clan_name: ClanName,
    /// Short grouped text of the clan's id, which the newcomer will see too.
    pub fingerprint: String,
    /// Role of who redeems it.
    #[schema(value_type = String)]
    pub role: Role,
    /// How many may redeem it.
    pub uses: u32,
    /// Whether an admin is to approve each newcomer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub approval: bool,
    /// When it expires.
    #[schema(value_type = u64)]
    pub expires: Timestamp,
    /// Four words that lead to the link on the local network, once; absent if the machine here cannot wait for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    /// When the words expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub words_expire: Option<Timestamp>,
    /// A relay by which the words lead here from elsewhere, to be named along with them; absent if the clan has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words_relay: Option<String>,
}

/// Where log lines come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// The guest's journal, through its controller.
    #[default]
    Journal,
    /// What the guest wrote to its console; there even when the guest is not.
    Console,
}

/// Which log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// So many lines back; default 200, at most 100000.
    #[serde(default = "default_lines")]
    pub lines: u32,
    /// Whether to go on as lines appear.
    #[serde(default)]
    pub follow: bool,
    /// From where; default journal.
    #[serde(default)]
    pub source: LogSource,
}

fn default_lines() -> u32 {
    200
}

impl Default for LogQuery {
    fn default() -> Self {
        Self { lines: default_lines(), follow: false, source: LogSource::Journal }
    }
}

/// How to delete a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeleteQuery {
    /// Even if it is still in its clan. The clan keeps the machine's entry.
    #[serde(default)]
    pub force: bool,
}

/// A service, ready to open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OpenedService {
    /// Open this in a browser. It works once and for a short time; the page that it leads to stays.
    pub url: String,
    /// The same without the right to open it.
    pub plain_url: String,
    /// The service.
    #[schema(value_type = String)]
    pub service: ServiceName,
    /// Where it runs.
    #[schema(value_type = String)]
    pub machine: MachineName,
}

/// Asks for a way into the web page.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeLogin {
    /// What the page shows first: a link that the desktop was told to open, as it came. At most 16 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<String>,
}

/// A way into the web page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Login {
    /// Open this in a browser. It works once and for a short time.
    pub url: String,
    /// When it stops working.
    #[schema(value_type = u64)]
    pub expires: Timestamp,
}
