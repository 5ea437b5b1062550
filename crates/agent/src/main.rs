//! The first program in a clan's guest.
//!
//! As `/init` of the initramfs it loads modules, stacks the disks to a root file system and starts the guest's own init.
//! A copy of it stays and answers the manager ([`clan_wire::agent`]), long before the system is up and however badly that
//! goes. Nothing is guessed: if a disk cannot be used, the guest is not started, and the manager is told why.

mod boot;
mod cmdline;
mod disk;
mod log;
mod machine;
mod port;
mod renew;
mod serve;
mod start;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        boot::boot()
    } else {
        log::error("this program starts a clan's guest, as its first process");
        ExitCode::from(2)
    }
}
