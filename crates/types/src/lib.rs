//! The vocabulary of Clan: identifiers, names, addresses, roles, times and invitation links.
//!
//! Everything here is plain data with a checked text form: parsing is the only way in from outside, so a value of
//! one of these types is always well-formed. No I/O, no clock, no randomness.

mod addr;
mod control;
mod ids;
mod link;
mod name;
mod passphrase;
mod pasted;
mod phrase;
mod role;
mod size;
mod time;
mod words;

pub use addr::{
    Host, HostError, IPV4_PREFIX, clan_prefix, ipv4_candidates, mesh_address, peer_address, service_url_host,
};
pub use control::{ControlMode, ControlModeError};
pub use ids::{
    CertificateHash, ClanId, DeviceId, EntryId, FileHash, IdError, ImageId, InviteId, MachineId, PersonId, WgPublicKey,
};
pub use link::{DEVICE_LINK, DEVICE_LINK_LIFETIME, InviteLink, InviteSecret, LinkError, PeerAddr, Purpose, RelayAddr};
pub use name::{
    AppName, ClanName, DeviceName, GroupName, MachineName, NameError, NetworkLayer, PersonName, RuleName, ServiceName,
};
pub use passphrase::{Passphrase, PassphraseError};
pub use phrase::{PhraseError, RecoveryPhrase};
pub use role::{Role, RoleError};
pub use size::{ByteSize, SizeError};
pub use time::{Hlc, Timestamp};
pub use words::{Channel, Words, WordsError};
