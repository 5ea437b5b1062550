//! Who belongs to a clan and who may do what: signed logs, and the pure fold that turns them into a [`State`].
//!
//! - Every author (a person's or a machine's key) has one log of [`Entry`]s, chained by hash.
//! - A [`Ledger`] holds the logs of one clan. Any two ledgers that hold the same entries have the same [`State`],
//!   whatever order, duplication or detour the entries arrived by.
//! - Nothing here reads a clock, a file, a socket or a random number: times and keys come in as arguments.
//!
//! # What the fold guarantees
//!
//! - Entries take effect in the order of their hybrid time, then of their id. An author needs the right at that point.
//! - A person's devices each have a key and a log of their own; what a device in good standing writes counts as its
//!   person's. The first one bears the person's own key. A key is one person's device or none, with its own consent.
//! - A newcomer is in from the first [`Body::Countersign`] of their admission by a machine in good standing; what they
//!   wrote before takes effect then. If the invite asks for it, they are in from an [`Body::Approve`] on instead.
//! - A revocation says which is the last entry of its subject that still counts; later ones are void, whatever time
//!   they carry. Revocations are weighed from the most senior author down (greater role first, then earlier admission);
//!   one that counts is never undone by a junior's, and of two people who revoke each other the senior one stays.
//!   Roles are those at the revocation. Of one person's revocations those of their own devices come first, among them
//!   the recovery key's, then the earlier added device's.
//! - A demotion is weighed like a revocation, and says likewise what still counts under the old role. It is void where it
//!   would leave the clan without an owner.
//! - A name that is taken keeps nobody out: people and machines come in under the next free one (`nas-2`), so that no
//!   back-dated entry undoes their coming. Whoever renames to a taken name does so in vain.
//! - Whoever leaves, or takes a machine of theirs out, does so from the time that the entry bears, but undoes nobody's coming by
//!   it: what their machine has countersigned counts, and so does their invite for whom a machine countersigned. (A
//!   revocation of a machine may void what it countersigned: it says so, by the last entry that counts.)
//! - An author who signs two entries for one place in their log has equivocated: the earlier one (by time, then id)
//!   and what follows it count, the other is kept as evidence. A revocation that pins the losing branch leaves only
//!   what both branches share.
//! - A time that lies ahead of the reader's clock by more than [`MAX_AHEAD`] does not move the reader's clock, and an
//!   admission is void whose countersignature is not later than it. Revocations work on entries of any time.

mod access;
mod body;
mod entry;
mod fold;
mod ledger;
mod log;
mod names;
mod state;
mod sync;
mod weigh;

pub use access::{AccessRule, Group, Party, PortRange, Protocol, Target};
pub use body::{
    Applications, Body, DeviceKind, KeyProof, LastEntry, MAX_APPLICATIONS, Title, TitleError, TooManyApplications,
    VmDescription, VmSetup,
};
pub use entry::{AuthorId, Entry, EntryError, MAX_ENTRY};
pub use ledger::{InsertError, Inserted, InsertedMany, Ledger, MAX_AHEAD, RedeemProblem};
pub use state::{
    Device, Invite, InviteProblem, Machine, Node, Peer, Pending, Person, Published, Relay, Standing, State, Void,
    VoidReason,
};
pub use sync::{Intake, IntakeError, Page, Place, Vector};
