//! The vocabulary of Clan: identifiers, names, addresses, roles, times and invitation links.
//!
//! Everything here is plain data with a checked text form: parsing is the only way in from outside, so a value of
//! one of these types is always well-formed. No I/O, no clock, no randomness.

mod addr;
mod ids;
mod link;
mod name;
mod pasted;
mod role;
mod size;
mod time;
mod words;

pub use addr::{clan_prefix, mesh_address, service_url_host};
pub use ids::{ClanId, EntryId, FileHash, IdError, ImageId, InviteId, MachineId, PersonId, WgPublicKey};
pub use link::{InviteLink, InviteSecret, LinkError, PeerAddr};
pub use name::{ClanName, MachineName, NameError, PersonName, ServiceName};
pub use role::{Role, RoleError};
pub use size::{ByteSize, SizeError};
pub use time::{Hlc, Timestamp};
pub use words::{Channel, Words, WordsError};
