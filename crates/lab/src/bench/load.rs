//! What is measured on a network that is up.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::Value;

use super::{
    candidates::Network,
    site::{Daemon, Site, finished},
};
use crate::LabError;

/// Seconds that a small-packet measurement sends.
const PACKET_SECONDS: u64 = 3;
/// Bytes of payload in a small packet.
const SMALL: &str = "64";

/// One measurement of one network.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Sample {
    /// TCP, from computer 0 to computer 1 and back, one stream and four.
    pub(super) one_there: Throughput,
    pub(super) one_back: Throughput,
    pub(super) four_there: Throughput,
    pub(super) four_back: Throughput,
    /// UDP packets of 64 bytes that arrived, in one second.
    pub(super) small_packets_per_s: f64,
    /// Round trips of pings on the idle network, in microseconds.
    pub(super) ping: Ping,
    /// The larger of both daemons, in MiB: before any load, and the peak.
    pub(super) idle_mib: f64,
    pub(super) peak_mib: f64,
    /// Load average of the machine when this began.
    pub(super) load: f64,
}

/// A neighbour who computes delays a few pings by whole slices of the scheduler, milliseconds each: they make the mean, and say
/// nothing about the network. So the median is shown, and the tail kept.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Ping {
    pub(super) min_us: f64,
    pub(super) median_us: f64,
    pub(super) p90_us: f64,
    pub(super) mean_us: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Throughput {
    pub(super) gbit_per_s: f64,
    pub(super) retransmits: u64,
    /// Processor time of both daemons, in the system and outside, for 10^9 bytes of payload.
    pub(super) cpu_s_per_gb: f64,
}

pub(super) fn measure(
    site: &Site,
    network: &Network,
    seconds: u64,
    interrupted: impl Fn() -> Result<(), LabError>,
) -> Result<Sample, LabError> {
    let load = load_average();
    let idle_mib = peak_mib(&network.daemons);
    let ping = ping(site, network)?;
    interrupted()?;
    let target = network.target.to_string();
    let _server = serve(site, &target)?;
    // Caches, congestion windows, buffers.
    iperf(site, &target, 1, &[])?;
    let throughput = |arguments: &[&str]| {
        interrupted()?;
        let before = cpu_seconds(&network.daemons);
        let report = iperf(site, &target, seconds, arguments)?;
        let used = cpu_seconds(&network.daemons) - before;
        let number = |path: &str| report.pointer(path).and_then(Value::as_f64).ok_or_else(|| unreadable(path));
        Ok(Throughput {
            gbit_per_s: number("/end/sum_received/bits_per_second")? / 1e9,
            retransmits: number("/end/sum_sent/retransmits")? as u64,
            cpu_s_per_gb: used / (number("/end/sum_received/bytes")? / 1e9),
        })
    };
    let one_there = throughput(&[])?;
    let one_back = throughput(&["-R"])?;
    let four_there = throughput(&["-P", "4"])?;
    let four_back = throughput(&["-P", "4", "-R"])?;
    interrupted()?;
    let small = iperf(site, &target, PACKET_SECONDS, &["-u", "-b", "0", "-l", SMALL])?;
    let number = |path: &str| small.pointer(path).and_then(Value::as_f64).ok_or_else(|| unreadable(path));
    let arrived = number("/end/sum/packets")? - number("/end/sum/lost_packets")?;
    let small_packets_per_s = arrived / number("/end/sum/seconds")?;
    let peak_mib = peak_mib(&network.daemons);
    Ok(Sample { one_there, one_back, four_there, four_back, small_packets_per_s, ping, idle_mib, peak_mib, load })
}

/// Starts the other side of the measurements, and waits until it listens.
fn serve(site: &Site, target: &str) -> Result<Daemon, LabError> {
    let server = Daemon::start(
        {
            let mut command = site.command(1, "iperf3")?;
            command.arg("--server");
            command
        },
        &site.scratch(1)?.join("iperf3"),
    )?;
    let within = Duration::from_secs(5);
    let began = Instant::now();
    // In that process's network, so in computer 1's: 0A is LISTEN, 1451 the port 5201.
    let table = format!("/proc/{}/net/tcp6", server.pid());
    while !fs::read_to_string(&table).is_ok_and(|t| t.lines().any(|l| l.contains(":1451 ") && l.contains(" 0A "))) {
        if began.elapsed() > within {
            return Err(LabError::InVain { what: format!("iperf3 listening for {target}"), limit: within });
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

fn iperf(site: &Site, target: &str, seconds: u64, arguments: &[&str]) -> Result<Value, LabError> {
    // A network that stalls must not stall the whole session.
    let limit = (seconds + 20).to_string();
    let mut command = site.command(0, "timeout")?;
    command.args([&limit, "iperf3", "-c", target, "-J", "-t", &seconds.to_string()]).args(arguments);
    let text = finished(&mut command)?;
    serde_json::from_str(&text).map_err(|error| unreadable(&error.to_string()))
}

fn unreadable(what: &str) -> LabError {
    LabError::Promise(format!("iperf3's report cannot be understood: {what}"))
}

fn ping(site: &Site, network: &Network) -> Result<Ping, LabError> {
    let mut command = site.command(0, "ping")?;
    let text = finished(command.args(["-n", "-c", "200", "-i", "0.005"]).arg(network.target.to_string()))?;
    round_trips(&text).ok_or_else(|| LabError::Promise(format!("ping's report cannot be understood: {text}")))
}

/// From lines like `64 bytes from 192.0.2.2: icmp_seq=1 ttl=64 time=0.045 ms`.
fn round_trips(text: &str) -> Option<Ping> {
    let time = |line: &str| line.split("time=").nth(1)?.split(' ').next()?.parse::<f64>().ok();
    let mut times: Vec<f64> = text.lines().filter_map(time).map(|ms| ms * 1000.0).collect();
    times.sort_by(f64::total_cmp);
    Some(Ping {
        min_us: *times.first()?,
        median_us: *times.get(times.len() / 2)?,
        p90_us: *times.get(times.len() * 9 / 10)?,
        mean_us: times.iter().sum::<f64>() / times.len() as f64,
    })
}

fn cpu_seconds(daemons: &[Daemon]) -> f64 {
    let ticks = daemons.iter().filter_map(|daemon| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    });
    // SAFETY: a plain question to the C library.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    ticks.sum::<u64>() as f64 / per_second.max(1) as f64
}

fn peak_mib(daemons: &[Daemon]) -> f64 {
    let peaks = daemons.iter().filter_map(|daemon| {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).ok()?;
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok())
    });
    peaks.max().unwrap_or(0) as f64 / 1024.0
}

pub(crate) fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_read_one_by_one() {
        let line = |ms: &str| format!("64 bytes from 10.77.0.2: icmp_seq=1 ttl=64 time={ms} ms\n");
        let text: String = ["0.100", "0.200", "0.300", "4.000"].map(line).concat();
        let ping = round_trips(&format!("PING 10.77.0.2\n{text}\nrtt min/avg/max/mdev = 1/2/3/4 ms\n")).unwrap();
        let all = [ping.min_us, ping.median_us, ping.p90_us, ping.mean_us].map(|us| us.round() as u64);
        assert_eq!(all, [100, 300, 4000, 1150]);
        assert!(round_trips("PING 10.77.0.2\n").is_none());
    }
}
