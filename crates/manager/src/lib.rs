//! The manager: runs on the base OS as an ordinary user, joins clans, owns the VM of each, and serves the API, the web
//! page and the clans' services on loopback.
//!
//! ```text
//!  CLI ──Unix socket──┐             ┌─ tasks: create, join, leave, … ── image (clan-build, fetch)
//!  browser ──TCP──────┴─▶ http ─▶ Shared ─▶ one Clan each: record on disk, person's key and log
//!                          │                   └─ keeper: the VM's only owner ─▶ QEMU (clan-vm)
//!                          │                      or integrated: in touch with the controller on this computer
//!                          └─ proxy ────────────────── agent and controller channels (clan-os) ─▶ guest
//! ```
//!
//! What the person wants is on disk before anything is done about it ([`record`]); what runs is found again
//! ([`keeper`]): a manager that was killed neither loses nor doubles a VM, and goes on with what it was doing.
//! The person's keys stay here; a guest only ever gets entries that were signed with them.

mod audit;
mod authority;
mod boot;
mod clan;
mod contained;
mod create;
mod decisions;
mod devices;
mod disk;
mod fetch;
mod guest;
mod helm;
mod http;
mod image;
mod images;
mod integrated;
mod invite;
mod join;
mod keeper;
mod leave;
mod link;
mod lock;
mod logs;
mod machine;
mod manager;
mod memory;
mod mesh;
mod orders;
mod paths;
mod problem;
mod publish;
mod record;
mod recover;
mod relay;
mod sign;
mod snapshots;
mod status;
mod tasks;
mod template;
mod trees;
mod update;
mod words;

pub use clan_vm::container::Stage;
pub use manager::{KeepVms, Manager, ManagerError, Options};
pub use paths::Paths;
