//! What the agent does to, and knows of, the guest.

use std::{
    fs, io,
    sync::Arc,
    time::{Duration, Instant},
};

use clan_types::Timestamp;
use rustix::system::RebootCommand;

use crate::{disk, log, renew, start::Start};

/// A guest that goes on from a template is in its clan's mesh by then, unless its computer is very busy.
const JOURNAL_AFTER: Duration = Duration::from_secs(5);

/// The guest, as the manager sees and steers it.
pub(crate) trait Machine {
    /// Since boot, milliseconds.
    fn uptime_ms(&self) -> u64;
    /// Different after each boot.
    fn boot_id(&self) -> String;
    /// What has gone wrong while it was started.
    fn problems(&self) -> Vec<String>;
    /// When [`Machine::handle_timeout`] is due.
    fn next_timeout(&self) -> Option<Instant>;
    /// Does what had time.
    fn handle_timeout(&mut self, now: Instant);
    /// Sets the wall clock.
    fn set_clock(&mut self, now: Timestamp) -> io::Result<()>;
    /// Takes off the disk what only one guest may have.
    fn seal(&mut self) -> io::Result<()>;
    /// Stirs the random numbers, and makes a guest that was one of many one that differs.
    fn renew(&mut self, entropy: &[u8]) -> io::Result<()>;
    /// Writes everything to the disks.
    fn sync(&mut self);
    /// Has the file system on the data disk use all of the disk, which has so many bytes at least.
    fn grow_disk(&mut self, least: u64) -> io::Result<()>;
    /// Asks the guest's init to stop everything and power off.
    fn power_off(&mut self) -> io::Result<()>;
    /// Powers off without asking anybody; what was written is on the disks.
    fn power_off_now(&mut self) -> io::Result<()>;
}

/// The guest that this program runs in. What needs its root file system waits for that.
pub(crate) struct Guest {
    start: Arc<Start>,
    /// When the journal is to learn who this guest is now.
    journal: Option<Instant>,
}

impl Guest {
    pub(crate) fn new(start: Arc<Start>) -> Self {
        Self { start, journal: None }
    }
}

impl Machine for Guest {
    fn uptime_ms(&self) -> u64 {
        let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let (seconds, rest) = text.split_once('.').unwrap_or_default();
        let hundredths = rest.get(..2).and_then(|digits| digits.parse::<u64>().ok()).unwrap_or(0);
        seconds.parse::<u64>().unwrap_or(0) * 1000 + hundredths * 10
    }

    fn boot_id(&self) -> String {
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim_end().to_owned()
    }

    fn problems(&self) -> Vec<String> {
        self.start.problems()
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.journal
    }

    fn handle_timeout(&mut self, now: Instant) {
        if self.journal.take_if(|due| *due <= now).is_some()
            && let Err(error) = renew::journal()
        {
            log::error(&format!("the journal was not renewed: {error}"));
        }
    }

    fn set_clock(&mut self, now: Timestamp) -> io::Result<()> {
        let out_of_range = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let millis = i64::try_from(now.as_millis()).map_err(out_of_range)?;
        let time = libc::timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
        // SAFETY: the kernel only reads the structure, which lives through the call.
        match unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn seal(&mut self) -> io::Result<()> {
        self.start.wait_for_root()?;
        renew::seal()
    }

    fn renew(&mut self, entropy: &[u8]) -> io::Result<()> {
        self.start.wait_for_root()?;
        if renew::renew(entropy)? {
            self.journal = Some(Instant::now() + JOURNAL_AFTER);
        }
        Ok(())
    }

    fn sync(&mut self) {
        rustix::fs::sync();
    }

    fn grow_disk(&mut self, least: u64) -> io::Result<()> {
        self.start.wait_for_root()?;
        disk::grow(least)
    }

    fn power_off(&mut self) -> io::Result<()> {
        if std::process::id() == 1 {
            // No init was started, so there is nothing to stop.
            return self.power_off_now();
        }
        // Systemd powers off on this signal, as `systemctl poweroff` does.
        // SAFETY: takes no pointers.
        match unsafe { libc::kill(1, libc::SIGRTMIN() + 4) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn power_off_now(&mut self) -> io::Result<()> {
        rustix::fs::sync();
        if std::process::id() != 1
            && let Err(error) = hold_init()
        {
            log::error(&format!("init goes on while the guest powers off: {error}"));
        }
        Ok(rustix::system::reboot(RebootCommand::PowerOff)?)
    }
}

/// Stops process 1 for good. The kernel takes the disks away before it cuts the power: an init that then reads a page of
/// its own program is killed, and the kernel panics over that, which resets the guest instead. Signals that stop others
/// do not stop init; a tracer does.
fn hold_init() -> io::Result<()> {
    let trace = |request| {
        // SAFETY: neither request reads or writes memory of this process.
        match unsafe {
            libc::ptrace(request, 1, std::ptr::null_mut::<libc::c_void>(), std::ptr::null_mut::<libc::c_void>())
        } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    trace(libc::PTRACE_SEIZE)?;
    trace(libc::PTRACE_INTERRUPT)
}
