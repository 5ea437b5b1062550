//! `clan invites`: which invites were made, and what became of them.

use clan_api::{InviteInfo, InviteState};
use clan_types::Timestamp;

use crate::{
    context::Context,
    error::CliError,
    printer::Tone,
    table::{Cell, Table},
    words,
};

/// Arguments of `clan invites`.
#[derive(Debug, clap::Args)]
#[command(after_help = "An invite's link is shown once, when it is made. `clan revoke invite ID` withdraws one.")]
pub(crate) struct Args {
    /// Which clan, if you are in several
    clan: Option<String>,
    /// Only those that still let somebody in
    #[arg(long)]
    open: bool,
}

/// Prints the invites.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let mut invites = context.ask(context.client.invites(&clan)).await?;
    if args.open {
        invites.retain(|i| i.state == InviteState::Open);
    }
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&invites);
    }
    if invites.is_empty() {
        printer.talk("There are none. Make one: `clan invite`.");
        return Ok(());
    }
    table(&invites, words::now()).print(printer)
}

fn table(invites: &[InviteInfo], now: Timestamp) -> Table {
    let mut table = Table::new(&["INVITE", "STATE", "ROLE", "USED", "BY", "MADE", "WHO CAME IN"]);
    for invite in invites {
        let state = match invite.state {
            InviteState::Open => {
                Cell::toned(Tone::Good, format!("open for {}", words::span(invite.expires.since(now))))
            }
            InviteState::Used => Cell::toned(Tone::Faint, "used"),
            InviteState::Expired => Cell::toned(Tone::Faint, "expired"),
            InviteState::Withdrawn => Cell::toned(Tone::Warn, "withdrawn"),
        };
        let came: Vec<&str> = invite.redeemed_by.iter().map(|name| name.as_str()).collect();
        table.row([
            invite.id.short().into(),
            state,
            invite.role.to_string().into(),
            format!("{} of {}", invite.used, invite.uses).into(),
            invite.by_name.as_str().into(),
            words::ago(now, invite.made).into(),
            came.join(", ").into(),
        ]);
    }
    table
}
