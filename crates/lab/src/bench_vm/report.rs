//! Medians, ratios, the table and the file.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use clan_vm::Accelerator;
use serde::Serialize;

use crate::{
    LabError, Screen,
    bench::{keep, median},
};

const VERSION: u32 = 1;

/// A quantity. Times are milliseconds, sizes MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Key {
    BootAgent,
    BootServices,
    BootMesh,
    FirstMesh,
    Rebuild,
    RestoreMonitor,
    RestoreChannel,
    RestoreAgent,
    RestoreRenewed,
    RestoreMesh,
    Join,
    JoinFromTemplate,
    BeforeQemu,
    CopyDisk,
    TemplateSize,
    Rss,
    Pss,
    RestoredRss,
    RestoredPss,
    Written,
    GivenBack,
    GivenBackAfter,
    Probe,
    DebianServices,
    DebianRss,
    DebianPss,
}

struct Line {
    key: Key,
    title: &'static str,
    /// What it shall be at most; of what is given back, at least.
    bar: Option<f64>,
    /// What plain Debian takes for the same.
    debian: Option<Key>,
}

const fn line(key: Key, title: &'static str, bar: Option<f64>, debian: Option<Key>) -> Line {
    Line { key, title, bar, debian }
}

const LINES: [Line; 26] = [
    line(Key::BootAgent, "boot: agent answers, ms", Some(1800.0), None),
    line(Key::BootServices, "boot: services up, ms", Some(8000.0), Some(Key::DebianServices)),
    line(Key::BootMesh, "boot: in the mesh, ms", Some(10_000.0), Some(Key::DebianServices)),
    line(Key::FirstMesh, "first boot of an image, leaving a template: in the mesh, ms", None, None),
    line(Key::Rebuild, "an image again, one file of it changed, ms", None, None),
    line(Key::RestoreMonitor, "template: QEMU has read it, ms", None, None),
    line(Key::RestoreChannel, "template: channel to the agent, ms", None, None),
    line(Key::RestoreAgent, "template: agent answers, ms", Some(300.0), Some(Key::DebianServices)),
    line(Key::RestoreRenewed, "template: renewed, ms", None, None),
    line(Key::RestoreMesh, "template: in the mesh, ms", Some(2000.0), Some(Key::DebianServices)),
    line(Key::Join, "`clan join` to in the mesh, ms", None, None),
    line(Key::JoinFromTemplate, "`clan join` to in the mesh, from a template, ms", None, None),
    line(Key::BeforeQemu, "preparations before QEMU, ms", None, None),
    line(Key::CopyDisk, "copying the template's disk, ms", None, None),
    line(Key::TemplateSize, "saved state, MiB", None, None),
    line(Key::Rss, "idle, 256 MB: memory of QEMU, MiB", Some(260.0), Some(Key::DebianRss)),
    line(Key::Pss, "the same, its share, MiB", None, Some(Key::DebianPss)),
    line(Key::RestoredRss, "idle from a template, MiB", Some(260.0), Some(Key::DebianRss)),
    line(Key::RestoredPss, "the same, its share, MiB", None, Some(Key::DebianPss)),
    line(Key::Written, "300 MB written in the guest cost, MiB", None, None),
    line(Key::GivenBack, "and freed give back, MiB", Some(270.0), None),
    line(Key::GivenBackAfter, "after ms", None, None),
    line(Key::Probe, "accelerator probe, ms", Some(100.0), None),
    line(Key::DebianServices, "plain Debian: services up, ms", None, None),
    line(Key::DebianRss, "plain Debian: idle, memory of QEMU, MiB", None, None),
    line(Key::DebianPss, "the same, its share, MiB", None, None),
];

/// All that was measured.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    version: u32,
    optimised: bool,
    rounds: usize,
    processors: usize,
    /// When it began; neighbours disturb.
    load: f64,
    kernel: String,
    qemu: String,
    image: String,
    accelerator: String,
    samples: BTreeMap<Key, Vec<f64>>,
    medians: BTreeMap<Key, f64>,
    bars: BTreeMap<Key, f64>,
    /// Medians divided by plain Debian's.
    ratios: BTreeMap<Key, f64>,
}

impl Results {
    pub(super) fn new(rounds: usize, load: f64) -> Self {
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
        let qemu = qemu.map(|output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned());
        Self {
            version: VERSION,
            optimised: !cfg!(debug_assertions),
            rounds,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            load,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            qemu: qemu.unwrap_or_default(),
            image: String::new(),
            accelerator: String::new(),
            samples: BTreeMap::new(),
            medians: BTreeMap::new(),
            bars: LINES.iter().filter_map(|line| Some((line.key, line.bar?))).collect(),
            ratios: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, key: Key, number: f64) {
        let samples = self.samples.entry(key).or_default();
        samples.push(number);
        if let Some(median) = median(samples.clone()) {
            self.medians.insert(key, median);
        }
        for line in &LINES {
            if let Some(debian) = line.debian
                && let (Some(own), Some(other)) = (self.medians.get(&line.key), self.medians.get(&debian))
                && *other > 0.0
            {
                self.ratios.insert(line.key, own / other);
            }
        }
    }

    pub(super) fn image(&mut self, folder: &Path) {
        self.image = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    }

    pub(super) fn accelerator(&mut self, verdict: &Accelerator) {
        self.accelerator = format!("{:?}: {}", verdict.kind, verdict.reason);
    }

    pub(super) fn print(&self, screen: &Screen) {
        screen.line(&format!(
            "\nMedians of {} rounds on {} processors, load {:.1} at the start; {}\n{}",
            self.rounds, self.processors, self.load, self.qemu, self.accelerator
        ));
        screen.line(&format!("{:60} {:>9} {:>9} {:>9} {:>9}  {:>8}", "", "median", "least", "most", "bar", "/ Debian"));
        for line in &LINES {
            let Some(samples) = self.samples.get(&line.key) else { continue };
            let (least, most) =
                samples.iter().fold((f64::MAX, f64::MIN), |(least, most), n| (least.min(*n), most.max(*n)));
            let bar = line.bar.map_or_else(|| "-".into(), |bar| format!("{bar:.0}"));
            let ratio = self.ratios.get(&line.key).map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}"));
            let median = self.medians.get(&line.key).copied().unwrap_or_default();
            screen.line(&format!("{:60} {median:>9.1} {least:>9.1} {most:>9.1} {bar:>9}  {ratio:>8}", line.title));
        }
    }

    pub(super) fn keep(&self, file: &Path) -> Result<(), LabError> {
        keep(self, file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_quantity_has_its_line_and_ratios_follow_the_medians() {
        let mut results = Results::new(1, 0.0);
        for number in [900.0, 1000.0, 1100.0] {
            results.add(Key::DebianServices, number);
        }
        results.add(Key::BootServices, 500.0);
        assert_eq!(results.ratios.get(&Key::BootServices), Some(&0.5));
        let text = serde_json::to_value(&results).unwrap();
        assert_eq!(text["medians"]["debian_services"], 1000.0);
        let keys: std::collections::BTreeSet<_> = LINES.iter().map(|line| line.key).collect();
        assert_eq!(keys.len(), LINES.len());
    }
}
