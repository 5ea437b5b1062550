//! How fast a VM is, with a plain Debian of the same kernel, memory and processors beside it, in the same session and
//! interleaved. Numbers are kept as JSON; nothing passes or fails by them.
//!
//! Times count from the start of QEMU's process. A machine is measured alone; but the way into the mesh is measured in the
//! story's lab, where the founder's VM stands idle beside it.

mod debian;
mod guest;
mod mesh;
mod report;

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clan_vm::{ImageFiles, probe};

use self::report::{Key, Results};
use crate::{LabConfig, LabError, Screen, bench::load_average, sweep::remove};

/// The load average from which on neighbours disturb.
const BUSY: f64 = 0.5;
/// What a guest of the comparison has, in MiB.
const MEMORY: u64 = 256;
/// What is written in a guest and freed again, in MiB.
const FREED: u64 = 300;
/// The accelerator is probed so often.
const PROBES: usize = 5;

/// What to measure.
#[derive(Debug, Clone)]
pub struct VmBenchConfig {
    /// The lab for the part with the mesh; its account, state folder and programs are used for all.
    pub lab: LabConfig,
    /// Rounds; in each, everything is measured once.
    pub rounds: usize,
    /// An image's folder; else the lab's story is told, and its image used.
    pub image: Option<PathBuf>,
    /// Where `scripts/plain-debian` put its files.
    pub debian: PathBuf,
    /// The JSON file.
    pub out: PathBuf,
}

/// Measures, prints a table, and writes the JSON file. With an image given, the mesh is left out.
///
/// # Errors
/// Without root, or when the lab cannot be laid, a guest does not do what it should, or the file cannot be written.
pub fn run(config: &VmBenchConfig, screen: &Screen) -> Result<(), LabError> {
    if cfg!(debug_assertions) {
        screen.line("This build is not optimised: it says little about the product. Use `make bench-vm`.");
    }
    let load = load_average();
    if load > BUSY {
        screen.line(&format!("This machine is busy (load {load:.1}): times say little. Measure when it rests."));
    }
    let mut results = Results::new(config.rounds, load);
    let folder = config.lab.state_root()?.join("bench-vm");
    remove(&folder)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(LabError::io(format!("make {}", folder.display())))?;
    let measured = measure(config, screen, &folder, &mut results);
    remove(&folder)?;
    measured?;
    results.print(screen);
    results.keep(&config.out)?;
    screen.line(&format!("Kept in {}", config.out.display()));
    Ok(())
}

fn measure(config: &VmBenchConfig, screen: &Screen, folder: &Path, results: &mut Results) -> Result<(), LabError> {
    let image = match &config.image {
        Some(image) => image.clone(),
        None => mesh::measure(config, screen, results)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(LabError::io("start a runtime"))?;
    // The lab's belongs to another user, whose folder even root may not enter from a namespace without capabilities.
    let own = folder.join("image");
    copy_files(&image, &own)?;
    let bench = Bench { config, screen, folder, files: files(&own) };
    results.image(&image);
    runtime.block_on(bench.run(results))
}

struct Bench<'a> {
    config: &'a VmBenchConfig,
    screen: &'a Screen,
    folder: &'a Path,
    files: ImageFiles,
}

impl Bench<'_> {
    async fn run(&self, results: &mut Results) -> Result<(), LabError> {
        for _ in 0..PROBES {
            // A folder without a verdict: the trial guest runs each time.
            let cache = self.fresh("probe")?;
            let began = Instant::now();
            let verdict = probe::accelerator(&cache).await;
            results.add(Key::Probe, millis(began.elapsed()));
            results.accelerator(&verdict);
        }
        let debian = debian::Debian::find(&self.config.debian, &self.files.kernel)?;
        if debian.is_none() {
            self.screen.line("There is no plain Debian of this kernel (`make bench-vm` builds it): it is left out.");
        }
        self.said("making a template");
        let template = guest::Template::make(self, &self.fresh("template")?).await?;
        results.add(Key::TemplateSize, template.state_mib()?);
        for round in 1..=self.config.rounds {
            self.said(&format!("round {round}/{}: a boot", self.config.rounds));
            guest::boot(self, &self.fresh("boot")?, results).await?;
            self.interrupted()?;
            self.said(&format!("round {round}/{}: from the template", self.config.rounds));
            guest::restore(self, &template, &self.fresh("restore")?, results).await?;
            self.interrupted()?;
            if let Some(debian) = &debian {
                self.said(&format!("round {round}/{}: plain Debian", self.config.rounds));
                debian.boot(self, &self.fresh("debian")?, results).await?;
                self.interrupted()?;
            }
            self.said(&format!("round {round}/{}: memory given back", self.config.rounds));
            guest::give_back(self, &self.fresh("memory")?, results).await?;
        }
        Ok(())
    }

    /// An empty folder; what was in it goes.
    fn fresh(&self, name: &str) -> Result<PathBuf, LabError> {
        let path = self.folder.join(name);
        remove(&path)?;
        fs::create_dir(&path).map_err(LabError::io(format!("make {}", path.display())))?;
        Ok(path)
    }

    fn said(&self, text: &str) {
        self.screen.line(&format!("   {text}"));
    }

    fn interrupted(&self) -> Result<(), LabError> {
        if self.config.lab.interrupt.is_set() { Err(LabError::Interrupted) } else { Ok(()) }
    }
}

fn copy_files(from: &Path, to: &Path) -> Result<(), LabError> {
    let complain = || LabError::io(format!("copy {}", from.display()));
    fs::create_dir(to).map_err(complain())?;
    for entry in fs::read_dir(from).map_err(complain())? {
        let entry = entry.map_err(complain())?;
        fs::copy(entry.path(), to.join(entry.file_name())).map_err(complain())?;
    }
    Ok(())
}

fn files(image: &Path) -> ImageFiles {
    ImageFiles {
        kernel: image.join("kernel"),
        initramfs: image.join("initramfs"),
        root: image.join("root.erofs"),
        layer: image.join("layer.erofs"),
        boot: image.join("boot.img"),
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// How long a process has run: to the hundredth of a second.
fn age(pid: u32) -> Option<Duration> {
    let ticks = crate::process::ProcessId::of(pid)?.started;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(u64::try_from(now.tv_sec).ok()?, u32::try_from(now.tv_nsec).ok()?);
    now.checked_sub(Duration::from_millis(ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1)))
}

/// A process's memory, MiB: all of it, and its share of what several have.
fn memory(pid: u32) -> Option<(f64, f64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let of = |label: &str| {
        let kib = text.lines().find_map(|line| line.strip_prefix(label))?.split_whitespace().next()?;
        Some(kib.parse::<f64>().ok()? / 1024.0)
    };
    Some((of("Rss:")?, of("Pss:")?))
}

/// Processor time of a process so far.
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1)))
}

/// Waits until a process does next to nothing, at most `limit`.
async fn settled(pid: u32, limit: Duration) {
    const QUIET: Duration = Duration::from_secs(1);
    let began = Instant::now();
    let mut before = cpu_time(pid);
    while began.elapsed() < limit {
        tokio::time::sleep(QUIET).await;
        let now = cpu_time(pid);
        if let (Some(before), Some(now)) = (before, now)
            && now.saturating_sub(before) < QUIET / 10
        {
            return;
        }
        before = now;
    }
}
