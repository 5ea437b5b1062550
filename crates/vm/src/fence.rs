//! Which files QEMU may touch, whatever a hostile guest has made of it: a Landlock domain around its process
//! (<https://docs.kernel.org/userspace-api/landlock.html>).
//!
//! It writes to its own directory and its data disk, reads its image and what the system has for everybody, and reaches
//! no Unix socket and no process of others. It cannot read what people keep: another virtual machine's disk is there.
//! Kernels without Landlock, or with less of it, do what they can; QEMU's own sandbox is there in any case.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

use crate::{VmSpec, network};

/// The newest that is made use of.
const KNOWN: ABI = ABI::V9;
/// Folders of the system where people and services keep what is theirs; `/dev` and `/run` are opened piecemeal.
const PRIVATE: [&str; 10] = ["dev", "home", "lost+found", "media", "mnt", "root", "run", "srv", "tmp", "var"];
/// Devices: what they are for, and whether commands (ioctl) are.
const DEVICES: [(&str, bool); 5] =
    [("/dev/kvm", true), ("/dev/null", false), ("/dev/zero", false), ("/dev/urandom", false), ("/dev/random", false)];
/// Where the base OS says which name server to ask; often a link to somewhere in `/run`.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The domain, made but not yet entered.
pub(crate) struct Fence(Option<RulesetCreated>);

impl Fence {
    /// For a virtual machine whose directory is `dir`, run by the program `qemu`.
    pub(crate) fn around(dir: &Path, spec: &VmSpec, qemu: &Path) -> io::Result<Self> {
        let made = Self::rules(dir, spec, qemu).map_err(io::Error::other)?;
        Ok(Self(Some(made)))
    }

    fn rules(dir: &Path, spec: &VmSpec, qemu: &Path) -> Result<RulesetCreated, RulesetError> {
        let read = AccessFs::from_read(KNOWN);
        let read_file: BitFlags<AccessFs> = AccessFs::ReadFile.into();
        let write_file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let own = AccessFs::from_all(KNOWN) & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock);

        let mut rules: Vec<(PathBuf, BitFlags<AccessFs>)> =
            vec![(dir.into(), own), (spec.data_disk.clone(), write_file)];
        let image = &spec.image;
        for file in [&image.kernel, &image.initramfs, &image.root, &image.layer, &image.boot] {
            rules.push((file.clone(), read_file));
        }
        rules.extend(public().map(|folder| (folder, read)));
        // One that is not the distribution's has its files beside it.
        rules.extend(qemu.canonicalize().ok().and_then(|path| Some((path.parent()?.to_owned(), read))));
        rules.extend(DEVICES.iter().map(|(device, commands)| {
            let commands = if *commands { AccessFs::IoctlDev.into() } else { BitFlags::empty() };
            (PathBuf::from(device), AccessFs::ReadFile | AccessFs::WriteFile | commands)
        }));
        rules.extend(fs::canonicalize(RESOLV_CONF).ok().map(|file| (file, read_file)));
        // What lies over it in QEMU's namespace is found by its own place.
        rules.push((dir.join(network::RESOLVER), read & !BitFlags::from(AccessFs::Execute)));

        let ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?;
        rules.into_iter().try_fold(ruleset, |ruleset, (path, access)| match PathFd::new(&path) {
            Ok(at) => ruleset.add_rule(PathBeneath::new(at, access)),
            // What is not there, or not for this user, QEMU does not need or will complain about.
            Err(error) => {
                tracing::trace!(%error, "no rule for a file");
                Ok(ruleset)
            }
        })
    }

    /// Puts this process, and what it becomes, behind the fence; once. For a process that has just been forked: makes
    /// system calls only.
    pub(crate) fn raise(&mut self) -> io::Result<()> {
        match self.0.take().map(RulesetCreated::restrict_self) {
            None | Some(Ok(_)) => Ok(()),
            // Of the calls it made, the last is the one that failed.
            Some(Err(_)) => Err(io::Error::last_os_error()),
        }
    }
}

/// Whether this kernel has Landlock, and lets programs use it.
pub fn has_fence() -> bool {
    let made = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    made.is_ok()
}

/// What the system has for everybody: programs, libraries, settings, the kernel's files.
fn public() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/").into_iter().flatten().flatten();
    entries.filter(|e| !e.file_name().to_str().is_some_and(|name| PRIVATE.contains(&name))).map(|e| e.path())
}
