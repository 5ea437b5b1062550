//! What small changes of a clan have in common.

use clan_api::{ClientError, RemoveNamed};

use crate::{context::Context, error::CliError};

/// Where and how.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// Which clan, if you are in several
    #[arg(long)]
    pub(crate) clan: Option<String>,
    /// Only say whether it would work
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// What is said about taking something away.
pub(crate) struct Removal {
    /// With `--dry-run`, once it is known that it would work.
    pub(crate) would: String,
    /// Asked first.
    pub(crate) question: String,
    /// What `--yes` is for here.
    pub(crate) unasked: &'static str,
}

impl How {
    /// Finds out whether `send` would take `name` away, asks, and does it. Gives the name of what is gone, to be told;
    /// `None` if there is nothing more to say.
    pub(crate) async fn remove(
        self,
        name: String,
        removal: Removal,
        context: &Context,
        send: impl AsyncFn(&str, &RemoveNamed) -> Result<RemoveNamed, ClientError>,
    ) -> Result<Option<String>, CliError> {
        let clan = context.clan(self.clan).await?;
        let mut request = RemoveNamed { name, dry_run: true };
        context.ask(send(&clan, &request)).await?;
        if self.dry_run {
            context.printer.talk(&removal.would);
            return Ok(None);
        }
        context.confirm(&removal.question, removal.unasked)?;
        request.dry_run = false;
        let gone = context.ask(send(&clan, &request)).await?;
        if context.printer.is_json() {
            return context.printer.json(&gone).map(|()| None);
        }
        Ok(Some(gone.name))
    }
}
