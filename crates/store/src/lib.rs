//! Files on disk: the ledger in `redb`, atomic and versioned files, secret files, private directories.
//!
//! Whatever is acknowledged is on disk. A file that cannot be read is kept aside under another name and reported, never
//! replaced in silence; a secret that cannot be read stays where it is, because replacing it would change who we are.

mod error;
mod file;
mod json;
mod ledger;
mod medium;
mod secret;

pub use error::{Damage, StoreError};
pub use file::{atomic_write, create_private_dir};
pub use json::{read_versioned_json, write_versioned_json};
pub use ledger::{LedgerStore, SealKey};
pub use medium::Medium;
pub use secret::{Secret, SecretFile};
