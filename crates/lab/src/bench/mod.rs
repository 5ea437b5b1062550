//! How fast the mesh is, with the rivals beside it: two computers joined by a virtual cable, one network after the other
//! laid over it, everything in the same session and interleaved. Numbers are kept as JSON; nothing passes or fails by them.
//!
//! Both computers share this machine's processors, with the load's sender and receiver: only the ratios of one session
//! say something, and only about this machine.

mod candidates;
mod clan;
mod end;
mod load;
mod report;
mod site;

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

pub use end::{EndConfig, tunnel_end};
pub(crate) use load::load_average;
pub(crate) use report::{keep, median};

use self::{
    candidates::Candidate,
    load::Sample,
    report::{Measured, Results},
    site::Site,
};
use crate::{Interrupt, LabError, Screen};

/// What everything is compared with: the present version, from Debian unstable.
const BASELINE: &str = "wireguard-go";
/// How long a network may take until its first ping is answered.
const MEETS_WITHIN: Duration = Duration::from_secs(20);
/// The load average from which on neighbours disturb.
const BUSY: f64 = 0.5;
/// Lets a daemon settle before its memory is read and its speed measured.
const SETTLE: Duration = Duration::from_millis(500);

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchConfig {
    /// In front of the names of namespaces.
    pub prefix: String,
    /// Rounds; in each, every network is measured once.
    pub rounds: usize,
    /// Seconds for each of the four throughput measurements.
    pub seconds: u64,
    /// Names of networks; all if empty.
    pub only: Vec<String>,
    /// Where `scripts/rivals` unpacked the rivals.
    pub rivals: PathBuf,
    /// Whether the cable takes single packets only, as a plain network card does, rather than super-packets.
    pub plain: bool,
    /// The JSON file.
    pub out: PathBuf,
    /// Asks for the end from another thread.
    pub interrupt: Interrupt,
}

/// Measures, prints a table, and writes the JSON file.
///
/// # Errors
/// Without root, or if the namespaces or the file cannot be made. A network that does not come up is reported and left out.
pub fn run(config: &BenchConfig, screen: &Screen) -> Result<(), LabError> {
    let candidates = candidates::all(&config.rivals)
        .into_iter()
        .filter(|candidate| config.only.is_empty() || config.only.iter().any(|name| *name == candidate.name))
        .collect::<Vec<_>>();
    let missing = candidates.iter().filter(|candidate| !candidate.is_there()).map(|candidate| candidate.name);
    for name in missing {
        screen.line(&format!("{name} is not here (`make bench-mesh` builds or fetches it), and is left out."));
    }
    if cfg!(debug_assertions) {
        screen.line("This build is not optimised: the numbers mean little. Use `make bench-mesh`.");
    }
    let load = load::load_average();
    if load > BUSY {
        screen.line(&format!(
            "This machine is busy (load {load:.1}): pings and ratios say little. Measure when it rests."
        ));
    }
    let mut measured: Vec<Measured> = candidates
        .iter()
        .filter(|candidate| candidate.is_there())
        .map(|candidate| Measured::new(candidate.name, candidate.version()))
        .collect();
    for round in 1..=config.rounds {
        for candidate in candidates.iter().filter(|candidate| candidate.is_there()) {
            match sample(config, candidate) {
                Ok(sample) => {
                    screen.line(&format!("round {round}/{}  {}", config.rounds, report::line(candidate.name, &sample)));
                    let entry = measured.iter_mut().find(|entry| entry.name == candidate.name);
                    entry.into_iter().for_each(|entry| entry.samples.push(sample.clone()));
                }
                Err(LabError::Interrupted) => return Err(LabError::Interrupted),
                Err(error) => screen.line(&format!("round {round}  {}: {}", candidate.name, error.chain())),
            }
        }
    }
    let results = Results::new(config, measured);
    results.print(screen);
    results.keep(&config.out)?;
    screen.line(&format!("Kept in {}", config.out.display()));
    Ok(())
}

/// Measures one network once, on a cable of its own.
fn sample(config: &BenchConfig, candidate: &Candidate) -> Result<Sample, LabError> {
    let interrupted = || if config.interrupt.is_set() { Err(LabError::Interrupted) } else { Ok(()) };
    interrupted()?;
    let site = Site::lay(&config.prefix, config.plain)?;
    let network = candidate.start(&site)?;
    let began = Instant::now();
    while !site.ping(network.target) {
        interrupted()?;
        if began.elapsed() > MEETS_WITHIN {
            return Err(LabError::InVain {
                what: format!("{}: an answer to a ping", candidate.name),
                limit: MEETS_WITHIN,
            });
        }
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(SETTLE);
    load::measure(&site, &network, config.seconds, interrupted)
}
