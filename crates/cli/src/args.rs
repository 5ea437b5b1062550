//! What can be typed.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::commands;

const AFTER_HELP: &str = "\
Getting started:
  clan create family            found a clan; its machine starts on this computer
  clan invite                   print a link that lets one person in
  clan join 'clan://join/…'     accept such a link
  clan web                      everything else, in the browser

Environment:
  CLAN_DATA                     the data folder, as `--data`
  CLAN_LOG                      what to log, such as `clan_manager=debug`
  NO_COLOR                      no colours if set

Exit codes:
  0    done
  1    refused, or a mistake that you can correct
  2    the command line was not understood
  3    whoever read the output went away
  4    the manager does not answer
  5    it took too long
  255  a mistake in Clan

Data goes to stdout, everything else to stderr. With --json an error is one JSON object on stderr.";

/// A private network of people and machines that nobody hosts.
#[derive(Debug, Parser)]
#[command(name = "clan", version, after_help = AFTER_HELP, propagate_version = true, disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Folder with your clans, keys and images [default: $XDG_DATA_HOME/clan or ~/.local/share/clan]
    #[arg(long, global = true, value_name = "DIR", env = "CLAN_DATA", hide_env_values = true)]
    pub(crate) data: Option<PathBuf>,

    /// Print data as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Answer questions with yes
    #[arg(long, short = 'y', global = true)]
    pub(crate) yes: bool,

    /// Give up when the manager has not answered for so many seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,

    /// Log to stderr what the program does; twice for details
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// One variant per noun or daily verb.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Found a clan
    Create(commands::create::Args),
    /// Make a link that lets somebody in
    Invite(commands::invite::Args),
    /// Show the invites that were made, and what became of them
    Invites(commands::invites::Args),
    /// Accept an invitation
    Join(commands::join::Args),
    /// Open a link that was clicked on
    Open(commands::open::Args),
    /// Your devices: link a second computer, put a lost one out
    #[command(subcommand)]
    Device(commands::device::Verb),
    /// Come back to a clan on a new computer, with your recovery phrase
    Recover(commands::recover::Args),
    /// Show clans, machines and what needs attention
    Status(commands::status::Args),
    /// Show who belongs to a clan
    Members(commands::members::Args),
    /// Show a clan's machines and how they are reached
    Machines(commands::machines::Args),
    /// See whether a machine answers, how fast, and by which path
    Ping(commands::ping::Args),
    /// Steer machines of the clan; admit phones and others by standard WireGuard
    #[command(subcommand)]
    Machine(commands::machine::Verb),
    /// Who may reach what in a clan
    #[command(subcommand)]
    Rule(commands::rule::Verb),
    /// Groups of people and machines, for rules
    #[command(subcommand)]
    Group(commands::group::Verb),
    /// Let somebody in whose invite asked for approval
    Approve(commands::approve::Args),
    /// Refuse somebody whose invite asked for approval
    Deny(commands::approve::Args),
    /// Give a person another role
    Role(commands::role::Args),
    /// Give a person or a machine another name
    #[command(subcommand)]
    Rename(commands::rename::Noun),
    /// Put a person or a machine out of a clan, or withdraw an invite
    #[command(subcommand)]
    Revoke(commands::revoke::Noun),
    /// Machines that pass packets on between machines that do not reach each other
    #[command(subcommand)]
    Relay(commands::relay::Verb),
    /// Show who decided what in a clan
    Log(commands::log::Args),
    /// This computer's machines in its clans
    #[command(subcommand)]
    Vm(commands::vm::Verb),
    /// What this computer's virtual machines boot from
    #[command(subcommand)]
    Image(commands::image::Verb),
    /// What the clan's machines offer
    #[command(subcommand)]
    Service(commands::service::Verb),
    /// Open the web page
    Web(commands::web::Args),
    /// Leave a clan, and delete its machine here
    Leave(commands::leave::Args),
    /// Run the manager: owns the virtual machines, serves the web page
    Manager(commands::manager::Args),
    /// Run the controller: makes a computer a clan's machine without a virtual one
    Controller(commands::controller::Args),
    /// A step on the way into a container: run by the manager
    #[cfg(feature = "manager")]
    #[command(hide = true)]
    Contain {
        /// Which, and what it needs to know
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<std::ffi::OsString>,
    },
    /// Print completions for a shell
    Completions(commands::completions::Args),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
