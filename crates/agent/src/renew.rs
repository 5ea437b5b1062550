//! A guest that goes on from a saved state is one of many until this makes it differ: random numbers, ids, addresses.
//!
//! The kernel's random numbers follow from the state that was saved, and would be the same in every guest.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use clan_wire::agent::{AT_GATE, ENTROPY, GATE};
use rustix::mount::mount_bind;

use crate::log;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const ADD_ENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
const RESEED: libc::Ioctl = 0x5207;

const MACHINE_ID: &str = "/etc/machine-id";
const RANDOM_SEED: &str = "/var/lib/systemd/random-seed";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Lies over [`BOOT_ID`], which the kernel never changes.
const NEW_BOOT_ID: &str = "/run/clan/boot-id";
const DEVICE: &[u8] = b"eth0";

/// Makes the gate below a directory that is to be the root.
pub(crate) fn make_gate(root: &Path) -> io::Result<()> {
    let gate = root.join(GATE.trim_start_matches('/'));
    if let Some(parent) = gate.parent() {
        fs::create_dir_all(parent)?;
    }
    rustix::fs::mknodat(rustix::fs::CWD, &gate, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0)?;
    Ok(())
}

/// Whether this guest is still one of many.
pub(crate) fn has_gate() -> bool {
    fs::symlink_metadata(GATE).is_ok_and(|meta| meta.file_type().is_fifo())
}

/// Takes off the disk what only one guest may have.
pub(crate) fn seal() -> io::Result<()> {
    if !has_gate() {
        return Err(io::Error::other("this guest has begun its own life"));
    }
    if !Path::new(AT_GATE).exists() {
        return Err(io::Error::other("the controller does not wait yet"));
    }
    // A guest that boots from this disk, instead of going on, makes its own then.
    fs::write(MACHINE_ID, "")?;
    match fs::remove_file(RANDOM_SEED) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    rustix::fs::sync();
    Ok(())
}

/// Makes this guest differ from every other. The first step is the one that counts, as all others draw from it. Whether it had
/// to be made so: then [`journal`] is to follow.
pub(crate) fn renew(entropy: &[u8]) -> io::Result<bool> {
    stir(entropy)?;
    if !has_gate() {
        return Ok(false);
    }
    fs::write(MACHINE_ID, format!("{}\n", hex(&random::<16>()?)))?;
    let id = uuid(random()?);
    fs::write(NEW_BOOT_ID, format!("{id}\n"))?;
    mount_bind(NEW_BOOT_ID, BOOT_ID)?;
    // Nothing secret hangs on this.
    if let Err(error) = address() {
        log::error(&format!("the network device's address was not renewed: {error}"));
    }
    open_gate().map(|()| true)
}

/// INVARIANT: the controller goes on only after the kernel's random numbers are this guest's own.
fn open_gate() -> io::Result<()> {
    let gate = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(GATE);
    // First, so that a controller that is started now does not wait.
    fs::remove_file(GATE)?;
    match gate {
        Ok(_) => Ok(()),
        // Nobody waits.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Mixes bytes into the kernel's random numbers, and has them count at once.
fn stir(entropy: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: libc::c_int,
        bytes: libc::c_int,
        content: [u8; ENTROPY],
    }
    let content: [u8; ENTROPY] = entropy.try_into().map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let info = PoolInfo { bits: ENTROPY as libc::c_int * 8, bytes: ENTROPY as libc::c_int, content };
    let random = File::open("/dev/urandom")?;
    // SAFETY: the kernel reads the structure, which is as random(4) says and lives through the call; the second call takes
    // no argument.
    let done = unsafe {
        libc::ioctl(random.as_raw_fd(), ADD_ENTROPY, &raw const info) == 0
            && libc::ioctl(random.as_raw_fd(), RESEED, 0) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Gives the network device an address of its own, of those that nobody assigns.
fn address() -> io::Result<()> {
    let mut mac: [u8; 6] = random()?;
    mac[0] = mac[0] & 0xfc | 0x02;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all of it is numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE) {
        *to = *from as libc::c_char;
    }
    let mut hardware = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in hardware.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = hardware;
    // SAFETY: the kernel reads the structure, which lives through the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFHWADDR as libc::Ioctl, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The journal notes the ids with every line, and knows them from its start. systemd starts it again, and has kept what
/// programs are writing to. Nothing secret hangs on it either, and it takes a processor half a second, which the guest has other
/// use for at first.
pub(crate) fn journal() -> io::Result<()> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.trim_end() == "systemd-journal"
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            return Ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM)?);
        }
    }
    Err(ErrorKind::NotFound.into())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        use std::fmt::Write as _;
        // A string takes everything.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// RFC 9562, section 5.4.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex(&bytes);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_uuid_says_what_it_is() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }

    #[test]
    fn a_gate_is_a_pipe() {
        let root = std::env::temp_dir().join(format!("clan-agent-gate-{}", std::process::id()));
        make_gate(&root).unwrap();
        let made = fs::metadata(root.join("run/clan/gate")).unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert!(made.file_type().is_fifo());
    }

    #[test]
    fn too_little_randomness_is_refused() {
        assert_eq!(renew(&[1; ENTROPY - 1]).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
