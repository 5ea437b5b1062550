//! What a virtual machine is made of.

use std::{net::SocketAddr, path::PathBuf};

use clan_types::{ByteSize, Passphrase};

use crate::{AccelKind, VmError, preflight};

/// The files of a bootable image. All are opened read-only and may be shared by virtual machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFiles {
    /// Uncompressed kernel with a PVH entry point.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: PathBuf,
    /// Root file system; the guest's `vda`.
    pub root: PathBuf,
    /// What is laid over the root file system; the guest's `vdb`.
    pub layer: PathBuf,
    /// Kernel, then initramfs, so that the guest can hand them on; the guest's `vdd`.
    pub boot: PathBuf,
}

/// A UDP port of the base OS that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpForward {
    /// Address of the base OS, IPv4; usually `0.0.0.0:port`.
    pub host: SocketAddr,
    /// Port of the guest.
    pub guest_port: u16,
}

/// Which QEMU to run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Qemu {
    /// The first `qemu-system-x86_64` on `PATH`, or where distributions hide it.
    #[default]
    Search,
    /// This executable.
    At(PathBuf),
}

impl Qemu {
    /// Whether it is there: [`VmError::MissingQemu`] if not. For saying so before anything long is begun.
    pub fn check(&self) -> Result<(), VmError> {
        preflight::executable(self).map(drop)
    }

    /// Differs when another QEMU would run, or be told something else: a saved state is for one computer of one QEMU.
    pub fn fingerprint(&self) -> Result<String, VmError> {
        Ok(format!("{} {HARDWARE}", preflight::fingerprint(&preflight::executable(self)?)?))
    }
}

/// To be counted up whenever the command line changes such that older saved states do not fit.
const HARDWARE: u32 = 2;

/// Where a guest begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Begin {
    /// At its kernel's entry.
    #[default]
    Boot,
    /// At its kernel's entry, which is told that this may become a template.
    BootToSave,
    /// Where a guest that began by [`Self::BootToSave`] was when [`crate::Vm::save`] wrote this file. All else but names, ports and the data disk's place must be as it
    /// was for that one, QEMU included, and the data disk a copy from the same moment.
    Saved(PathBuf),
}

/// A virtual machine to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// Its own directory: sockets, logs, process id. Made if missing, mode 0700.
    pub dir: PathBuf,
    /// What it is called in process listings; letters, digits and hyphens.
    pub name: String,
    /// What it boots.
    pub image: ImageFiles,
    /// Its writable disk, from [`crate::create_data_disk`] if it is not encrypted; the guest's `vdc`.
    pub data_disk: PathBuf,
    /// What opens the disk, if it is encrypted: one from [`crate::create_encrypted_disk`]. Then nothing that is said on the console
    /// is written to the base OS's disk, either.
    pub passphrase: Option<Passphrase>,
    /// Guest memory.
    pub memory: ByteSize,
    /// Virtual processors, at least one.
    pub cpus: u8,
    /// From [`crate::probe::accelerator`].
    pub accelerator: AccelKind,
    /// UDP ports to forward into the guest.
    pub forwards: Vec<UdpForward>,
    /// Which QEMU to run; [`Qemu::default`] searches.
    pub qemu: Qemu,
    /// Where the guest begins.
    pub begin: Begin,
}
