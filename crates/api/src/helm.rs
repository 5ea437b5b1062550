//! Steering a machine: this computer's own, or that of another member who lets the clan's admins do it.

use clan_types::{MachineId, MachineName, PersonId, PersonName, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{ControlMode, StatsPoint, UnitInfo};

/// Token of the HTTP `Upgrade` that turns a connection into a machine's terminal. Both sides then send length-prefixed
/// frames: a little-endian u32, and so many bytes of postcard (`clan_wire::helm::Input` there, `Output` back), with no more than
/// `clan_wire::helm::INPUT_WINDOW` bytes typed ahead of what the machine says was taken.
pub const TERMINAL_UPGRADE: &str = "clan-terminal";

/// Says who may steer this computer's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetControl {
    /// Who.
    pub mode: ControlMode,
    /// Only say what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Who may steer this computer's machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ControlChange {
    /// The machine.
    #[schema(value_type = String)]
    pub machine: MachineName,
    /// Who could before.
    pub before: ControlMode,
    /// Who can now.
    pub mode: ControlMode,
}

/// Suggests to newcomers who is to steer their machine. Each decides for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SuggestControl {
    /// Who.
    pub mode: ControlMode,
    /// Only find out whether it would work.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// What a clan suggests to newcomers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ControlSuggestion {
    /// Before.
    pub before: ControlMode,
    /// Now.
    pub mode: ControlMode,
}

/// A machine, as whoever may steer it sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineReport {
    /// The machine.
    #[schema(value_type = String)]
    pub machine: MachineName,
    /// Who may steer it.
    pub control_mode: ControlMode,
    /// What it measures, now; the time is the machine's own.
    pub stats: StatsPoint,
    /// Systemd units of interest.
    pub units: Vec<UnitInfo>,
    /// What can be set.
    pub settings: Vec<MachineSetting>,
}

/// A setting of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineSetting {
    /// Its name.
    pub name: String,
    /// What it is now.
    pub value: String,
    /// What it means; one line.
    pub about: String,
}

/// Changes a setting of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeSetting {
    /// Which.
    pub name: String,
    /// To what.
    pub value: String,
    /// Only say what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Restores what was before an entry of a machine's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevertChange {
    /// The entry.
    pub number: u64,
    /// Only say what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Gives a machine of the clan another image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateMachine {
    /// Which, by its whole id; what the clan publishes, if absent. A machine takes that, or the one that it had before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Only say what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// What was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineChange {
    /// The entry of the machine's journal; absent if everything was as wanted already.
    pub entry: Option<MachineEntry>,
}

/// What an entry of a machine's journal is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineDeed {
    /// Who may steer the machine was changed.
    ControlMode,
    /// A setting was changed.
    Setting,
    /// The machine was started anew.
    Restart,
    /// A terminal was opened, or a command run.
    Terminal,
    /// The machine was given another image; one that it is not well with it gives back by itself.
    Image,
}

/// An entry of a machine's journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineEntry {
    /// Counted from one; a machine's own.
    pub number: u64,
    /// When, by the machine's clock.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// Who did it, if the machine knew.
    #[schema(value_type = Option<String>)]
    pub person: Option<PersonId>,
    /// What they were called then.
    #[schema(value_type = Option<String>)]
    pub person_name: Option<PersonName>,
    /// From which machine.
    #[schema(value_type = String)]
    pub from: MachineId,
    /// What it was called then.
    #[schema(value_type = Option<String>)]
    pub from_name: Option<MachineName>,
    /// It was the user of the machine's own computer, there.
    pub here: bool,
    /// What it is about.
    pub deed: MachineDeed,
    /// Which setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setting: Option<String>,
    /// What it was before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// What it was afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The entry that this one took back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverts: Option<u64>,
    /// When a terminal ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub ended: Option<Timestamp>,
}

/// What to run at a terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TerminalQuery {
    /// The program and its arguments, a JSON array of texts; a shell if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Rows of the terminal; without a size the command runs on plain pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// Columns of the terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<u16>,
    /// What kind of terminal it is, as in `TERM`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<String>,
}
