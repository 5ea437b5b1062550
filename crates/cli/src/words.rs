//! Amounts, times and states in words.

use std::time::Duration;

use clan_api::{AcceleratorKind, ControlMode, Flavour, PathInfo, PathKind, Transfer, VmInfo, VmState};
use clan_types::{AppName, NetworkLayer, Timestamp};

use crate::printer::{Tone, harmless};

/// A duration in at most two units: `8.4 s`, `3 min 20 s`, `2 h 5 min`, `4 days`.
pub(crate) fn span(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{s} s"),
        60..3600 => two(s / 60, "min", s % 60, "s"),
        3600..86_400 => two(s / 3600, "h", s % 3600 / 60, "min"),
        _ if s < 2 * 86_400 => two(s / 86_400, "day", s % 86_400 / 3600, "h"),
        _ => two(s / 86_400, "days", s % 86_400 / 3600, "h"),
    }
}

fn two(a: u64, a_unit: &str, b: u64, b_unit: &str) -> String {
    if b == 0 { format!("{a} {a_unit}") } else { format!("{a} {a_unit} {b} {b_unit}") }
}

/// How long ago: `now`, `40 s ago`.
pub(crate) fn ago(now: Timestamp, then: Timestamp) -> String {
    let since = now.since(then);
    match since.as_secs() {
        0..2 => "now".to_owned(),
        s @ 2..60 => format!("{s} s ago"),
        s => format!("{} ago", span(Duration::from_secs(s))),
    }
}

/// A moment as a calendar shows it, in UTC: `2026-11-20 13:46:55`.
pub(crate) fn moment(at: Timestamp) -> String {
    let seconds = at.as_millis() / 1000;
    // Days since 0000-03-01, in years that end in February: leap days fall at their ends (Hinnant, 2014).
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, era * 400 + year) } else { (month - 9, era * 400 + year + 1) };
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// This computer's clock.
pub(crate) fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// `1 machine`, `2 machines`.
pub(crate) fn count(number: usize, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}

/// What of an image has to come.
pub(crate) fn download(transfer: &Transfer) -> String {
    match transfer.missing.as_bytes() {
        0 => format!("nothing: its {} are here already", transfer.total),
        missing if missing == transfer.total.as_bytes() => transfer.missing.to_string(),
        _ => format!("{} of {}; the rest is here", transfer.missing, transfer.total),
    }
}

/// `1 person`, `2 people`.
pub(crate) fn people(number: usize) -> String {
    if number == 1 { "1 person".to_owned() } else { format!("{number} people") }
}

/// A path: `direct, 12 ms`.
pub(crate) fn path(path: &PathInfo) -> (Tone, String) {
    let (tone, word) = path_kind(path.kind);
    let text = match path.rtt_us {
        Some(us) if us < 10_000 => format!("{word}, {:.1} ms", us as f64 / 1000.0),
        Some(us) => format!("{word}, {} ms", us / 1000),
        None => word.to_owned(),
    };
    (tone, text)
}

/// A kind of path.
pub(crate) fn path_kind(kind: PathKind) -> (Tone, &'static str) {
    match kind {
        PathKind::Local => (Tone::Good, "this computer"),
        PathKind::Direct => (Tone::Good, "direct"),
        PathKind::QuicDirect => (Tone::Good, "direct (QUIC)"),
        PathKind::Relayed => (Tone::Warn, "relayed"),
    }
}

/// A VM's state.
pub(crate) fn vm_state(state: VmState) -> (Tone, &'static str) {
    match state {
        VmState::Stopped => (Tone::Faint, "stopped"),
        VmState::Locked => (Tone::Warn, "locked"),
        VmState::Starting => (Tone::Warn, "starting"),
        VmState::Running => (Tone::Good, "running"),
        VmState::Paused => (Tone::Warn, "paused"),
        VmState::Stopping => (Tone::Warn, "stopping"),
        VmState::Failed => (Tone::Bad, "failed"),
    }
}

/// What a clan's machine is here.
pub(crate) fn flavour(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::Vm => "VM",
        Flavour::Container => "container",
        Flavour::Integrated => "integrated",
    }
}

/// A control mode, as it is typed.
pub(crate) fn control(mode: ControlMode) -> &'static str {
    match mode {
        ControlMode::Local => "local",
        ControlMode::Remote => "remote",
        ControlMode::Shared => "shared",
    }
}

/// Who may steer a machine.
pub(crate) fn control_mode(mode: ControlMode) -> &'static str {
    match mode {
        ControlMode::Local => "local: only you steer it",
        ControlMode::Remote => "remote: the clan's admins steer it",
        ControlMode::Shared => "shared: you and the clan's admins steer it",
    }
}

/// That a clan publishes another image than the machine here runs, and how to take it.
pub(crate) fn published(vm: &VmInfo) -> Option<String> {
    let published = vm.published.as_ref()?;
    let (title, image) = (harmless(&published.title), published.image.short());
    let clan = &vm.clan;
    Some(format!(
        "{clan} publishes another image than {} runs: {title} ({image}). `clan vm update {clan}` takes it.",
        vm.machine
    ))
}

/// What carries packets between a clan's machines.
pub(crate) fn network(layer: &NetworkLayer) -> String {
    if layer.is_known() {
        format!("{layer}: encrypted, and directly between machines where that works")
    } else {
        format!("{layer}, which this version of clan does not know")
    }
}

/// The applications of an image.
pub(crate) fn applications(names: &[AppName]) -> String {
    if names.is_empty() {
        return "none that is named".to_owned();
    }
    names.iter().map(AppName::as_str).collect::<Vec<_>>().join(", ")
}

/// What executes a VM.
pub(crate) fn accelerator(kind: AcceleratorKind) -> &'static str {
    match kind {
        AcceleratorKind::Kvm => "KVM",
        AcceleratorKind::Tcg => "emulation (TCG)",
    }
}

/// `30m`, `24h`, `7d` as a duration: whole minutes to whole days, no more than a year.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!("`{}` is not a duration: write for example 30m, 24h or 7d", text.chars().take(40).collect::<String>())
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let seconds = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(wrong)?;
    match seconds {
        0 => Err("a duration must be longer than nothing".to_owned()),
        _ if seconds > 366 * 86_400 => Err("a year is the longest".to_owned()),
        _ => Ok(Duration::from_secs(seconds)),
    }
}

/// Text as a name: one DNS label, or nothing if no usable character is left.
pub(crate) fn label(text: &str) -> Option<String> {
    let mut label = String::new();
    // A host name counts up to its first dot.
    for c in text.split('.').next().unwrap_or_default().chars().flat_map(char::to_lowercase) {
        match c {
            'a'..='z' | '0'..='9' => label.push(c),
            _ if !label.is_empty() && !label.ends_with('-') => label.push('-'),
            _ => {}
        }
    }
    label.truncate(50);
    let label = label.trim_matches('-');
    (!label.is_empty()).then(|| label.to_owned())
}

/// `name`, or `name-2`, `name-3`, … if that is taken.
pub(crate) fn free_name(name: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(name) {
        return name.to_owned();
    }
    (2u32..).map(|n| format!("{name}-{n}")).find(|candidate| !taken(candidate)).unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_in_two_units() {
        let said: Vec<String> = [0, 9, 59, 60, 200, 7500, 90_000, 400_000].map(|s| span(Duration::from_secs(s))).into();
        assert_eq!(said, ["0.0 s", "9.0 s", "59 s", "1 min", "3 min 20 s", "2 h 5 min", "1 day 1 h", "4 days 15 h"]);
    }

    #[test]
    fn moments_are_those_of_the_calendar() {
        let said = |seconds: u64| moment(Timestamp::from_millis(seconds * 1000 + 999));
        assert_eq!(said(0), "1970-01-01 00:00:00");
        assert_eq!(said(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(said(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(said(1_709_251_199), "2024-02-29 23:59:59");
        assert_eq!(said(1_767_225_599), "2025-12-31 23:59:59");
        assert_eq!(said(4_107_542_400), "2100-03-01 00:00:00");
    }

    #[test]
    fn durations_are_typed_with_a_unit() {
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_duration("30m"), Ok(Duration::from_secs(1800)));
        for wrong in ["", "h", "24", "-1h", "1.5h", "0h", "9999d", "99999999999999999999d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn any_host_name_becomes_a_label() {
        assert_eq!(label("Annas_Laptop.fritz.box").as_deref(), Some("annas-laptop"));
        assert_eq!(label("--x--").as_deref(), Some("x"));
        assert_eq!(label("***"), None);
        assert!(label(&"a".repeat(200)).unwrap().parse::<clan_types::MachineName>().is_ok());
    }

    #[test]
    fn a_taken_name_gets_a_number() {
        assert_eq!(free_name("laptop", |n| n == "laptop" || n == "laptop-2"), "laptop-3");
        assert_eq!(free_name("laptop", |_| false), "laptop");
    }
}
