//! `clan log`: who decided what in a clan.

use clan_api::{AuthorKind, ClanLogQuery};

use crate::{
    context::Context,
    error::CliError,
    printer::Tone,
    table::{Cell, Table},
    words,
};

/// Arguments of `clan log`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Times are by the clocks of those who signed, in UTC. An entry that its author had no right to make is shown with the \
                  reason why it has no effect."
)]
pub(crate) struct Args {
    /// Which clan, if you are in several
    clan: Option<String>,
    /// How many entries, the newest
    #[arg(short = 'n', long = "lines", value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    lines: u32,
}

/// Prints the log, newest last.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let log = context.ask(context.client.clan_log(&clan, ClanLogQuery { limit: args.lines })).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&log);
    }
    let mut table = Table::new(&["TIME", "WHO", "WHAT"]);
    for entry in &log.entries {
        let who = match entry.by {
            AuthorKind::Person => entry.author_name.clone(),
            AuthorKind::Machine => format!("machine {}", entry.author_name),
        };
        let what = match &entry.void {
            Some(why) => Cell::toned(Tone::Bad, format!("{}; without effect: {why}", entry.what)),
            None => entry.what.as_str().into(),
        };
        table.row([words::moment(entry.at).into(), who.into(), what]);
    }
    let hidden = log.total.saturating_sub(log.entries.len() as u64);
    if hidden > 0 {
        let earlier =
            if hidden == 1 { "1 earlier entry is".to_owned() } else { format!("{hidden} earlier entries are") };
        printer.talk(&format!("{earlier} not shown: `clan log -n {}`", log.total.min(10_000)));
    }
    table.print(printer)
}
