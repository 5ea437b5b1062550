//! The kernel on its way into a guest.
//!
//! QEMU keeps the file mapped for as long as it runs, and never reads it again once the guest has it, as a reset ends it
//! (`-no-reboot`). A file that several read could not be taken away from one of them, so each is lent one of its own.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{Begin, VmSpec, args, file, process::Dir};

/// A kernel's file that nobody else reads, or the image's own if there is no room for another.
#[derive(Debug)]
pub(crate) struct Lent {
    path: PathBuf,
    own: bool,
}

impl Lent {
    /// Copies the kernel into the virtual machine's directory. One that goes on from a saved state has it in its memory.
    pub(crate) async fn to(spec: &VmSpec, dir: &Dir) -> Self {
        let image = spec.image.kernel.clone();
        if matches!(spec.begin, Begin::Saved(_)) {
            return Self { path: image, own: false };
        }
        let to = dir.join(args::KERNEL);
        let copied = {
            let (from, to) = (image.clone(), to.clone());
            tokio::task::spawn_blocking(move || copy(&from, &to)).await
        };
        match copied.map_err(io::Error::other).and_then(|copied| copied) {
            Ok(()) => Self { path: to, own: true },
            Err(error) => {
                tracing::debug!(%error, "the kernel stays in the memory of the base OS");
                Self { path: image, own: false }
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the file away, and with it what QEMU has mapped of it. Only once QEMU's main loop runs: the guest's memory is
    /// filled before.
    pub(crate) fn take_back(&self) {
        if self.own
            && let Err(error) = File::options().write(true).truncate(true).open(&self.path)
        {
            tracing::debug!(%error, "the kernel stays in the memory of the base OS");
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.own {
            // The next start writes over it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    // A file that an earlier start left may be mapped by whoever that was.
    file::remove(to)?;
    fs::copy(from, to).inspect_err(|_| {
        // Half of it is of no use.
        let _ = fs::remove_file(to);
    })?;
    Ok(())
}
