//! What a guest cannot reach. What a hostile one can make up is tested in `crates/vm/tests/network.rs`; here a whole one
//! tries, in a whole lab.

use std::{io::ErrorKind, net::Ipv4Addr};

use clan_lab::{Console, INTERNET_ADDRESS, Lab, LabError, PROXY_PORT, Person, SECOND_ADDRESS, story};

use crate::{Checked, Checks, HEAL, status};

/// Where something listens that trusts whoever connects.
const TRUSTING: u16 = 4163;

pub(crate) fn check(checks: &mut Checks, lab: &mut Lab) {
    checks.that("a guest has no way to the loopback of the computer it runs on", || no_loopback(lab.person("second")));
}

fn no_loopback(second: &Person) -> Checked {
    let status = status(second)?;
    if !status["vms"][0]["exposure"].is_null() {
        return Err(LabError::Promise(format!("`clan status` says: {}", status["vms"][0]["exposure"])));
    }
    let listener = second.occupy(TRUSTING)?;
    let complain = |source| LabError::Io { what: "listen on second's loopback".into(), source };
    listener.set_nonblocking(true).map_err(complain)?;
    let mut console = second.console(story::CLAN)?;
    // The same way of trying leads elsewhere, and to the page of the guest itself.
    for (address, port) in [(INTERNET_ADDRESS, PROXY_PORT), (Ipv4Addr::LOCALHOST, 80)] {
        if !connects(&mut console, address, port)? {
            return Err(LabError::Promise(format!("{address}:{port} is not reached either: this proves nothing")));
        }
    }
    let targets = [Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(10, 0, 2, 4), SECOND_ADDRESS];
    for address in targets {
        if connects(&mut console, address, TRUSTING)? {
            return Err(LabError::Promise(format!("a guest connects to {address}:{TRUSTING}")));
        }
    }
    match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        Err(error) => Err(complain(error)),
        Ok((_, from)) => Err(LabError::Promise(format!("{from} has connected to second's loopback"))),
    }
}

/// Whether the guest can connect there.
fn connects(console: &mut Console, address: Ipv4Addr, port: u16) -> Result<bool, LabError> {
    let attempt = format!("timeout 5 bash -c ': <>/dev/tcp/{address}/{port}' 2>/dev/null");
    Ok(console.run(&attempt, HEAL)?.1 == 0)
}
