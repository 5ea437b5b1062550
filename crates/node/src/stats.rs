//! What the machine measures of itself, read from `/proc` and the file system.

use std::{fs, path::PathBuf, time::Duration};

use clan_types::ByteSize;
use clan_wire::control::{GuestStats, UnitStatus};
use tokio::{process::Command, time::Instant};

use crate::{core::now, sockets};

/// As the kernel shows times to programs, on all processors that Clan runs on.
const TICKS_PER_SECOND: u64 = 100;
/// Asking systemd costs a process; units change seldom.
const UNITS_EVERY: Duration = Duration::from_secs(15);
const UNITS_AFTER: Duration = Duration::from_secs(5);

/// What is measured, where machines differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Measured {
    /// A path in the file system that counts.
    pub(crate) disk: PathBuf,
    /// Systemd units of interest.
    pub(crate) units: &'static [&'static str],
    /// Whether the kernel counts for others, too: what is used is then what the processes use that are seen.
    pub(crate) shared: bool,
}

/// Takes measurements; keeps what is needed to tell the share of busy time between two of them.
pub(crate) struct Sampler {
    measured: Measured,
    busy: u64,
    total: u64,
    units: Vec<UnitStatus>,
    /// When they are asked for.
    units_due: Instant,
}

impl Sampler {
    pub(crate) fn new(measured: Measured) -> Self {
        Self { measured, busy: 0, total: 0, units: Vec::new(), units_due: Instant::now() }
    }

    /// Asks for the units only after a while: a machine that has just come up has other use for its processors.
    pub(crate) fn units_later(mut self) -> Self {
        self.units_due = Instant::now() + UNITS_AFTER;
        self
    }

    pub(crate) async fn sample(&mut self) -> GuestStats {
        let (all_busy, total) = parse_cpu(&read("/proc/stat"));
        let own = self.measured.shared.then(own_processes);
        let busy = own.map_or(all_busy, |own| own.ticks);
        let cpu_permille = share(busy.saturating_sub(self.busy), total.saturating_sub(self.total));
        (self.busy, self.total) = (busy, total);
        if self.units_due <= Instant::now() && sockets::is_still() {
            self.units = units(self.measured.units).await;
            self.units_due = Instant::now() + UNITS_EVERY;
        }
        let (memory_total, memory_available) = parse_memory(&read("/proc/meminfo"));
        let (disk_total, disk_used) = disk(&self.measured.disk);
        let uptime: u64 = read("/proc/uptime").split('.').next().and_then(|s| s.parse().ok()).unwrap_or(0);
        let (net_received, net_sent) = parse_net(&read("/proc/net/dev"));
        GuestStats {
            at: now(),
            cpu_permille,
            memory_total,
            memory_used: own.map_or_else(
                || ByteSize::from_bytes(memory_total.as_bytes().saturating_sub(memory_available.as_bytes())),
                |own| own.memory,
            ),
            disk_total,
            disk_used,
            net_received,
            net_sent,
            uptime_s: uptime.saturating_sub(own.map_or(0, |own| own.began_s)),
            units: self.units.clone(),
        }
    }
}

/// What all processes that are seen use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Own {
    ticks: u64,
    memory: ByteSize,
    /// When the first of them began, in seconds after the kernel did.
    began_s: u64,
}

fn own_processes() -> Own {
    let mut own = Own::default();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(process) = parse_process(&read(&format!("/proc/{pid}/stat"))) else { continue };
        own.ticks = own.ticks.saturating_add(process.ticks);
        own.memory = ByteSize::from_bytes(own.memory.as_bytes().saturating_add(process.memory.as_bytes()));
        if pid == 1 {
            own.began_s = process.began_s;
        }
    }
    own
}

/// One process (proc(5), `/proc/pid/stat`), whose name in parentheses may hold anything.
fn parse_process(text: &str) -> Option<Own> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    // The manual counts from 1, and the first one here is its third.
    let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let memory = ByteSize::from_bytes(number(24)?.saturating_mul(rustix::param::page_size() as u64));
    Some(Own { ticks: number(14)?.saturating_add(number(15)?), memory, began_s: number(22)? / TICKS_PER_SECOND })
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn share(part: u64, whole: u64) -> u16 {
    let permille = part.saturating_mul(1000).checked_div(whole).unwrap_or(0);
    u16::try_from(permille).unwrap_or(1000).min(1000)
}

/// Busy and total ticks of all processors since boot (proc(5), `/proc/stat`).
fn parse_cpu(text: &str) -> (u64, u64) {
    let Some(line) = text.lines().find(|l| l.starts_with("cpu ")) else { return (0, 0) };
    let ticks: Vec<u64> = line.split_whitespace().skip(1).take(8).filter_map(|n| n.parse().ok()).collect();
    let total: u64 = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    (total - idle, total)
}

/// Total and available memory.
fn parse_memory(text: &str) -> (ByteSize, ByteSize) {
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        let kib: u64 = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or(0);
        ByteSize::from_bytes(kib.saturating_mul(1024))
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

/// Bytes received and sent on the base network, that is, on all interfaces but loopback and the mesh.
fn parse_net(text: &str) -> (ByteSize, ByteSize) {
    let (mut received, mut sent) = (0u64, 0u64);
    for line in text.lines().skip(2) {
        let Some((name, counters)) = line.split_once(':') else { continue };
        if matches!(name.trim(), "lo" | "clan0") || name.trim().starts_with("clan-") {
            continue;
        }
        let counters: Vec<u64> = counters.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        received = received.saturating_add(counters.first().copied().unwrap_or(0));
        sent = sent.saturating_add(counters.get(8).copied().unwrap_or(0));
    }
    (ByteSize::from_bytes(received), ByteSize::from_bytes(sent))
}

fn disk(path: &std::path::Path) -> (ByteSize, ByteSize) {
    let Ok(stat) = rustix::fs::statvfs(path) else { return Default::default() };
    let of = |blocks: u64| ByteSize::from_bytes(blocks.saturating_mul(stat.f_frsize));
    (of(stat.f_blocks), of(stat.f_blocks.saturating_sub(stat.f_bfree)))
}

async fn units(names: &[&str]) -> Vec<UnitStatus> {
    if names.is_empty() {
        return Vec::new();
    }
    let Ok(output) = Command::new("systemctl").arg("is-active").args(names).output().await else { return Vec::new() };
    let states = String::from_utf8_lossy(&output.stdout).into_owned();
    names
        .iter()
        .zip(states.lines())
        .map(|(name, state)| UnitStatus { name: (*name).to_owned(), state: state.to_owned() })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_excludes_idle_and_waiting() {
        assert_eq!(parse_cpu("cpu  10 0 20 60 10 0 0 0 0 0\ncpu0 1 1 1 1\n"), (30, 100));
        assert_eq!(parse_cpu("nonsense"), (0, 0));
        assert_eq!(share(30, 100), 300);
        assert_eq!(share(0, 0), 0);
    }

    #[test]
    fn network_counts_leave_out_loopback_and_the_mesh() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 9 0 0 0 0 0 0 0 9 0\n  eth0: 100 1 0 0 0 0 0 0 50 1\n clan0: 7 0 0 0 0 0 0 0 7 0\n";
        assert_eq!(parse_net(text), (ByteSize::from_bytes(100), ByteSize::from_bytes(50)));
    }

    #[test]
    fn what_a_process_uses_is_found_behind_its_name() {
        let text = "7 (a) b) S 1 7 7 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 4500 1000 5 0";
        let page = rustix::param::page_size() as u64;
        let expected = Own { ticks: 42, memory: ByteSize::from_bytes(5 * page), began_s: 45 };
        assert_eq!(parse_process(text), Some(expected));
        assert_eq!(parse_process("7 (a) S 1"), None);
        assert!(own_processes().memory > ByteSize::from_mib(1));
    }

    #[test]
    fn memory_is_told_in_bytes() {
        let text = "MemTotal:  1024 kB\nMemFree: 1 kB\nMemAvailable:   512 kB\n";
        assert_eq!(parse_memory(text), (ByteSize::from_mib(1), ByteSize::from_bytes(512 << 10)));
    }
}
