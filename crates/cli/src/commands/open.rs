//! `clan open`: what the desktop calls when somebody clicks on a link.

use clan_api::MakeLogin;

use super::join;
use crate::{browser, context::Context, error::CliError};

/// Arguments of `clan open`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
On a terminal it is the same as `clan join`. Without one, as after a click, the web page shows where the link leads and asks.
`clan manager --install` tells the desktop to open such links.")]
pub(crate) struct Args {
    /// The link: clan://join/…, clan://device/…
    link: String,
    /// Only print the address of the web page that asks
    #[arg(long)]
    print: bool,
}

/// Shows where the link leads, and asks.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    if !args.print && context.printer.can_ask() {
        return join::run(join::Args::of(args.link), context).await;
    }
    // Whatever is wrong with the link, the page tells it: nobody reads what this prints.
    let login = context.ask(context.client.login(&MakeLogin { open: Some(args.link) })).await?;
    if context.printer.is_json() {
        context.printer.json(&login)
    } else {
        browser::show(&login.url, args.print, &context.printer)
    }
}
