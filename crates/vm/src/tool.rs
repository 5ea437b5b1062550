//! Finding programs of the base OS, and the packages that have them.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access};

/// Where distributions put what an ordinary user's `PATH` does not list.
const HIDDEN: [&str; 4] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/libexec"];

/// The first executable file of one of these names, on `PATH` or where distributions hide it.
pub(crate) fn find(names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    let mut places: Vec<PathBuf> = env::split_paths(&path).filter(|p| p.is_absolute()).collect();
    places.extend(HIDDEN.map(PathBuf::from));
    names.iter().flat_map(|name| places.iter().map(move |p| p.join(name))).find(|p| is_executable(p))
}

pub(crate) fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

/// The package of this distribution that has QEMU for x86-64.
pub(crate) fn qemu_package() -> &'static str {
    qemu_package_of(&fs::read_to_string("/etc/os-release").unwrap_or_default())
}

fn qemu_package_of(os_release: &str) -> &'static str {
    let ids = os_release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|ids| ids.trim_matches('"').split_whitespace());
    for id in ids {
        match id {
            "debian" | "ubuntu" => return "qemu-system-x86",
            "fedora" => return "qemu-system-x86-core",
            "rhel" | "centos" => return "qemu-kvm",
            "arch" => return "qemu-system-x86",
            "alpine" => return "qemu-system-x86_64",
            "suse" | "opensuse" => return "qemu-x86",
            _ => {}
        }
    }
    "qemu"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_distributions_name_their_parents_package() {
        assert_eq!(qemu_package_of("NAME=Mint\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), "qemu-system-x86");
        assert_eq!(qemu_package_of("ID=fedora\n"), "qemu-system-x86-core");
        assert_eq!(qemu_package_of(""), "qemu");
    }
}
