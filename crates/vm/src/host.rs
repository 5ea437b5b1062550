//! Processes of the base OS, from `/proc`.

use std::{fs, io, time::Duration};

use clan_types::ByteSize;

/// What a virtual machine costs the base OS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostStats {
    /// Memory in use, the guest's and QEMU's own.
    pub rss: ByteSize,
    /// Processor time so far, all threads.
    pub cpu_time: Duration,
    /// Since the process started.
    pub uptime: Duration,
    /// Threads of the process.
    pub threads: u32,
    /// Read from disks so far; zero if the base OS does not say.
    pub disk_read: ByteSize,
    /// Written to disks so far; zero if the base OS does not say.
    pub disk_written: ByteSize,
}

/// Statistics of a process.
pub(crate) fn stats(pid: u32) -> io::Result<HostStats> {
    let stat = Stat::of(pid)?;
    let ticks = ticks_per_second();
    let since_boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let since_boot = Duration::new(since_boot.tv_sec.unsigned_abs(), u32::try_from(since_boot.tv_nsec).unwrap_or(0));
    // Needs a kernel with task I/O accounting.
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    Ok(HostStats {
        rss: ByteSize::from_bytes(stat.rss_pages.saturating_mul(rustix::param::page_size() as u64)),
        cpu_time: from_ticks(stat.cpu_ticks, ticks),
        uptime: since_boot.saturating_sub(from_ticks(stat.start_time, ticks)),
        threads: stat.threads,
        disk_read: ByteSize::from_bytes(field(&io, "read_bytes:").unwrap_or(0)),
        disk_written: ByteSize::from_bytes(field(&io, "write_bytes:").unwrap_or(0)),
    })
}

/// All that descend from a process, as far as it can be seen now.
pub(crate) fn descendants(pid: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> =
        processes().filter_map(|process| Some((process, Stat::of(process).ok()?.parent))).collect();
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(process, _)| *process));
    }
    found.split_off(1)
}

/// The first child of a process.
pub(crate) fn child_of(pid: u32) -> io::Result<u32> {
    processes().find(|&p| Stat::of(p).is_ok_and(|s| s.parent == pid)).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// All processes.
pub(crate) fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Memory that can be given to programs without swapping.
pub(crate) fn memory_available() -> Option<ByteSize> {
    let kib = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    Some(ByteSize::from_bytes(kib.saturating_mul(1024)))
}

/// The parts of `/proc/<pid>/stat` that matter here.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    /// What the process calls itself, at most 15 bytes of it.
    pub(crate) name: String,
    /// Dead, but not yet reaped.
    pub(crate) zombie: bool,
    /// The process that started it, or that took it over.
    pub(crate) parent: u32,
    /// Ticks since the base OS booted; with the process id, unique within a boot.
    pub(crate) start_time: u64,
    cpu_ticks: u64,
    threads: u32,
    rss_pages: u64,
}

impl Stat {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(text: &str) -> Option<Self> {
        // The name is in parentheses and may contain anything, parentheses too.
        let (start, end) = (text.find('(')? + 1, text.rfind(')')?);
        let fields: Vec<&str> = text.get(end + 1..)?.split_whitespace().collect();
        // proc(5) counts from 1, and the state is field 3.
        let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
        Some(Self {
            name: text.get(start..end)?.to_owned(),
            zombie: matches!(*fields.first()?, "Z" | "X"),
            parent: u32::try_from(number(4)?).ok()?,
            cpu_ticks: number(14)?.saturating_add(number(15)?),
            threads: u32::try_from(number(20)?).ok()?,
            start_time: number(22)?,
            rss_pages: number(24)?,
        })
    }
}

fn ticks_per_second() -> u64 {
    rustix::param::clock_ticks_per_second().max(1)
}

fn from_ticks(ticks: u64, per_second: u64) -> Duration {
    Duration::from_millis(ticks.saturating_mul(1000) / per_second)
}

/// The number after a label at the start of a line.
fn field(text: &str, label: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(label))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_parentheses_does_not_shift_the_fields() {
        let text = "77 (a) R 1 (b)) S 1 77 77 0 -1 4194304 1 2 3 4 50 25 0 0 20 0 3 0 123456 1000000 256 1";
        let stat = Stat::parse(text).unwrap();
        let name = "a) R 1 (b)".into();
        let expected =
            Stat { name, zombie: false, parent: 1, start_time: 123_456, cpu_ticks: 75, threads: 3, rss_pages: 256 };
        assert_eq!(stat, expected);
    }

    #[test]
    fn a_cut_off_line_is_refused() {
        assert_eq!(Stat::parse("77 (qemu) S 1 77"), None);
        assert_eq!(Stat::parse("77 qemu"), None);
    }

    #[test]
    fn this_process_has_statistics() {
        let stats = stats(std::process::id()).unwrap();
        assert!(stats.rss > ByteSize::from_mib(1) && stats.threads >= 1);
        assert!(stats.uptime < Duration::from_secs(3600));
    }
}
