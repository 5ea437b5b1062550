//! The `clan` executable: the command line of a person's manager, the manager itself, and the controller that runs
//! inside a clan's virtual machine, or on a computer itself.

mod args;
mod browser;
mod commands;
mod context;
mod error;
mod invitation;
mod preflight;
mod printer;
mod progress;
mod qr;
mod systemd;
mod table;
mod words;

use std::process::ExitCode;

use args::{Cli, Command};
use commands::*;
use context::Context;
use error::CliError;
use printer::Printer;

fn main() -> ExitCode {
    let cli = match preflight::parse() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    preflight::start_logging(&cli);
    let printer = Printer::new(cli.global.json);
    match preflight::guard(&printer, || run(cli, &printer)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            printer.error(&error);
            error.exit()
        }
    }
}

fn run(cli: Cli, printer: &Printer) -> Result<(), CliError> {
    match cli.command {
        Command::Completions(args) => return completions::run(&args, printer),
        Command::Controller(args) => return controller::run(args, printer),
        #[cfg(feature = "manager")]
        Command::Contain { words } => return manager::contain(words),
        Command::Manager(args) => return manager::run(args, &cli.global, printer),
        _ => {}
    }
    let context = Context::new(&cli.global, printer)?;
    preflight::block_on(async {
        match cli.command {
            Command::Create(args) => create::run(args, &context).await,
            Command::Invite(args) => invite::run(args, &context).await,
            Command::Invites(args) => invites::run(args, &context).await,
            Command::Relay(verb) => relay::run(verb, &context).await,
            Command::Approve(args) => approve::run(args, true, &context).await,
            Command::Deny(args) => approve::run(args, false, &context).await,
            Command::Role(args) => role::run(args, &context).await,
            Command::Rename(noun) => rename::run(noun, &context).await,
            Command::Revoke(noun) => revoke::run(noun, &context).await,
            Command::Log(args) => log::run(args, &context).await,
            Command::Join(args) => join::run(args, &context).await,
            Command::Open(args) => open::run(args, &context).await,
            Command::Device(verb) => device::run(verb, &context).await,
            Command::Recover(args) => recover::run(args, &context).await,
            Command::Status(_) => status::run(&context).await,
            Command::Members(args) => members::run(args, &context).await,
            Command::Machines(args) => machines::run(args, &context).await,
            Command::Ping(args) => ping::run(args, &context).await,
            Command::Machine(verb) => machine::run(verb, &context).await,
            Command::Rule(verb) => rule::run(verb, &context).await,
            Command::Group(verb) => group::run(verb, &context).await,
            Command::Vm(verb) => vm::run(verb, &context).await,
            Command::Image(verb) => image::run(verb, &context).await,
            Command::Service(verb) => service::run(verb, &context).await,
            Command::Web(args) => web::run(args, &context).await,
            Command::Leave(args) => leave::run(args, &context).await,
            Command::Completions(_) | Command::Controller(_) | Command::Manager(_) => Ok(()),
            #[cfg(feature = "manager")]
            Command::Contain { .. } => Ok(()),
        }
    })
}
