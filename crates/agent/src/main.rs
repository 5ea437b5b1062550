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

use std::process::ExitCode;

/// How the copy that stays is named. Systemd lets programs of root whose name begins with `@` live through the shutdown.
const RESIDENT: &str = "@clan-agent";

fn main() -> ExitCode {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    if std::process::id() == 1 {
        boot::boot()
    } else if name == RESIDENT {
        port::serve(args.collect())
    } else {
        log::error("this program starts a clan's guest, as its first process");
        ExitCode::from(2)
    }
}
