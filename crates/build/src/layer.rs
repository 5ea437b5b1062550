//! The upper layer of a guest's root: the `clan` executable, its units, and what differs from the distribution's defaults.
//! It holds nothing else, for what is here hides what is below.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use crate::{BuildError, Step, files::io_error};

/// Path and content of every plain file. Nothing here is secret, or one machine's own.
const FILES: &[(&str, &str)] = &[
    ("etc/systemd/system/clan-controller.service", include_str!("layer/clan-controller.service")),
    ("etc/systemd/system/clan-network.service", include_str!("layer/clan-network.service")),
    ("etc/systemd/system/clan-console.service", include_str!("layer/clan-console.service")),
    ("usr/lib/clan/network", include_str!("layer/network")),
    ("etc/systemd/journald.conf.d/clan.conf", include_str!("layer/journald.conf")),
    ("etc/nginx/sites-enabled/default", include_str!("layer/nginx-site")),
    ("var/lib/clan/www/index.html", include_str!("layer/index.html")),
    ("etc/hosts", include_str!("layer/hosts")),
    ("etc/hostname", "clan\n"),
    ("etc/resolv.conf", "nameserver 127.0.0.1\nsearch clan\n"),
    ("etc/fstab", ""),
    ("etc/motd", ""),
    // Empty, not missing: systemd makes an id of its own, and does not take this for the first boot, at which it would
    // enable every unit there is.
    ("etc/machine-id", ""),
];

/// Units that start with the guest.
const ENABLED: &[&str] = &["clan-controller.service", "clan-network.service", "clan-console.service"];

/// Units that have nothing to do in a guest: each costs time at boot, or wakes an idle machine.
const MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "logrotate.timer",
    "man-db.timer",
    "getty@tty1.service",
    "getty-static.service",
    "serial-getty@ttyS0.service",
    "systemd-logind.service",
    "systemd-timesyncd.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-pstore.service",
    "systemd-remount-fs.service",
    "systemd-modules-load.service",
    "systemd-sysusers.service",
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-initctl.socket",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
];

/// Programs that would write units at boot for devices and files that a guest does not have.
const NO_GENERATORS: &[&str] = &[
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-fstab-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-system-update-generator",
    "systemd-veritysetup-generator",
];

const GENERATORS: &str = "etc/systemd/system-generators";
const UNITS: &str = "etc/systemd/system";

/// What decides the layer's content, beside the executable.
pub(crate) fn fingerprint() -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_derive_key("clan 2026-11 image layer v1");
    let lists = [ENABLED, MASKED, NO_GENERATORS].into_iter().flatten().copied();
    for text in FILES.iter().flat_map(|(path, content)| [*path, *content]).chain(lists) {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize()
}

/// Writes the layer's tree into a new directory.
pub(crate) fn write(tree: &Path, clan_executable: &Path) -> Result<(), BuildError> {
    for (path, content) in FILES {
        let path = tree.join(path);
        make_parent(&path)?;
        fs::write(&path, content).map_err(io_error(Step::Layer, "write", &path))?;
        set_mode(&path, 0o644)?;
    }
    let program = tree.join("usr/bin/clan");
    make_parent(&program)?;
    fs::copy(clan_executable, &program).map_err(io_error(Step::Layer, "copy", clan_executable))?;
    set_mode(&program, 0o755)?;

    let wants = tree.join(UNITS).join("multi-user.target.wants");
    fs::create_dir_all(&wants).map_err(io_error(Step::Layer, "create", &wants))?;
    let generators = tree.join(GENERATORS);
    fs::create_dir_all(&generators).map_err(io_error(Step::Layer, "create", &generators))?;
    let links = ENABLED.iter().map(|unit| (wants.join(unit), format!("/{UNITS}/{unit}")));
    let links = links.chain(MASKED.iter().map(|unit| (tree.join(UNITS).join(unit), "/dev/null".to_owned())));
    let links = links.chain(NO_GENERATORS.iter().map(|name| (generators.join(name), "/dev/null".to_owned())));
    let default = (tree.join(UNITS).join("default.target"), "/lib/systemd/system/multi-user.target".to_owned());
    for (link, target) in links.chain([default]) {
        symlink(&target, &link).map_err(io_error(Step::Layer, "create", &link))?;
    }
    set_directory_modes(tree)
}

fn make_parent(path: &Path) -> Result<(), BuildError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(io_error(Step::Layer, "create", parent))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), BuildError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error(Step::Layer, "change", path))
}

/// INVARIANT: every directory has mode 0755, whatever the builder's umask: in an overlay the upper directory's mode counts.
fn set_directory_modes(dir: &Path) -> Result<(), BuildError> {
    set_mode(dir, 0o755)?;
    for entry in fs::read_dir(dir).map_err(io_error(Step::Layer, "read", dir))? {
        let entry = entry.map_err(io_error(Step::Layer, "read", dir))?;
        if entry.file_type().map_err(io_error(Step::Layer, "read", dir))?.is_dir() {
            set_directory_modes(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_in_the_layer_can_be_read_by_everybody_and_written_by_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "program").unwrap();
        set_mode(&program, 0o700).unwrap();
        let tree = dir.path().join("tree");
        write(&tree, &program).unwrap();
        let mode = |path: &str| fs::symlink_metadata(tree.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode("usr/bin/clan"), 0o755);
        assert_eq!(mode("etc"), 0o755);
        assert_eq!(mode("etc/hostname"), 0o644);
        assert_eq!(fs::metadata(tree.join("etc/machine-id")).unwrap().len(), 0);
    }

    #[test]
    fn every_enabled_unit_is_in_the_layer() {
        for unit in ENABLED {
            assert!(FILES.iter().any(|(path, _)| *path == format!("{UNITS}/{unit}")), "{unit}");
            assert!(!MASKED.contains(unit));
        }
    }
}
