//! `clan web`: the web page, signed in.

use clan_api::MakeLogin;

use crate::{browser, context::Context, error::CliError};

/// Arguments of `clan web`.
#[derive(Debug, clap::Args)]
#[command(after_help = "The address signs in once and for a short time: do not share it.")]
pub(crate) struct Args {
    /// Only print the address
    #[arg(long)]
    print: bool,
}

/// Prints the address and opens it.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let login = context.ask(context.client.login(&MakeLogin::default())).await?;
    if context.printer.is_json() {
        context.printer.json(&login)
    } else {
        browser::show(&login.url, args.print, &context.printer)
    }
}
