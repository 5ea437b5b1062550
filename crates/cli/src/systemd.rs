//! Services of systemd: the system's and the user's own.

use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
};

use crate::error::CliError;

/// Runs `systemctl`. `instead` is what to do where there is no systemd.
pub(crate) fn systemctl(arguments: &[&str], instead: &str) -> Result<(), CliError> {
    let shown = format!("systemctl {}", arguments.join(" "));
    let failed = |why: String| CliError::refused("service", format!("`{shown}` failed")).why(why);
    let output = Command::new("systemctl").args(arguments).output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => failed("this computer does not run systemd".into()).hint(instead),
        _ => failed(e.to_string()),
    })?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()).hint(instead))
    }
}

/// A word of a unit's command line (systemd.service(5)).
pub(crate) fn quoted(path: &Path) -> Result<String, CliError> {
    // Both have a meaning there.
    Ok(format!("\"{}\"", plain(path)?.replace('%', "%%").replace('$', "$$")))
}

/// A path of a unit's other settings.
pub(crate) fn setting(path: &Path) -> Result<String, CliError> {
    Ok(plain(path)?.replace('%', "%%"))
}

/// This program.
pub(crate) fn executable() -> Result<PathBuf, CliError> {
    std::env::current_exe().map_err(|e| CliError::refused("system", "this executable cannot be found").why(e))
}

fn plain(path: &Path) -> Result<&str, CliError> {
    let text = path.to_str().filter(|text| !text.chars().any(|c| c.is_control() || matches!(c, '"' | '\\')));
    text.ok_or_else(|| CliError::refused("service", format!("{} cannot be in a unit", path.display())))
}
