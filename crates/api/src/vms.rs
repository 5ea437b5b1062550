//! What is asked of, and told about, a VM beyond its state.

use clan_types::{ByteSize, ClanName, ImageId, Passphrase, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Flavour, Transfer};

/// A snapshot of a VM's data disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotInfo {
    /// Its name, one to 40 of a-z, 0-9 and inner hyphens.
    pub name: String,
    /// When it was made.
    #[schema(value_type = u64)]
    pub made: Timestamp,
    /// Size of the disk.
    #[schema(value_type = u64)]
    pub size: ByteSize,
    /// What it takes on this computer now.
    #[schema(value_type = u64)]
    pub used: ByteSize,
    /// The image that the VM ran.
    #[schema(value_type = Option<String>)]
    pub image: Option<ImageId>,
    /// Whether the VM ran then. The disk is as after a power cut.
    pub running: bool,
}

/// Makes a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeSnapshot {
    /// Its name; one that tells the time if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Gives a VM or a container another image. Its disk stays; it gets its previous image back if it is not well with the new one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateVm {
    /// Id of an image on this computer, or a unique beginning of one; or the whole id of what the clan publishes. If absent it is
    /// what the clan publishes: newcomers run it, and it comes from members unless it is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Instead of all that: the image of this version of Clan, built here unless it is there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub build: bool,
}

/// What an [`UpdateVm`] would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpdatePlan {
    /// The clan whose machine it is.
    #[schema(value_type = String)]
    pub clan: ClanName,
    /// What the machine is.
    pub flavour: Flavour,
    /// The image that it runs now.
    #[schema(value_type = Option<String>)]
    pub before: Option<ImageId>,
    /// The image that it would run; absent if that is to be built.
    #[schema(value_type = Option<String>)]
    pub image: Option<ImageId>,
    /// Its title, for people.
    pub image_title: Option<String>,
    /// Where it comes from.
    pub source: ImageSource,
    /// What must be downloaded.
    pub download: Transfer,
    /// What the clan's description of its VM wants that this machine is not, one sentence each. An update changes none of it.
    #[serde(default)]
    pub stays: Vec<String>,
}

/// Where an image comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// It is on this computer.
    Here,
    /// Machines of the clan give it.
    Members,
    /// It is built here.
    Build,
}

/// Opens the encrypted disk of a VM, for as long as the manager lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UnlockVm {
    /// What the disk was encrypted with.
    #[schema(value_type = String)]
    pub passphrase: Passphrase,
}

/// Gives the encrypted disk of a VM, and the copies of it, another passphrase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangePassphrase {
    /// What opens the disk now.
    #[schema(value_type = String)]
    pub old: Passphrase,
    /// What opens it afterwards. At least 8 characters.
    #[schema(value_type = String)]
    pub new: Passphrase,
}

/// Gives a VM another size. What is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVm {
    /// Memory, bytes. Takes effect at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub memory: Option<ByteSize>,
    /// Processors. Takes effect at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Size of the data disk, bytes; it only grows, at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub disk: Option<ByteSize>,
    /// Only say what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// The size of a VM after a [`ResizeVm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSize {
    /// Memory.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// Processors.
    pub cpus: u32,
    /// Size of the data disk.
    #[schema(value_type = u64)]
    pub disk: ByteSize,
    /// Whether it runs with less or more memory or processors until it is started again.
    pub restart_needed: bool,
}
