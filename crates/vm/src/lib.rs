//! One QEMU virtual machine: is there an accelerator, the process, its network, its disks,
//! its sockets, its monitor (QMP). And a container, which is the same without a machine of its own.
//!
//! A virtual machine outlives the program that started it: [`Vm::start`] detaches QEMU, [`Vm::adopt`] finds it again.
//! At most one QEMU runs for a directory; a lock that QEMU itself holds sees to that. Everything runs as an ordinary
//! user. What is said to the guest over its ports is not this crate's business.

mod args;
mod console;
pub mod container;
mod disk;
mod error;
mod fence;
mod file;
mod host;
mod kernel;
pub mod limits;
mod luks;
pub mod network;
mod preflight;
pub mod probe;
mod process;
pub mod qmp;
mod saved;
mod sealed;
mod spec;
mod terminal;
mod tool;
mod vm;

pub use disk::{copy_data_disk, create_data_disk};
pub use error::VmError;
pub use fence::has_fence;
pub use host::HostStats;
pub use limits::Unlimited;
pub use network::Network;
pub use probe::{AccelKind, Accelerator};
pub use qmp::{Qmp, QmpError, QmpEvent};
pub use sealed::{change_passphrase, check_passphrase, create_encrypted_disk, encryption_overhead};
pub use spec::{Begin, ImageFiles, Qemu, UdpForward, VmSpec};
pub use terminal::Console;
pub use vm::{Exit, ExitReason, Vm};
