//! `clan invite`: makes a link that lets somebody in.

use std::time::Duration;

use clan_api::{CreateInvite, Invite};
use clan_types::Role;
use qrcode::{EcLevel, QrCode, render::unicode::Dense1x2};

use crate::{
    context::Context,
    error::CliError,
    printer::{Printer, Tone},
    words,
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
}

/// Makes the invite and prints its link.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let clan = context.clan(args.clan).await?;
    let request =
        CreateInvite { role: Some(args.role), uses: Some(args.uses), expires_in: Some(args.expires.as_secs()) };
    let invite = context.ask(context.client.invite(&clan, &request)).await?;
    let printer = &context.printer;
    if printer.is_json() {
        return printer.json(&invite);
    }
    if printer.stderr_is_terminal() {
        explain(&invite, args.expires, printer);
    }
    printer.data(&invite.link)
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
    printer.talk(&format!("They will see the fingerprint {}.", printer.err_style(Tone::Strong, &invite.fingerprint)));
    if let Some(lines) = qr_code(&invite.link, printer.stderr_has_colour()) {
        printer.talk("");
        for line in lines {
            printer.talk(&line);
        }
        printer.talk("");
    }
}

/// The link as a QR code of half-height blocks; `None` if it is wider than a terminal.
fn qr_code(link: &str, colour: bool) -> Option<Vec<String>> {
    let code = QrCode::with_error_correction_level(link, EcLevel::L).ok()?;
    if code.width() + 8 > 80 {
        return None;
    }
    // With colours the code is black on white whatever the terminal's scheme; without, it suits dark terminals.
    let (dark, light) = if colour { (Dense1x2::Dark, Dense1x2::Light) } else { (Dense1x2::Light, Dense1x2::Dark) };
    let text = code.render::<Dense1x2>().dark_color(dark).light_color(light).quiet_zone(true).build();
    Some(
        text.lines()
            .map(|line| if colour { format!("\u{1b}[30;107m{line}\u{1b}[0m") } else { line.to_owned() })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_link_fits_a_terminal_as_a_qr_code() {
        let link = format!("clan://join/{}", "a".repeat(230));
        let lines = qr_code(&link, false).unwrap();
        assert!(lines.iter().all(|l| l.chars().count() <= 80));
        assert!(qr_code(&"a".repeat(2000), false).is_none());
    }
}
