//! `clan rule`: who may reach what in a clan.

use clan_api::{RemoveNamed, RuleInfo, SetRule};
use clan_types::RuleName;

use super::change::{How, Removal};
use crate::{context::Context, error::CliError, table::Table};

/// What to do with the rules.
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "Rules only allow: what none allows does not come in. The receiving machine enforces them; answers to what it began itself \
                  always pass.\n\nWho: everybody, guests, members, admins, owners (each with those above), person:NAME, machine:NAME, \
                  group:NAME. What: the same, or own (machines of the same person), services, service:NAME. Ports: tcp/22, \
                  udp/5000-5010, ping."
)]
pub(crate) enum Verb {
    /// Make a rule, or replace the one of that name
    Add {
        /// Its name
        name: RuleName,
        /// Who may reach
        #[arg(long, value_name = "WHO")]
        from: String,
        /// what
        #[arg(long, value_name = "WHAT")]
        to: String,
        /// Which ports; all, or a service's own, if none are given
        #[arg(long, value_name = "PORTS", value_delimiter = ',')]
        ports: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// Take a rule away
    Remove {
        /// Its name, as `clan rule list` shows it
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Show the rules in force
    List {
        /// Which clan, if you are in several
        #[arg(long)]
        clan: Option<String>,
    },
}

/// Shows or changes the rules.
pub(crate) async fn run(verb: Verb, context: &Context) -> Result<(), CliError> {
    let printer = &context.printer;
    match verb {
        Verb::Add { name, from, to, ports, how } => {
            let clan = context.clan(how.clan).await?;
            let request = SetRule { name, from, to, ports, dry_run: how.dry_run };
            let rule = context.ask(context.client.set_rule(&clan, &request)).await?;
            if printer.is_json() {
                return printer.json(&rule);
            }
            let prefix = if how.dry_run { "Would make this rule: " } else { "" };
            printer.talk(&format!("{prefix}{}: {}.", rule.name, sentence(&rule)));
            Ok(())
        }
        Verb::Remove { name, how } => {
            let removal = Removal {
                would: format!("Would take the rule {name} away."),
                question: format!("Take the rule {name} away? What only it allows does not come in any more."),
                unasked: "take the rule away without being asked",
            };
            let send = async |clan: &str, request: &RemoveNamed| context.client.drop_rule(clan, request).await;
            if let Some(gone) = how.remove(name, removal, context, send).await? {
                printer.talk(&format!("The rule {gone} is gone."));
            }
            Ok(())
        }
        Verb::List { clan } => {
            let clan = context.clan(clan).await?;
            let rules = context.ask(context.client.rules(&clan)).await?;
            if printer.is_json() {
                return printer.json(&rules);
            }
            let mut table = Table::new(&["RULE", "FROM", "TO", "PORTS", "BY"]);
            for rule in &rules {
                let by = rule.by.as_ref().map_or("", |name| name.as_str());
                table.row([
                    rule.name.as_str().into(),
                    rule.from.as_str().into(),
                    rule.to.as_str().into(),
                    rule.ports.join(", ").into(),
                    by.into(),
                ]);
            }
            table.print(printer)
        }
    }
}

fn sentence(rule: &RuleInfo) -> String {
    let ports = if rule.ports.is_empty() { String::new() } else { format!(" on {}", rule.ports.join(", ")) };
    format!("{} may reach {}{ports}", rule.from, rule.to)
}
