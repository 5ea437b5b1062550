//! Guest images: building them from a distribution's packages, and the store that keeps them.
//!
//! An image is a kernel, an initramfs and two read-only layers, named by the hash of its manifest
//! ([`clan_wire::image`]). [`Builder`] makes one from a [`Recipe`] as an ordinary user; equal inputs give the same image,
//! byte for byte. [`ImageStore`] keeps images, whether built here or fetched from another machine: what is in the store
//! was complete and correct when it was put there.

mod builder;
mod cpio;
mod elf;
mod erofs;
mod error;
mod files;
mod initramfs;
mod kernel;
mod layer;
mod lock;
mod modules;
mod process;
mod progress;
mod recipe;
mod root;
mod store;

pub use builder::Builder;
pub use error::{BuildError, KernelError, ModuleError};
pub use progress::{Progress, Step};
pub use recipe::{Recipe, Suite};
pub use store::{Damage, ImageStore, Incoming, IncomingFile, StoreError, StoredImage};
