//! Who may do what in a clan, and who did: invites, putting out, the log.

use clan_types::{EntryId, InviteId, MachineName, PersonId, PersonName, Role, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Whether an invite still lets somebody in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InviteState {
    /// It does.
    Open,
    /// All its uses are used.
    Used,
    /// Its time is over.
    Expired,
    /// It was withdrawn, or whoever made it is out.
    Withdrawn,
}

/// An invite that somebody of the clan made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InviteInfo {
    /// Id.
    #[schema(value_type = String)]
    pub id: InviteId,
    /// Whether it still lets somebody in.
    pub state: InviteState,
    /// Role of who redeems it.
    #[schema(value_type = String)]
    pub role: Role,
    /// How many may redeem it.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// Whether an admin is to approve each newcomer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub approval: bool,
    /// When it expires.
    #[schema(value_type = u64)]
    pub expires: Timestamp,
    /// When it was made.
    #[schema(value_type = u64)]
    pub made: Timestamp,
    /// Who made it.
    #[schema(value_type = String)]
    pub by: PersonId,
    /// Their name.
    #[schema(value_type = String)]
    pub by_name: PersonName,
    /// Who came in with it.
    #[schema(value_type = Vec<String>)]
    pub redeemed_by: Vec<PersonName>,
}

/// What can be put out of a clan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RevocationKind {
    /// A person, and their machines with them.
    Person,
    /// One machine.
    Machine,
    /// An invite: nobody comes in with it any more. Who has come in stays.
    Invite,
}

/// Puts a person or a machine out of a clan, or withdraws an invite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// What to put out.
    pub kind: RevocationKind,
    /// Its name (an invite has none), its id, or a unique beginning of the id.
    pub subject: String,
    /// Only find out whether it would work, and what it would do.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was put out, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Revocation {
    /// What.
    pub kind: RevocationKind,
    /// Its id.
    pub id: String,
    /// Its name; that of whoever made it, if it is an invite.
    pub name: String,
    /// Machines that are put out.
    #[schema(value_type = Vec<String>)]
    pub machines: Vec<MachineName>,
    /// How many entries were signed; none if it was only asked, or if it was out already.
    pub entries: u32,
    /// It was out before.
    pub already: bool,
}

/// Gives a person another role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRole {
    /// Name, id, or a unique beginning of the id.
    pub person: String,
    /// Role from now on: guest, member, admin or owner.
    #[schema(value_type = String)]
    pub role: Role,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// A role that was given, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RoleChange {
    /// The person.
    #[schema(value_type = String)]
    pub id: PersonId,
    /// Their name.
    #[schema(value_type = String)]
    pub name: PersonName,
    /// Their role before.
    #[schema(value_type = String)]
    pub from: Role,
    /// Their role after; the same if there is nothing to do.
    #[schema(value_type = String)]
    pub to: Role,
    /// How many entries were signed; none if it was only asked, or if there was nothing to do.
    pub entries: u32,
}

/// What can be renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NamedKind {
    /// A person.
    Person,
    /// A machine.
    Machine,
}

/// Gives a person or a machine another name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    /// What.
    pub kind: NamedKind,
    /// Its name, its id, or a unique beginning of the id.
    pub subject: String,
    /// Its name from now on.
    pub name: String,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was renamed, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Renamed {
    /// What.
    pub kind: NamedKind,
    /// Its id.
    pub id: String,
    /// Its name before.
    pub from: String,
    /// Its name after; the same if there is nothing to do.
    pub to: String,
    /// How many entries were signed; none if it was only asked, or if there was nothing to do.
    pub entries: u32,
}

/// Lets a newcomer in who waits for it, or refuses them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecideAdmission {
    /// Name, id, or a unique beginning of the id.
    pub person: String,
    /// Whether they come in.
    pub approve: bool,
    /// Only find out whether it would work.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was decided about a newcomer, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AdmissionDecision {
    /// The newcomer.
    #[schema(value_type = String)]
    pub id: PersonId,
    /// Their name.
    #[schema(value_type = String)]
    pub name: PersonName,
    /// The role that their invite gives.
    #[schema(value_type = String)]
    pub role: Role,
    /// Who invited them.
    #[schema(value_type = String)]
    pub invited_by: PersonName,
    /// Whether they come in.
    pub approve: bool,
    /// How many entries were signed; none if it was only asked.
    pub entries: u32,
}

/// Which part of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ClanLogQuery {
    /// So many entries, the newest; default 100, at most 10000.
    #[serde(default = "default_limit")]
    pub limit: u32,
}

fn default_limit() -> u32 {
    100
}

impl Default for ClanLogQuery {
    fn default() -> Self {
        Self { limit: default_limit() }
    }
}

/// What was decided in a clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClanLog {
    /// How many entries the clan has.
    pub total: u64,
    /// The newest of them, newest last.
    pub entries: Vec<ClanLogEntry>,
}

/// Who signed an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AuthorKind {
    /// A person decided it.
    Person,
    /// A machine bore witness.
    Machine,
}

/// One signed entry of a clan's ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClanLogEntry {
    /// Id.
    #[schema(value_type = String)]
    pub id: EntryId,
    /// When, by its author's clock.
    #[schema(value_type = u64)]
    pub at: Timestamp,
    /// Who signed it: a person or a machine.
    pub by: AuthorKind,
    /// The key that signed it.
    pub author: String,
    /// Name of the author; the beginning of the key for somebody who never came in.
    pub author_name: String,
    /// What the author did; completes a sentence that begins with the name.
    pub what: String,
    /// Why it has no effect; absent if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub void: Option<String>,
}
