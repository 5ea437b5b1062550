//! `clan invite`: makes a link that lets somebody in.

use std::{path::PathBuf, time::Duration};

use clan_api::{CreateInvite, Invite};
use clan_types::Role;

use crate::{
    context::Context,
    error::CliError,
    printer::{Printer, Tone},
    qr, words,
};

/// Arguments of `clan invite`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The link alone goes to stdout. Whoever has it may join: send it over a channel that you trust."
)]
pub(crate) struct Args {
    /// Which clan, if you are in several
    clan: Option<String>,
    /// What the newcomer may do: guest, member, admin or owner
    #[arg(long, default_value_t = Role::Member)]
    role: Role,
    /// How many people may use the link
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// How long the link works: 30m, 24h, 7d
    #[arg(long, default_value = "24h", value_name = "TIME", value_parser = words::parse_duration)]
    expires: Duration,
    /// Let nobody in before an admin has approved them: `clan approve`
    #[arg(long)]
    approval: bool,
    /// Show the QR code even where nobody seems to look
    #[arg(long)]
    qr: bool,
    /// Write the QR code into a new PNG picture, too
    #[arg(long, value_name = "FILE")]
    qr_file: Option<PathBuf>,
}

/// Makes the invite and prints its link.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let request = CreateInvite {
        role: Some(args.role),
        uses: Some(args.uses),
        expires_in: Some(args.expires.as_secs()),
        approval: args.approval,
    };
    let invite = context.ask(context.client.invite(&clan, &request)).await?;
    let printer = &context.printer;
    // What cannot be written is said last: the invite is made, and its link is all that leads to it.
    let written = args.qr_file.as_ref().map_or(Ok(()), |path| qr::write(path, &invite.link));
    if printer.is_json() {
        printer.json(&invite)?;
        return written;
    }
    if printer.stderr_is_terminal() {
        explain(&invite, args.expires, printer);
    }
    if args.qr || printer.stderr_is_terminal() {
        show_code(&invite.link, args.qr, printer);
    }
    printer.data(&invite.link)?;
    written
}

fn explain(invite: &Invite, expires: Duration, printer: &Printer) {
    let who = if invite.uses == 1 {
        "one person".to_owned()
    } else {
        format!("up to {}", words::people(invite.uses as usize))
    };
    printer.talk(&format!(
        "This link lets {who} into {} as {}, for {}.",
        printer.err_style(Tone::Strong, invite.clan_name.as_str()),
        invite.role,
        words::span(expires)
    ));
    if invite.approval {
        printer.talk("Nobody comes in before an admin has approved them: `clan members`, `clan approve NAME`.");
    }
    printer.talk(&format!("They will see the fingerprint {}.", printer.err_style(Tone::Strong, &invite.fingerprint)));
    if let Some(words) = &invite.words {
        printer.talk(&format!(
            "On the same network, these words do as well, once, within ten minutes: {}",
            printer.err_style(Tone::Strong, words)
        ));
        if let Some(relay) = &invite.words_relay {
            printer.talk(&format!("From elsewhere: clan join {words} --relay {relay}"));
        }
    }
}

fn show_code(link: &str, asked: bool, printer: &Printer) {
    match qr::lines(link, printer.stderr_has_colour(), printer.err_width()) {
        Some(lines) => {
            printer.talk("");
            lines.iter().for_each(|line| printer.talk(line));
            printer.talk("");
        }
        None if asked => printer.talk("The terminal is too narrow for the QR code: `--qr-file` writes a picture."),
        None => {}
    }
}
