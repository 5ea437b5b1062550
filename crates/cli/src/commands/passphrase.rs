//! Passphrases of encrypted disks: asked for without showing, or read from a file; never an argument.

use std::{fs::File, io::Read as _, path::PathBuf};

use clan_types::Passphrase;
use zeroize::Zeroizing;

use crate::{
    context::{Context, next_line, secret_line},
    error::CliError,
    printer::Printer,
};

/// Whoever gives a longer file meant another one.
const MAX_FILE: u64 = 4 << 10;

/// Where a passphrase comes from.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Source {
    /// Read the passphrase from a file instead of asking for it; without a terminal it is read from stdin
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

/// Whether the disk is to be encrypted.
#[derive(Debug, Default, clap::Args)]
#[command(mut_arg("passphrase_file", |file| file.requires("encrypt")))]
pub(crate) struct Encrypt {
    /// Encrypt the virtual machine's disk with a passphrase, which is asked for. Whenever the manager was started anew, the
    /// machine waits for it: `clan vm unlock`
    #[arg(long, conflicts_with_all = ["container", "integrate"])]
    encrypt: bool,
    #[command(flatten)]
    source: Source,
}

/// Which passphrase gives way to which.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Change {
    #[command(flatten)]
    old: Source,
    /// Read the new passphrase from a file; without a terminal it is the second line of stdin
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: Option<PathBuf>,
}

impl Change {
    /// The old passphrase, and the new one.
    pub(crate) fn passphrases(self, context: &Context) -> Result<(Passphrase, Passphrase), CliError> {
        let old = self.old.passphrase(context)?;
        Ok((old, chosen(self.new_passphrase_file, "New passphrase for the disk (it does not show):", context)?))
    }
}

impl Encrypt {
    /// A new passphrase, if the disk is to be encrypted.
    pub(crate) fn passphrase(self, context: &Context) -> Result<Option<Passphrase>, CliError> {
        if !self.encrypt {
            return Ok(None);
        }
        let printer = &context.printer;
        let asked = self.source.passphrase_file.is_none() && printer.can_ask();
        if asked {
            printer.talk(
                "Nobody opens the disk without its passphrase, and nobody can tell you what it was: keep it well.",
            );
        }
        chosen(self.source.passphrase_file, "Passphrase for the disk (it does not show):", context).map(Some)
    }
}

impl Source {
    /// The passphrase of a disk that there is.
    pub(crate) fn passphrase(self, context: &Context) -> Result<Passphrase, CliError> {
        get(self.passphrase_file, "Passphrase of the disk (it does not show):", &context.printer)
    }
}

/// A new one, which a person says twice.
fn chosen(file: Option<PathBuf>, question: &str, context: &Context) -> Result<Passphrase, CliError> {
    let printer = &context.printer;
    let asked = file.is_none() && printer.can_ask();
    let passphrase = get(file, question, printer)?;
    if asked {
        printer.ask("The same again:");
        if line(&Zeroizing::new(secret_line(printer)?)) != passphrase.expose() {
            return Err(CliError::refused("passphrase", "the two are not the same").hint("try again"));
        }
    }
    Ok(passphrase)
}

fn get(file: Option<PathBuf>, question: &str, printer: &Printer) -> Result<Passphrase, CliError> {
    let text = match file {
        Some(path) => {
            let unread = |e: std::io::Error| {
                CliError::refused("passphrase", format!("{} cannot be read", path.display())).why(e)
            };
            let mut text = Zeroizing::new(String::new());
            File::open(&path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)).map_err(unread)?;
            text
        }
        None if printer.can_ask() => {
            printer.ask(question);
            Zeroizing::new(secret_line(printer)?)
        }
        None => Zeroizing::new(next_line()?.unwrap_or_default()),
    };
    line(&text).parse::<Passphrase>().map_err(|e| CliError::refused("passphrase", "this is no passphrase").why(e))
}

/// Without the end of the line.
fn line(text: &str) -> &str {
    let line = text.strip_suffix('\n').unwrap_or(text);
    line.strip_suffix('\r').unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_the_line_is_no_part_of_a_passphrase() {
        for (given, taken) in [("a b \n", "a b "), ("a b\r\n", "a b"), ("a\n\n", "a\n"), ("", "")] {
            assert_eq!(line(given), taken);
        }
    }
}
