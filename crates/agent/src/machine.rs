//! What the agent does to, and knows of, the guest.

use std::{fs, io};

use clan_types::Timestamp;
use rustix::system::RebootCommand;

/// The guest, as the manager sees and steers it.
pub(crate) trait Machine {
    /// Since boot, milliseconds.
    fn uptime_ms(&self) -> u64;
    /// Different after each boot.
    fn boot_id(&self) -> String;
    /// Sets the wall clock.
    fn set_clock(&mut self, now: Timestamp) -> io::Result<()>;
    /// Asks the guest's init to stop everything and power off.
    fn power_off(&mut self) -> io::Result<()>;
    /// Powers off without asking anybody; what was written is on the disks.
    fn power_off_now(&mut self) -> io::Result<()>;
}

/// The guest that this program runs in.
pub(crate) struct Guest;

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
        Ok(rustix::system::reboot(RebootCommand::PowerOff)?)
    }
}
