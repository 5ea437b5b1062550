use std::{fmt, str::FromStr};

use clan_types::{ClanId, ClanName, ImageId, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use utoipa::ToSchema;

use crate::ApiProblem;

/// Id of a task: sixteen lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(u64);

/// The text is no task id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a task id: expected sixteen hexadecimal digits")]
pub struct TaskIdError;

impl TaskId {
    /// From a number that no other task has.
    pub const fn from_u64(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for TaskId {
    type Err = TaskIdError;
    fn from_str(text: &str) -> Result<Self, TaskIdError> {
        if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(TaskIdError);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| TaskIdError)
    }
}

impl Serialize for TaskId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TaskId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Founds a clan.
    CreateClan,
    /// Joins a clan.
    JoinClan,
    /// Leaves a clan.
    LeaveClan,
    /// Starts a VM.
    StartVm,
    /// Stops a VM.
    StopVm,
    /// Halts a VM's processors.
    PauseVm,
    /// Lets a paused VM go on.
    ResumeVm,
    /// Stops a VM and starts it again.
    RestartVm,
    /// Gives a VM another image.
    UpdateVm,
    /// Copies a VM's disk.
    SnapshotVm,
    /// Puts a copy of a VM's disk back in its place.
    RestoreVm,
    /// Removes a copy of a VM's disk.
    DiscardSnapshot,
    /// Deletes a VM and its disk.
    DeleteVm,
    /// Builds an image.
    BuildImage,
    /// Reads an image and compares it with its name.
    VerifyImage,
    /// Waits for another computer to become a device of this person.
    AddDevice,
    /// Gives the encrypted disk of a VM another passphrase.
    ChangePassphrase,
}

/// How a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Under way.
    Running,
    /// Ended well.
    Done,
    /// Ended with `problem`.
    Failed,
    /// Ended by the person.
    Cancelled,
}

impl TaskState {
    /// Whether nothing more will happen.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Running)
    }
}

/// How a step of a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Not begun.
    Pending,
    /// Under way.
    Running,
    /// Ended well.
    Done,
    /// Was not needed.
    Skipped,
    /// Ended badly.
    Failed,
}

/// A step of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskStep {
    /// What it does, such as "Build the image".
    pub title: String,
    /// How it stands.
    pub state: StepState,
    /// How long it took, or takes so far, in milliseconds.
    pub elapsed_ms: u64,
}

/// How far the running step has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskProgress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all, if known.
    pub total: Option<u64>,
    /// Bytes per second of late, if known.
    pub rate: Option<u64>,
}

/// What came of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TaskResult {
    /// This computer is in a clan: founded or joined.
    Clan {
        /// Its id.
        #[schema(value_type = String)]
        id: ClanId,
        /// Its name.
        #[schema(value_type = String)]
        name: ClanName,
    },
    /// There is an image.
    Image {
        /// Its id.
        #[schema(value_type = String)]
        id: ImageId,
    },
    /// This computer is out of a clan.
    Left {
        /// Whether another machine of the clan has heard it. If not, the clan keeps showing the machine until somebody
        /// removes it.
        heard: bool,
    },
    /// Nothing to tell.
    Nothing,
}

/// Something that takes a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskInfo {
    /// Id.
    #[schema(value_type = String)]
    pub id: TaskId,
    /// What it does.
    pub kind: TaskKind,
    /// What it does, for people, such as "Create the clan family".
    pub title: String,
    /// The clan that it concerns.
    #[schema(value_type = Option<String>)]
    pub clan: Option<ClanName>,
    /// How it stands.
    pub state: TaskState,
    /// When it began.
    #[schema(value_type = u64)]
    pub started: Timestamp,
    /// When it ended.
    #[schema(value_type = Option<u64>)]
    pub finished: Option<Timestamp>,
    /// Its steps, in order.
    pub steps: Vec<TaskStep>,
    /// How far the running step has come, if that can be told.
    pub progress: Option<TaskProgress>,
    /// What the running step does just now, in a few words.
    pub detail: Option<String>,
    /// What came of it.
    pub result: Option<TaskResult>,
    /// Why it failed.
    pub problem: Option<ApiProblem>,
    /// The last log lines; empty in lists.
    #[serde(default)]
    pub log: Vec<String>,
}

/// On the stream of a task's events. The stream ends after an update in a final state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TaskEvent {
    /// How the task stands now, without log lines. The first event is one of these.
    Update {
        /// The task.
        task: Box<TaskInfo>,
    },
    /// A new log line.
    Log {
        /// The line.
        line: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_id_reads_back_and_nothing_else_does() {
        let id = TaskId::from_u64(0xabc);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("../../../etc/pass".parse::<TaskId>().is_err());
        assert!("+00000000000000a".parse::<TaskId>().is_err());
    }
}
