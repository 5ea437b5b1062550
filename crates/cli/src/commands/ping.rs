//! `clan ping`: whether a machine answers, how fast, and by which path.

use std::time::Duration;

use clan_api::Pong;
use serde::Serialize;

use crate::{
    context::Context,
    error::CliError,
    printer::{Printer, harmless},
    words,
};

/// From one echo to the next.
const PAUSE: Duration = Duration::from_secs(1);

/// Arguments of `clan ping`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The echoes go through the clan's network, from this computer's machine in it; nothing is needed on this computer. \
                  Exit code 1 if no answer came."
)]
pub(crate) struct Args {
    /// The machine: laptop, or laptop.family.clan
    machine: String,
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// How many echoes to send, one a second [default: until Ctrl-C]
    #[arg(long, short = 'c', value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
}

/// All echoes, and what they amount to.
#[derive(Default, Serialize)]
struct Summary {
    sent: u32,
    received: u32,
    min_us: Option<u64>,
    mean_us: Option<u64>,
    max_us: Option<u64>,
    /// The last one: name, address and path.
    last: Option<Pong>,
    #[serde(skip)]
    total_us: u64,
}

/// Sends echoes until there were enough.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    let clan = context.clan(args.clan.or_else(|| clan_in(&args.machine))).await?;
    let mut summary = Summary::default();
    let echoes = async {
        while args.count.is_none_or(|count| summary.sent < count) {
            if summary.sent > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            let pong = context.ask(context.client.ping(&clan, &args.machine)).await?;
            if !printer.is_json() {
                show(&pong, summary.last.as_ref(), printer)?;
            }
            summary.add(pong);
        }
        Ok::<_, CliError>(())
    };
    tokio::select! {
        ended = echoes => ended?,
        _ = tokio::signal::ctrl_c() => {}
    }
    if printer.is_json() {
        printer.json(&summary)?;
    } else {
        printer.talk(&summary.words());
    }
    if summary.received > 0 {
        return Ok(());
    }
    Err(CliError::refused("no_answer", format!("{} does not answer", harmless(&args.machine)))
        .hint("see when it was last heard of: `clan machines`"))
}

/// The clan that a whole name is of.
fn clan_in(machine: &str) -> Option<String> {
    let mut labels = machine.trim_end_matches('.').split('.').skip(1);
    let clan = labels.next()?;
    (labels.next() == Some("clan") && labels.next().is_none()).then(|| clan.to_owned())
}

/// One line for an echo; why the path is as it is, where that is news.
fn show(pong: &Pong, before: Option<&Pong>, printer: &Printer) -> Result<(), CliError> {
    let time = match pong.rtt_us {
        Some(us) => milliseconds(us),
        None => "no answer".to_owned(),
    };
    let mut line = format!("{} ({}): {time}", harmless(&pong.host_name), pong.address);
    if let Some(path) = &pong.path {
        line.push_str(&format!(", {}", words::path_kind(path.kind).1));
        let same = before.and_then(|pong| pong.path.as_ref()).is_some_and(|p| p.kind == path.kind && p.why == path.why);
        if !same && !path.why.is_empty() {
            line.push_str(&format!(": {}", harmless(&path.why)));
        }
    }
    printer.data(&line)
}

fn milliseconds(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

impl Summary {
    fn add(&mut self, pong: Pong) {
        self.sent += 1;
        if let Some(us) = pong.rtt_us {
            self.received += 1;
            self.total_us = self.total_us.saturating_add(us);
            self.min_us = Some(self.min_us.map_or(us, |least| least.min(us)));
            self.max_us = Some(self.max_us.map_or(us, |most| most.max(us)));
            self.mean_us = Some(self.total_us / u64::from(self.received));
        }
        self.last = Some(pong);
    }

    fn words(&self) -> String {
        let echoes = if self.sent == 1 { "echo" } else { "echoes" };
        let answered = format!("{} of {} {echoes} answered", self.received, self.sent);
        match (self.min_us, self.mean_us, self.max_us) {
            (Some(min), Some(mean), Some(max)) => format!(
                "{answered}; {} at least, {} on average, {} at most",
                milliseconds(min),
                milliseconds(mean),
                milliseconds(max)
            ),
            _ => answered,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_name_names_its_clan() {
        assert_eq!(clan_in("desk.family.clan").as_deref(), Some("family"));
        assert_eq!(clan_in("desk.family.clan.").as_deref(), Some("family"));
        for other in ["desk", "desk.clan", "a.desk.family.clan", "desk.family.example"] {
            assert_eq!(clan_in(other), None, "{other}");
        }
    }
}
