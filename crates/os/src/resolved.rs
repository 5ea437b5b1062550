//! systemd-resolved: which name server knows a zone, by network device (resolvectl(1), which talks to it over D-Bus).
//!
//! What it is told about a device it forgets with the device, so there is nothing to undo, not even after a crash.

use std::{io, net::IpAddr, time::Duration};

use tokio::{process::Command, time::timeout};

/// How long it may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Why systemd-resolved was not told.
#[derive(Debug, thiserror::Error)]
pub enum ResolvedError {
    /// There is no such program.
    #[error("this computer has no resolvectl: it does not use systemd-resolved")]
    Missing,
    /// The program could not be run.
    #[error("cannot run resolvectl")]
    Run(#[source] io::Error),
    /// It said no.
    #[error("systemd-resolved refuses: {0}")]
    Refused(String),
    /// It said nothing.
    #[error("systemd-resolved did not answer within {} s", LIMIT.as_secs())]
    Silent,
}

/// Has names below `zone` asked for at `server`, through `interface`, and no others.
pub async fn direct(interface: &str, server: IpAddr, zone: &str) -> Result<(), ResolvedError> {
    let server = server.to_string();
    for arguments in [
        ["default-route", interface, "false"],
        ["dns", interface, &server],
        // Names without a dot are completed with it too.
        ["domain", interface, zone],
    ] {
        let run = Command::new("resolvectl").args(arguments).kill_on_drop(true).output();
        let output = timeout(LIMIT, run).await.map_err(|_| ResolvedError::Silent)?.map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound { ResolvedError::Missing } else { ResolvedError::Run(error) }
        })?;
        if !output.status.success() {
            let said: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(300).collect();
            return Err(ResolvedError::Refused(said));
        }
    }
    Ok(())
}
