//! What can go wrong with a virtual machine.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use clan_types::ByteSize;

use crate::{QmpError, container::Missing};

/// Why a virtual machine does not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No QEMU on this computer.
    #[error("QEMU is not installed: install the package `{package}`")]
    MissingQemu {
        /// The package of this distribution that has it.
        package: &'static str,
    },
    /// A program that prepares disks is missing.
    #[error("`{tool}` is not installed: install the package `{package}`")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// Something that a container needs is not there.
    #[error("containers cannot be run here")]
    Missing(#[source] Missing),
    /// A file of the virtual machine is missing or unreadable.
    #[error("cannot use the virtual machine's file {}", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A QEMU already runs in this directory; adopt it instead.
    #[error("the virtual machine already runs{}", pid.map(|p| format!(" (process {p})")).unwrap_or_default())]
    AlreadyRunning {
        /// Its process, if known.
        pid: Option<u32>,
    },
    /// Another program uses a UDP port that should lead to the guest.
    #[error("another program uses UDP port {} ({addr})", addr.port())]
    PortBusy {
        /// The address that could not be bound.
        addr: SocketAddr,
    },
    /// The disk is too full.
    #[error("not enough disk space for {}: {asked} needed, {available} free", path.display())]
    NoSpace {
        /// What should have been written.
        path: PathBuf,
        /// How much was asked for.
        asked: ByteSize,
        /// How much there is.
        available: ByteSize,
    },
    /// The computer has too little free memory.
    #[error("not enough memory for the virtual machine: {asked} asked, {available} available")]
    TooLarge {
        /// How much was asked for.
        asked: ByteSize,
        /// How much there is.
        available: ByteSize,
    },
    /// Another QEMU has a disk of this virtual machine open.
    #[error("another virtual machine uses the disk {}", path.display())]
    Locked {
        /// The disk.
        path: PathBuf,
    },
    /// The passphrase does not open the disk.
    #[error("the passphrase does not open {}", path.display())]
    WrongPassphrase {
        /// The disk.
        path: PathBuf,
    },
    /// An encrypted disk that is none.
    #[error("{} is not an encrypted disk as it should be: {why}", path.display())]
    DamagedDisk {
        /// The disk.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The specification makes no sense.
    #[error("the virtual machine cannot be started: {0}")]
    BadSpec(&'static str),
    /// QEMU ended before it was ready.
    #[error("QEMU ended at once: {log}")]
    DiedAtStart {
        /// The end of what it said.
        log: String,
    },
    /// QEMU runs, but its monitor did not answer; it was killed.
    #[error("QEMU did not answer within {} s: {log}", limit.as_secs())]
    SilentAtStart {
        /// How long it had.
        limit: Duration,
        /// The end of what it said.
        log: String,
    },
    /// The guest's state was not saved.
    #[error("the state of the virtual machine was not saved: {why}")]
    NotSaved {
        /// What QEMU says.
        why: String,
    },
    /// A program that prepares disks failed.
    #[error("`{tool}` failed: {log}")]
    ToolFailed {
        /// The program.
        tool: &'static str,
        /// The end of what it said.
        log: String,
    },
    /// The base OS refused something.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The process could not be watched or signalled.
    #[error("cannot {doing} the virtual machine's process")]
    Process {
        /// What was tried, as a verb.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The monitor.
    #[error("QEMU's monitor does not do as asked")]
    Qmp(#[from] QmpError),
}

impl VmError {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}
