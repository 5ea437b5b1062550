//! Medians, ratios, the table and the file.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Serialize;

use super::{BASELINE, BenchConfig, load::Sample};
use crate::{LabError, Screen};

const VERSION: u32 = 2;

/// A quantity: its name in the file, its heading in the table, and how to read it from a sample.
struct Quantity {
    key: &'static str,
    heading: &'static str,
    decimals: usize,
    of: fn(&Sample) -> f64,
}

const QUANTITIES: [Quantity; 9] = [
    Quantity { key: "one_there", heading: "1 ->", decimals: 2, of: |s| s.one_there.gbit_per_s },
    Quantity { key: "one_back", heading: "1 <-", decimals: 2, of: |s| s.one_back.gbit_per_s },
    Quantity { key: "four_there", heading: "4 ->", decimals: 2, of: |s| s.four_there.gbit_per_s },
    Quantity { key: "four_back", heading: "4 <-", decimals: 2, of: |s| s.four_back.gbit_per_s },
    Quantity { key: "small_packets_per_s", heading: "64 B/s", decimals: 0, of: |s| s.small_packets_per_s },
    Quantity { key: "ping_median_us", heading: "ping us", decimals: 0, of: |s| s.ping.median_us },
    Quantity { key: "ping_p90_us", heading: "p90 us", decimals: 0, of: |s| s.ping.p90_us },
    Quantity { key: "cpu_s_per_gb", heading: "CPU s/GB", decimals: 2, of: cpu },
    Quantity { key: "peak_mib", heading: "peak MiB", decimals: 1, of: |s| s.peak_mib },
];

fn cpu(sample: &Sample) -> f64 {
    let all = [sample.one_there, sample.one_back, sample.four_there, sample.four_back];
    all.iter().map(|throughput| throughput.cpu_s_per_gb).sum::<f64>() / all.len() as f64
}

/// All that is known about one network.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    pub(super) name: &'static str,
    /// Of its Debian package.
    version: Option<String>,
    pub(super) samples: Vec<Sample>,
    medians: BTreeMap<&'static str, f64>,
    /// Medians divided by the baseline's.
    ratios: BTreeMap<&'static str, f64>,
}

impl Measured {
    pub(super) fn new(name: &'static str, version: Option<String>) -> Self {
        Self { name, version, samples: Vec::new(), medians: BTreeMap::new(), ratios: BTreeMap::new() }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Results {
    version: u32,
    optimised: bool,
    rounds: usize,
    seconds: u64,
    /// Whether the cable took single packets only.
    plain: bool,
    processors: usize,
    kernel: String,
    baseline: &'static str,
    measured: Vec<Measured>,
}

impl Results {
    pub(super) fn new(config: &BenchConfig, mut measured: Vec<Measured>) -> Self {
        for entry in &mut measured {
            for quantity in &QUANTITIES {
                if let Some(median) = median(entry.samples.iter().map(quantity.of).collect()) {
                    entry.medians.insert(quantity.key, median);
                }
            }
        }
        let baseline = measured.iter().find(|entry| entry.name == BASELINE).map(|entry| entry.medians.clone());
        for entry in &mut measured {
            for (key, base) in baseline.iter().flatten().filter(|(_, base)| **base > 0.0) {
                if let Some(median) = entry.medians.get(key) {
                    entry.ratios.insert(key, median / base);
                }
            }
        }
        Self {
            version: VERSION,
            optimised: !cfg!(debug_assertions),
            rounds: config.rounds,
            seconds: config.seconds,
            plain: config.plain,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            baseline: BASELINE,
            measured,
        }
    }

    pub(super) fn print(&self, screen: &Screen) {
        let version = |entry: &Measured| entry.version.clone().unwrap_or_default();
        let table = |title: &str, of: fn(&Measured) -> &BTreeMap<&'static str, f64>, decimals: Option<usize>| {
            let headings: String = QUANTITIES.iter().map(|q| format!(" {:>9}", q.heading)).collect();
            screen.line(&format!("\n{title}\n{:20}{headings}  version", ""));
            for entry in self.measured.iter().filter(|entry| !entry.samples.is_empty()) {
                let numbers: String = QUANTITIES
                    .iter()
                    .map(|q| match of(entry).get(q.key) {
                        Some(number) => format!(" {number:>9.*}", decimals.unwrap_or(q.decimals)),
                        None => format!(" {:>9}", "-"),
                    })
                    .collect();
                screen.line(&format!("{:20}{numbers}  {}", entry.name, version(entry)));
            }
        };
        table(
            &format!(
                "Medians of {} rounds; Gbit/s of TCP with 1 and 4 streams, both ways; both ends on {} processors",
                self.rounds, self.processors
            ),
            |entry| &entry.medians,
            None,
        );
        table(&format!("The same, divided by {}'s", self.baseline), |entry| &entry.ratios, Some(2));
    }

    pub(super) fn keep(&self, file: &Path) -> Result<(), LabError> {
        keep(self, file)
    }
}

/// Writes what was measured as JSON; the folder is made if need be.
pub(crate) fn keep(measured: &impl Serialize, file: &Path) -> Result<(), LabError> {
    let complain = || LabError::io(format!("write {}", file.display()));
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).map_err(complain())?;
    }
    let text = serde_json::to_vec_pretty(measured).map_err(|error| complain()(error.into()))?;
    fs::write(file, text).map_err(complain())
}

/// One sample in one line.
pub(super) fn line(name: &str, sample: &Sample) -> String {
    let numbers: String = QUANTITIES.iter().map(|q| format!(" {:>9.*}", q.decimals, (q.of)(sample))).collect();
    format!("{name:20}{numbers}  load {:.1}", sample.load)
}

/// The one in the middle, or between the two there.
pub(crate) fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    let upper = *numbers.get(middle)?;
    if numbers.len() % 2 == 1 {
        return Some(upper);
    }
    Some((numbers.get(middle - 1)? + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_middle_ones() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }
}
