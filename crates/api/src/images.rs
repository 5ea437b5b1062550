//! Images: what VMs boot from.

use clan_types::{AppName, ByteSize, ClanName, ImageId, NetworkLayer};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::ControlMode;

/// An image on this computer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageInfo {
    /// Its name, which follows from its content.
    #[schema(value_type = String)]
    pub id: ImageId,
    /// One line for people.
    pub title: String,
    /// What its files take on this computer. Files that images share count for each.
    #[schema(value_type = u64)]
    pub used: ByteSize,
    /// Least memory a VM of this image needs.
    #[schema(value_type = u64)]
    pub memory_min: ByteSize,
    /// Clans whose VM here runs it.
    #[schema(value_type = Vec<String>)]
    pub clans: Vec<ClanName>,
    /// Whether its next VM need not boot, as an earlier one left a template behind.
    pub template: bool,
}

/// How to remove images that no VM here runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ImageGcQuery {
    /// Only say which.
    #[serde(default)]
    pub dry_run: bool,
}

/// Images that were removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageGc {
    /// Which.
    #[schema(value_type = Vec<String>)]
    pub removed: Vec<ImageId>,
    /// Beginnings of images that broke off, removed with them.
    #[serde(default)]
    pub unfinished: u32,
    /// Room on the disk that this gave back, or would give.
    #[schema(value_type = u64)]
    pub freed: ByteSize,
}

/// Which image newcomers to a clan are to run, and how large their VMs are to be. What is left out stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishImage {
    /// Id of an image on this computer, or its beginning.
    pub image: String,
    /// Memory of a VM.
    #[schema(value_type = Option<u64>)]
    pub memory: Option<ByteSize>,
    /// Processors of a VM.
    pub cpus: Option<u32>,
    /// Largest size of a VM's disk.
    #[schema(value_type = Option<u64>)]
    pub disk: Option<ByteSize>,
    /// What carries its packets: `mesh`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub network_layer: Option<NetworkLayer>,
    /// Who is to steer it; each newcomer decides for themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_mode: Option<ControlMode>,
    /// The applications in the image, at most 32. If left out, and the image is another: the services that the clan's machine
    /// here, which runs it, offers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub applications: Option<Vec<AppName>>,
    /// Only say what would change.
    #[serde(default)]
    pub dry_run: bool,
}

/// What newcomers to a clan ran, and run or would run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Publication {
    /// The clan.
    #[schema(value_type = String)]
    pub clan: ClanName,
    /// What they ran so far, if the clan says.
    pub before: Option<PublishedVm>,
    /// What they run from now on, or would run.
    pub after: PublishedVm,
    /// Entries that were signed; none if it was only asked, or is in force already.
    pub entries: u32,
}

/// A VM as a clan's ledger describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishedVm {
    /// What boots.
    #[schema(value_type = String)]
    pub image: ImageId,
    /// One line for people.
    pub title: String,
    /// Memory.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// Processors.
    pub cpus: u32,
    /// Largest size of the disk.
    #[schema(value_type = u64)]
    pub disk: ByteSize,
    /// What carries its packets.
    #[schema(value_type = String)]
    pub network_layer: NetworkLayer,
    /// Who is to steer it, as the clan suggests.
    pub control_mode: ControlMode,
    /// The applications in its image, as far as its publisher has said.
    #[schema(value_type = Vec<String>)]
    pub applications: Vec<AppName>,
}
