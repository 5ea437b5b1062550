//! `clan revoke`: puts a person or a machine out of a clan, or withdraws an invite.

use clan_api::{Revocation, RevocationKind, Revoke};

use crate::{context::Context, error::CliError, printer::harmless, words};

/// What to revoke.
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "Admins put out up to their own role, everybody their own machines. Every machine of the clan that is reachable drops \
                  the connection at once; the others when they hear of it."
)]
pub(crate) enum Noun {
    /// Put a person out, with all their machines
    Person {
        /// Name or id, as `clan members` shows them
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Put one machine out
    Machine {
        /// Name or id, as `clan machines` shows them
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Withdraw an invite: nobody comes in with it any more
    Invite {
        /// Id, or its beginning, as `clan invites` shows it
        id: String,
        #[command(flatten)]
        how: How,
    },
}

/// Where and how.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// Which clan, if you are in several
    #[arg(long)]
    clan: Option<String>,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
}

/// Revokes, after asking.
pub(crate) async fn run(noun: Noun, context: &Context) -> Result<(), CliError> {
    let (kind, subject, how) = match noun {
        Noun::Person { name, how } => (RevocationKind::Person, name, how),
        Noun::Machine { name, how } => (RevocationKind::Machine, name, how),
        Noun::Invite { id, how } => (RevocationKind::Invite, id, how),
    };
    let clan = context.clan(how.clan).await?;
    let mut request = Revoke { kind, subject, dry_run: true };
    // Whoever may not is told before they are asked whether they want to.
    let preview = context.ask(context.client.revoke(&clan, &request)).await?;
    let printer = &context.printer;
    if how.dry_run {
        if printer.is_json() {
            return printer.json(&preview);
        }
        printer.talk(&if preview.already { already(&preview) } else { format!("Would {}.", deed(&preview)) });
        return Ok(());
    }
    if !preview.already {
        context.confirm(&question(&preview), "revoke without being asked")?;
    }
    // What was shown is what is revoked, whatever the name means by now.
    request = Revoke { kind, subject: preview.id.clone(), dry_run: false };
    let revocation = context.ask(context.client.revoke(&clan, &request)).await?;
    if printer.is_json() {
        return printer.json(&revocation);
    }
    printer.talk(&if revocation.already { already(&revocation) } else { done(&revocation) });
    Ok(())
}

fn machines(revocation: &Revocation) -> String {
    let names: Vec<&str> = revocation.machines.iter().map(|m| m.as_str()).collect();
    format!("{} ({})", words::count(names.len(), "machine"), names.join(", "))
}

fn short(revocation: &Revocation) -> String {
    harmless(&revocation.id).chars().take(10).collect()
}

fn deed(revocation: &Revocation) -> String {
    let name = harmless(&revocation.name);
    match revocation.kind {
        RevocationKind::Person if revocation.machines.is_empty() => format!("put {name} out"),
        RevocationKind::Person => format!("put {name} out, with {}", machines(revocation)),
        RevocationKind::Machine => format!("put the machine {name} out"),
        RevocationKind::Invite => format!("withdraw the invite {} of {name}", short(revocation)),
    }
}

fn question(revocation: &Revocation) -> String {
    let deed = deed(revocation);
    let (first, rest) = deed.split_at(1);
    let end = match revocation.kind {
        RevocationKind::Invite => "Who has come in with it stays.",
        RevocationKind::Person | RevocationKind::Machine => "This cannot be undone; to come back takes a new invite.",
    };
    format!("{}{rest}? {end}", first.to_uppercase())
}

fn done(revocation: &Revocation) -> String {
    let name = harmless(&revocation.name);
    match revocation.kind {
        RevocationKind::Person if revocation.machines.is_empty() => format!("{name} is out."),
        RevocationKind::Person => format!("{name} is out, with {}.", machines(revocation)),
        RevocationKind::Machine => format!("The machine {name} is out."),
        RevocationKind::Invite => format!("The invite {} of {name} is withdrawn.", short(revocation)),
    }
}

fn already(revocation: &Revocation) -> String {
    let name = harmless(&revocation.name);
    match revocation.kind {
        RevocationKind::Person => format!("{name} is out already."),
        RevocationKind::Machine => format!("The machine {name} is out already."),
        RevocationKind::Invite => format!("The invite {} of {name} is withdrawn already.", short(revocation)),
    }
}
