//! What a guest cannot reach. What a hostile one can make up is tested in `crates/vm/tests/network.rs`; here a whole one
//! tries, in a whole lab.

use std::{
    io::ErrorKind,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use clan_lab::{Console, INTERNET_ADDRESS, Lab, LabError, PROXY_PORT, Person, SECOND_ADDRESS, story};

use crate::{
    Checked, Checks, HEAL,
    machine::{promise, rss},
    running_vm, status,
};

/// Where something listens that trusts whoever connects.
const TRUSTING: u16 = 4163;

pub(crate) fn check(checks: &mut Checks, lab: &mut Lab) {
    checks.that("a guest has no way to the loopback of the computer it runs on", || no_loopback(lab.person("second")));
    checks.that("a guest that floods its manager costs it little memory, and is served again afterwards", || {
        floods(lab.person("second"))
    });
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

/// Root in the guest writes to the controller's port whatever it likes, for a while.
fn floods(second: &Person) -> Checked {
    const SECONDS: u64 = 8;
    let manager = second.manager_pid().ok_or_else(|| LabError::Promise("second has no manager".into()))?;
    let before = rss(manager)?;
    let mut console = second.console(story::CLAN)?;
    let port = format!("$(basename $(dirname $(grep -l {} /sys/class/virtio-ports/*/name)))", clan_wire::control::PORT);
    let flood = format!(
        "systemctl stop clan-controller; p=/dev/{port}; ls -l $p && {{ (timeout {SECONDS} cat /dev/urandom >$p; \
         timeout {SECONDS} yes CLAN >$p; systemctl start clan-controller) >/dev/null 2>&1 & }}"
    );
    let (said, _) = console.run(&flood, HEAL)?;
    promise(said.contains("crw"), || format!("the guest has no such port: {said}"))?;
    let (began, mut most) = (Instant::now(), before);
    while began.elapsed() < Duration::from_secs(2 * SECONDS) {
        let asked = Instant::now();
        status(second)?;
        promise(asked.elapsed() < Duration::from_secs(10), || format!("an answer took {:?}", asked.elapsed()))?;
        most = most.max(rss(manager)?);
    }
    promise(most < before + 64, || format!("the manager's memory went from {before} to {most} MiB"))?;
    story::until(HEAL, "second's controller after the flood", || running_vm(second)).map(drop)
}

/// Whether the guest can connect there.
fn connects(console: &mut Console, address: Ipv4Addr, port: u16) -> Result<bool, LabError> {
    let attempt = format!("timeout 5 bash -c ': <>/dev/tcp/{address}/{port}' 2>/dev/null");
    Ok(console.run(&attempt, HEAL)?.1 == 0)
}
