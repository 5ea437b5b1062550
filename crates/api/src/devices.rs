use clan_types::{ClanName, DeviceId, DeviceName, MachineName, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::TaskId;

/// Adds a device of this person's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddDevice {
    /// A recovery phrase instead of a link for another computer.
    #[serde(default)]
    pub recovery: bool,
}

/// What makes another computer a device of this person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceOffer {
    /// The clan.
    #[schema(value_type = String)]
    pub clan_name: ClanName,
    /// Short grouped text of the clan's id, which the other computer shows too.
    pub fingerprint: String,
    /// The link for the other computer, once. Whoever has it can act for this person: it is shown once and not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// When the link expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub expires: Option<Timestamp>,
    /// Four words that lead to the link on the local network, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
    /// A relay by which the words lead here from elsewhere, to be named along with them; absent if the clan has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words_relay: Option<String>,
    /// The phrase, where one was asked for: it is shown once and not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_phrase: Option<String>,
    /// The task that waits for the other computer; to cancel it withdraws the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub task: Option<TaskId>,
}

/// What a device may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// Whatever its person may.
    Device,
    /// A recovery phrase: adds and removes devices.
    Recovery,
    /// A link that makes another computer a device, for ten minutes.
    Link,
}

/// A device of this person's, past ones included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceInfo {
    /// Its key.
    #[schema(value_type = String)]
    pub id: DeviceId,
    /// Its name; null for the one with which the person came in.
    #[schema(value_type = Option<String>)]
    pub name: Option<DeviceName>,
    /// What it may do.
    pub kind: DeviceKind,
    /// Since when it is theirs.
    #[schema(value_type = u64)]
    pub since: Timestamp,
    /// Whether it is this computer.
    pub this: bool,
    /// Whether it still counts.
    pub good: bool,
}

/// How to remove a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct RemoveDeviceQuery {
    /// Only say what it would do.
    #[serde(default)]
    pub dry_run: bool,
}

/// What the removal of a device does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedDevice {
    /// Its key.
    #[schema(value_type = String)]
    pub id: DeviceId,
    /// Its name.
    #[schema(value_type = Option<String>)]
    pub name: Option<DeviceName>,
    /// The machines that it had added, which go with it.
    #[schema(value_type = Vec<String>)]
    pub machines: Vec<MachineName>,
}
