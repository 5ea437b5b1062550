//! The container's network: a namespace behind pasta's, joined to it by a wire, with the same addresses.
//!
//! ```text
//! the container: eth0, 10.0.2.15 ── wire ── up0, pasta's namespace: routes, eth0 ── pasta
//! ```
//!
//! pasta's namespace has no address of its own beside its loopback, and translates nothing: it routes. Its kernel drops
//! what is addressed to 0.0.0.0 or 127.0.0.0/8.

use std::{
    fs,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::Path,
    process::{Command, Stdio},
};

use rustix::{
    process::{Pid, WaitOptions, waitpid},
    thread::UnshareFlags,
};

use crate::network::{ADDRESS, GATEWAY, GATEWAY_MAC};

const MAC: &str = "52:55:0a:00:02:0f";
/// As pasta's own.
const MTU: u32 = 65_520;

/// Moves this process, which is alone in pasta's namespaces and has one thread, into a user and a network namespace below
/// them, connected.
pub(super) fn connect() -> io::Result<()> {
    ip(&["address", "flush", "dev", "eth0"], "")?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    ip(
        &["-batch", "-"],
        &format!(
            "link add up0 address {GATEWAY_MAC} mtu {MTU} type veth peer name down0 address {MAC} mtu {MTU}\n\
             link set up0 up\n\
             route add {GATEWAY} dev eth0 scope link\n\
             route add default via {GATEWAY} dev eth0\n\
             neighbor replace {GATEWAY} lladdr {GATEWAY_MAC} dev eth0 nud permanent\n\
             route add {ADDRESS} dev up0 scope link\n\
             neighbor replace {ADDRESS} lladdr {MAC} dev up0 nud permanent\n"
        ),
    )?;
    // As `/proc` has it, which may be another namespace's.
    let own = fs::read_link("/proc/self")?;
    let (until, moved) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread, so the child may do anything.
    let helper = match unsafe { libc::fork() } {
        0 => {
            drop(moved);
            let done = stay_behind(until, &own);
            if let Err(error) = &done {
                // It is in the container's log.
                let _ = writeln!(io::stderr(), "clan: the container's namespaces: {error}");
            }
            std::process::exit(i32::from(done.is_err()))
        }
        child if child < 0 => return Err(io::Error::last_os_error()),
        child => Pid::from_raw(child),
    };
    // SAFETY: the descriptor table is not touched.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET)? };
    rustix::io::write(&moved, b"\n")?;
    let status = waitpid(helper, WaitOptions::empty())?;
    if status.is_none_or(|(_, status)| status.exit_status() != Some(0)) {
        return Err(io::Error::other("the container is not connected"));
    }
    ip(
        &["-batch", "-"],
        &format!(
            "link set lo up\n\
             link set down0 name eth0 up\n\
             address add {ADDRESS}/32 dev eth0\n\
             route add {GATEWAY} dev eth0 scope link\n\
             route add default via {GATEWAY} dev eth0 src {ADDRESS}\n\
             neighbor replace {GATEWAY} lladdr {GATEWAY_MAC} dev eth0 nud permanent\n"
        ),
    )?;
    // Sockets for echoes, as systemd allows them in a VM. Where there are fewer groups, root has raw ones.
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 65535");
    Ok(())
}

/// What only somebody outside can do for a process that has moved: give it its users, and its end of the wire.
fn stay_behind(until: OwnedFd, process: &Path) -> io::Result<()> {
    fs::File::from(until).read_exact(&mut [0])?;
    for map in ["uid_map", "gid_map"] {
        let here = fs::read_to_string(Path::new("/proc/self").join(map))?;
        fs::write(Path::new("/proc").join(process).join(map), same(&here))?;
    }
    // As the kernel has it for who asks.
    let parent = std::os::unix::process::parent_id().to_string();
    ip(&["link", "set", "down0", "netns", &parent], "")
}

/// The map by which a namespace has the users that the one above it has (user_namespaces(7)); from that one's map.
fn same(above: &str) -> String {
    let line = |line: &str| {
        let mut fields = line.split_whitespace();
        let (first, count) = (fields.next()?, fields.nth(1)?);
        Some(format!("{first} {first} {count}\n"))
    };
    above.lines().filter_map(line).collect()
}

/// Runs `ip`, with commands for its `-batch -`.
fn ip(args: &[&str], commands: &str) -> io::Result<()> {
    let mut child = Command::new("ip").args(args).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(commands.as_bytes())?;
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("`ip {}`: {status}", args.join(" ")))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_the_same_below() {
        assert_eq!(same("         0       1000          1\n         1     100000      65535\n"), "0 0 1\n1 1 65535\n");
    }
}
