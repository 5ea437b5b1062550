//! The initramfs: the agent as `/init`, and the kernel modules it loads.

use std::{collections::BTreeMap, io::Read, path::Path};

use crate::{
    BuildError, KernelError, ModuleError, Step,
    cpio::Cpio,
    files::io_error,
    modules::{FIRST, INITRAMFS, ModuleIndex},
};

/// Larger files in the kernel bundle are refused.
const MAX_ENTRY: u64 = 64 << 20;

/// What the package step took from the kernel package: the boot image and the modules of the guest.
#[derive(Debug, Default)]
pub(crate) struct KernelBundle {
    /// The boot image, as packaged.
    pub(crate) vmlinuz: Vec<u8>,
    /// Files under the modules' directory, by path.
    modules: BTreeMap<String, Vec<u8>>,
}

impl KernelBundle {
    /// Reads the bundle: a tar archive with `out/vmlinuz` and `out/modules/`.
    pub(crate) fn read(path: &Path) -> Result<Self, BuildError> {
        let error = |source| io_error(Step::Kernel, "read", path)(source);
        let mut bundle = Self::default();
        let mut archive = tar::Archive::new(std::fs::File::open(path).map_err(error)?);
        for entry in archive.entries().map_err(error)? {
            let mut entry = entry.map_err(error)?;
            if !entry.header().entry_type().is_file() || entry.size() > MAX_ENTRY {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).map_err(error)?;
            match name.trim_start_matches("./").split_once('/') {
                Some((_, "vmlinuz")) => bundle.vmlinuz = content,
                Some((_, path)) => {
                    bundle.modules.insert(path.trim_start_matches("modules/").to_owned(), content);
                }
                None => {}
            }
        }
        if bundle.vmlinuz.is_empty() { Err(KernelError::Missing.into()) } else { Ok(bundle) }
    }

    fn text(&self, path: &str) -> Result<String, ModuleError> {
        self.modules.get(path).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).ok_or(ModuleError::NoIndex)
    }

    /// The initramfs that loads these modules. INVARIANT: kernel and modules are of one bundle, or nothing would load.
    pub(crate) fn initramfs(&self, agent: &[u8]) -> Result<Vec<u8>, ModuleError> {
        let index = ModuleIndex::parse(&self.text("modules.dep")?, &self.text("modules.builtin")?)?;
        let mut list = String::new();
        let mut modules = BTreeMap::new();
        for path in index.load_order(&[FIRST, INITRAMFS].concat())? {
            let file = path.rsplit('/').next().unwrap_or(path);
            let content = self.modules.get(path).ok_or_else(|| ModuleError::Missing(file.to_owned()))?;
            list.push_str(&format!("/modules/{file}\n"));
            modules.insert(file, content);
        }
        let mut cpio = Cpio::default();
        cpio.directory("dev");
        cpio.device("dev/console", 5, 1);
        cpio.device("dev/kmsg", 1, 11);
        cpio.device("dev/null", 1, 3);
        cpio.file("init", 0o755, agent);
        cpio.directory("modules");
        cpio.file("modules.list", 0o644, list.as_bytes());
        for (file, content) in modules {
            cpio.file(&format!("modules/{file}"), 0o644, content);
        }
        cpio.directory("proc");
        cpio.directory("sys");
        Ok(cpio.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bundle with all modules of the initramfs, each needing the first one.
    pub(crate) fn bundle() -> KernelBundle {
        let mut bundle = KernelBundle { vmlinuz: b"kernel".to_vec(), modules: BTreeMap::new() };
        let mut dep = "kernel/virtio.ko:\n".to_owned();
        bundle.modules.insert("kernel/virtio.ko".into(), b"virtio".to_vec());
        for name in INITRAMFS {
            dep.push_str(&format!("kernel/{name}.ko: kernel/virtio.ko\n"));
            bundle.modules.insert(format!("kernel/{name}.ko"), name.as_bytes().to_vec());
        }
        bundle.modules.insert("modules.dep".into(), dep.into_bytes());
        bundle.modules.insert("modules.builtin".into(), Vec::new());
        bundle
    }

    #[test]
    fn equal_inputs_give_an_equal_initramfs() {
        let one = bundle().initramfs(b"agent").unwrap();
        assert_eq!(one, bundle().initramfs(b"agent").unwrap());
        assert_ne!(one, bundle().initramfs(b"other").unwrap());
        let text = String::from_utf8_lossy(&one).into_owned();
        let order = "/modules/virtio.ko\n/modules/virtio_pci.ko\n/modules/virtio_console.ko\n/modules/virtio_blk.ko\n";
        assert!(text.contains(order), "the list is in load order");
    }

    #[test]
    fn a_module_that_the_bundle_lacks_is_named() {
        let mut bundle = bundle();
        bundle.modules.remove("kernel/overlay.ko");
        assert_eq!(bundle.initramfs(b"agent"), Err(ModuleError::Missing("overlay.ko".into())));
    }
}
