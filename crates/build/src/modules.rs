//! Which modules a guest needs before it has a root, and in which order they load.

use std::collections::{BTreeMap, BTreeSet};

use crate::ModuleError;

/// Modules that the agent loads: what QEMU offers a guest, the file systems of its root, and the device of the mesh.
pub(crate) const INITRAMFS: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "virtio_balloon",
    "erofs",
    "overlay",
    "tun",
];

/// Those of them without which nobody can be answered: they are loaded before the others.
pub(crate) const FIRST: &[&str] = &["virtio_pci", "virtio_console"];

/// The kernel's index of modules (`modules.dep`), with what is built in (`modules.builtin`).
#[derive(Debug, Default)]
pub(crate) struct ModuleIndex {
    /// Name → path, and names of what must be loaded before.
    modules: BTreeMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
}

impl ModuleIndex {
    /// Reads both files.
    pub(crate) fn parse(dep: &str, builtin: &str) -> Result<Self, ModuleError> {
        let mut index = Self { modules: BTreeMap::new(), builtin: builtin.lines().map(name_of).collect() };
        for (number, line) in dep.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let (path, needs) = line.split_once(':').ok_or(ModuleError::BadIndex { line: number + 1 })?;
            index
                .modules
                .insert(name_of(path), (path.trim().to_owned(), needs.split_whitespace().map(name_of).collect()));
        }
        if index.modules.is_empty() { Err(ModuleError::NoIndex) } else { Ok(index) }
    }

    /// The paths of the named modules and of all that they need, each once, in an order in which they load.
    pub(crate) fn load_order(&self, names: &[&str]) -> Result<Vec<&str>, ModuleError> {
        let mut order = Vec::new();
        let mut done = BTreeSet::new();
        for name in names {
            self.visit(&name_of(name), &mut Vec::new(), &mut done, &mut order)?;
        }
        Ok(order)
    }

    fn visit<'a>(
        &'a self,
        name: &str,
        above: &mut Vec<String>,
        done: &mut BTreeSet<String>,
        order: &mut Vec<&'a str>,
    ) -> Result<(), ModuleError> {
        if done.contains(name) || self.builtin.contains(name) {
            return Ok(());
        }
        if above.iter().any(|a| a == name) {
            return Err(ModuleError::Cycle(name.to_owned()));
        }
        let (path, needs) = self.modules.get(name).ok_or_else(|| ModuleError::Missing(name.to_owned()))?;
        if !path.ends_with(".ko") {
            return Err(ModuleError::Compressed(name.to_owned()));
        }
        above.push(name.to_owned());
        for need in needs {
            self.visit(need, above, done, order)?;
        }
        above.pop();
        done.insert(name.to_owned());
        order.push(path);
        Ok(())
    }
}

/// A module's name: file names may have hyphens, names have underscores.
fn name_of(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    file.split_once(".ko").map_or(file, |(name, _)| name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEP: &str = "\
kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko kernel/virtio.ko
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
kernel/drivers/char/virtio-rng.ko: kernel/virtio.ko
kernel/virtio.ko:
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
kernel/packed.ko.xz:
";

    #[test]
    fn what_a_module_needs_loads_before_it_and_once() {
        let index = ModuleIndex::parse(DEP, "kernel/crypto/crc32c-generic.ko\n").unwrap();
        assert_eq!(
            index.load_order(&["virtio_rng", "virtio_net", "crc32c_generic"]).unwrap(),
            [
                "kernel/virtio.ko",
                "kernel/drivers/char/virtio-rng.ko",
                "kernel/net/core/failover.ko",
                "kernel/drivers/net/net_failover.ko",
                "kernel/drivers/net/virtio_net.ko"
            ]
        );
    }

    #[test]
    fn what_cannot_be_loaded_is_named() {
        let index = ModuleIndex::parse(DEP, "").unwrap();
        assert_eq!(index.load_order(&["zfs"]), Err(ModuleError::Missing("zfs".into())));
        assert_eq!(index.load_order(&["a"]), Err(ModuleError::Cycle("a".into())));
        assert_eq!(index.load_order(&["packed"]), Err(ModuleError::Compressed("packed".into())));
        assert_eq!(ModuleIndex::parse("no colon\n", "").unwrap_err(), ModuleError::BadIndex { line: 1 });
        assert_eq!(ModuleIndex::parse("", "").unwrap_err(), ModuleError::NoIndex);
    }

    proptest! {
        #[test]
        fn in_any_order_every_need_comes_first(needs in proptest::collection::vec(proptest::collection::vec(0usize..20, 0..4), 20)) {
            let mut dep = String::new();
            for (i, needs) in needs.iter().enumerate() {
                // Only lower numbers are needed, so there is no circle.
                let list: Vec<_> = needs.iter().filter(|n| **n < i).map(|n| format!("m{n}.ko")).collect();
                dep.push_str(&format!("m{i}.ko: {}\n", list.join(" ")));
            }
            let index = ModuleIndex::parse(&dep, "").unwrap();
            let order = index.load_order(&["m19", "m7", "m19"]).unwrap();
            for (at, path) in order.iter().enumerate() {
                let i: usize = path[1..path.len() - 3].parse().unwrap();
                for need in needs[i].iter().filter(|n| **n < i) {
                    let need = format!("m{need}.ko");
                    prop_assert!(order[..at].contains(&need.as_str()));
                }
                prop_assert!(!order[..at].contains(path));
            }
        }
    }
}
