//! A plain Debian: the same kernel, memory and processors, with Debian's initramfs and systemd.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tokio::time::sleep;

use super::{Bench, Key, MEMORY, Results, age, memory, millis, settled};
use crate::{LabError, process::end};

const TOLD: &str = "plain-debian-is-up";
const LIMIT: Duration = Duration::from_secs(180);
const SETTLE: Duration = Duration::from_secs(60);

/// Its files.
pub(super) struct Debian {
    folder: PathBuf,
    kernel: PathBuf,
}

impl Debian {
    /// The files, if they are there and belong to this kernel.
    pub(super) fn find(folder: &Path, kernel: &Path) -> Result<Option<Self>, LabError> {
        let Ok(version) = fs::read_to_string(folder.join("kernel-version")) else { return Ok(None) };
        let image = fs::read(kernel).map_err(LabError::io(format!("read {}", kernel.display())))?;
        let banner = format!("Linux version {} ", version.trim());
        let same = image.windows(banner.len()).any(|window| window == banner.as_bytes());
        Ok(same.then(|| Self { folder: folder.to_owned(), kernel: kernel.to_owned() }))
    }

    /// Boots it, and ends it when it is idle. Its disk stays as it is: every boot is the first.
    pub(super) async fn boot(&self, bench: &Bench<'_>, folder: &Path, results: &mut Results) -> Result<(), LabError> {
        let log = folder.join("console.log");
        let mut qemu = Running(self.start(folder, &log)?);
        let pid = qemu.0.id();
        let began = Instant::now();
        while !fs::read(&log).is_ok_and(|text| text.windows(TOLD.len()).any(|window| window == TOLD.as_bytes())) {
            bench.interrupted()?;
            if began.elapsed() > LIMIT || !matches!(qemu.0.try_wait(), Ok(None)) {
                let said = crate::lab::last_lines(&log, 20);
                return Err(LabError::Promise(format!("the plain Debian does not come up:\n{said}")));
            }
            sleep(Duration::from_millis(10)).await;
        }
        let ended = || LabError::Promise("the plain Debian ended".into());
        results.add(Key::DebianServices, millis(age(pid).ok_or_else(ended)?));
        settled(pid, SETTLE).await;
        let (rss, pss) = memory(pid).ok_or_else(ended)?;
        results.add(Key::DebianRss, rss);
        results.add(Key::DebianPss, pss);
        Ok(())
    }

    fn start(&self, folder: &Path, log: &Path) -> Result<Child, LabError> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-machine", "q35", "-accel", "tcg,tb-size=32", "-cpu", "max", "-smp", "1"]);
        command.args(["-m", &format!("{MEMORY}M"), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(self.folder.join("initrd.img"));
        command.args(["-append", "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0"]);
        command.arg("-serial").arg(format!("file:{}", log.display()));
        let root = self.folder.join("root.ext4");
        command.arg("-drive").arg(format!("file={},format=raw,if=virtio,snapshot=on", root.display()));
        command.args([
            "-device",
            "virtio-rng-pci",
            "-netdev",
            "user,id=net",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ]);
        let said = fs::File::create(folder.join("qemu.log")).map_err(LabError::io("make a log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        command.spawn().map_err(LabError::io("start the plain Debian"))
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}
