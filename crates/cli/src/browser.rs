//! Opening a page in the person's browser.

use std::process::{Command, Stdio};

use crate::{error::CliError, printer::Printer};

/// Prints the URL as data and, where there is a desktop, opens it.
pub(crate) fn show(url: &str, print_only: bool, printer: &Printer) -> Result<(), CliError> {
    printer.data(url)?;
    if print_only || !has_desktop() {
        return Ok(());
    }
    // INVARIANT: only http URLs are handed to the desktop, which would run other programs for other schemes.
    if !(url.starts_with("http://") || url.starts_with("https://")) {
        return Err(CliError::refused("url", "the manager named something that is no web page").why(url.to_owned()));
    }
    let opened =
        Command::new("xdg-open").arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    if let Err(error) = opened {
        printer.talk(&format!("Open the address above in your browser (xdg-open cannot be run: {error})."));
    }
    Ok(())
}

fn has_desktop() -> bool {
    ["WAYLAND_DISPLAY", "DISPLAY"].iter().any(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty()))
}
