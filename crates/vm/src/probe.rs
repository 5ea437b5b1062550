//! Does this computer run guests with hardware acceleration?
//!
//! That `/dev/kvm` exists proves little: there are hosts whose KVM emulates a guest's kernel instruction by instruction,
//! lacks many instructions, and hangs every stock guest. So a small guest is run and timed.

mod guest;

use std::{
    fs,
    io::{self, ErrorKind},
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::file;

const DEVICE: &str = "/dev/kvm";
const CACHE: &str = "accelerator.json";
const CACHE_VERSION: u32 = 1;
/// The probe's own limit is 100 ms; longer means that the kernel does not let go of the thread.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelKind {
    /// The processor, through KVM.
    Kvm,
    /// QEMU's emulation; works everywhere, slowly.
    Tcg,
}

/// Which accelerator to use, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accelerator {
    /// The accelerator.
    pub kind: AccelKind,
    /// Why this one: a sentence.
    pub reason: String,
    /// What the user can do to get the better one, if anything: a sentence.
    pub remedy: Option<String>,
}

impl Accelerator {
    fn tcg(reason: impl Into<String>, remedy: Option<&str>) -> Self {
        Self { kind: AccelKind::Tcg, reason: reason.into(), remedy: remedy.map(str::to_owned) }
    }
}

/// Only what a guest run told is cached: whether the device is there and may be opened can change at any time, and
/// costs nothing to find out.
#[derive(Serialize, Deserialize)]
struct Cache {
    version: u32,
    boot_id: String,
    verdict: Accelerator,
}

/// Chooses the accelerator. A guest is run for at most 100 ms; the verdict on that is kept in `cache_dir` until the base
/// OS boots anew. Never fails: what does not work is a reason for emulation.
pub async fn accelerator(cache_dir: &Path) -> Accelerator {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        return unavailable(&error);
    }
    let boot_id = file::boot_id().ok();
    if let Some(verdict) = boot_id.as_deref().and_then(|id| recall(cache_dir, id)) {
        return verdict;
    }
    let verdict = match run_guest().await {
        Ok(()) => Accelerator {
            kind: AccelKind::Kvm,
            reason: "This computer runs guests with hardware acceleration.".into(),
            remedy: None,
        },
        Err(why) => Accelerator::tcg(
            format!(
                "This computer's KVM is present but does not run guests ({why}), so the virtual machine is emulated."
            ),
            Some("If this computer is itself a virtual machine, turn on nested virtualisation for it."),
        ),
    };
    tracing::debug!(kind = ?verdict.kind, reason = verdict.reason, "probed the accelerator");
    remember(cache_dir, boot_id, &verdict);
    verdict
}

/// Records that a guest did not come up under KVM although the probe had found it usable: emulation from now on, until
/// the base OS boots anew. `reason` is a sentence.
pub async fn distrust(cache_dir: &Path, reason: &str) -> Accelerator {
    let verdict = Accelerator::tcg(reason, None);
    remember(cache_dir, file::boot_id().ok(), &verdict);
    verdict
}

fn unavailable(error: &io::Error) -> Accelerator {
    match error.kind() {
        ErrorKind::NotFound => Accelerator::tcg(
            "This computer has no KVM, so the virtual machine is emulated.",
            Some("Turn on virtualisation in the firmware setup (VT-x, AMD-V or SVM)."),
        ),
        ErrorKind::PermissionDenied => Accelerator::tcg(
            "You have no permission to use KVM (/dev/kvm), so the virtual machine is emulated.",
            Some("Join the group kvm: `sudo usermod -aG kvm $USER`, then log in again."),
        ),
        _ => Accelerator::tcg(format!("KVM cannot be used ({error}), so the virtual machine is emulated."), None),
    }
}

/// On a thread of its own: the probe uses timers and signal masks that are the thread's, and the thread is given up
/// should the kernel hold it for ever.
async fn run_guest() -> Result<(), String> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            // The receiver may have given up.
            let _ = sender.send(guest::run());
        })
        .map_err(|error| format!("no thread: {error}"))?;
    match tokio::time::timeout(STUCK_AFTER, receiver).await {
        Ok(Ok(result)) => result.map_err(|error| error.to_string()),
        Ok(Err(_)) => Err("the probe failed".into()),
        Err(_) => Err("a trial guest cannot be stopped".into()),
    }
}

fn recall(cache_dir: &Path, boot_id: &str) -> Option<Accelerator> {
    let bytes = file::read_bounded(&cache_dir.join(CACHE), 64 << 10).ok()?;
    // A damaged cache is as good as none: it is made anew.
    let cache: Cache = serde_json::from_slice(&bytes).ok()?;
    (cache.version == CACHE_VERSION && cache.boot_id == boot_id).then_some(cache.verdict)
}

fn remember(cache_dir: &Path, boot_id: Option<String>, verdict: &Accelerator) {
    let Some(boot_id) = boot_id else { return };
    let cache = Cache { version: CACHE_VERSION, boot_id, verdict: verdict.clone() };
    let written = serde_json::to_vec(&cache).map_err(io::Error::from).and_then(|bytes| {
        file::create_private_dir(cache_dir).and_then(|()| file::replace(&cache_dir.join(CACHE), &bytes))
    });
    if let Err(error) = written {
        tracing::debug!(%error, "the accelerator's verdict is not cached");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lack_of_permission_names_the_group_to_join() {
        let accelerator = unavailable(&io::Error::from(ErrorKind::PermissionDenied));
        assert_eq!(accelerator.kind, AccelKind::Tcg);
        assert!(accelerator.reason.contains("permission"));
        assert!(accelerator.remedy.unwrap().contains("group kvm"));
    }

    #[test]
    fn a_verdict_is_recalled_until_the_next_boot() {
        let dir = tempfile::tempdir().unwrap();
        let verdict = Accelerator::tcg("Because.", None);
        remember(dir.path(), Some("boot-1".into()), &verdict);
        assert_eq!(recall(dir.path(), "boot-1"), Some(verdict));
        assert_eq!(recall(dir.path(), "boot-2"), None);
    }

    #[test]
    fn a_damaged_cache_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CACHE), b"{\"version\":1,").unwrap();
        assert_eq!(recall(dir.path(), "boot-1"), None);
    }
}
