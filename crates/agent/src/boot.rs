//! From the kernel's hand-over to the guest's own init.

use std::{
    ffi::{CStr, CString},
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::Access,
    io::Errno,
    mount::{MountFlags, mount, mount_move},
    process::{Pid, Signal, WaitOptions, chroot, kill_process, setsid, waitpid},
    system::finit_module,
};

use crate::{
    RESIDENT,
    cmdline::{CmdlineError, Disks},
    disk, log, port, renew,
};

/// How long a disk may take to appear.
const DISK_PATIENCE: Duration = Duration::from_secs(20);
const INIT: &CStr = c"/sbin/init";
/// The data disk carries the root file system, so systemd cannot release it as it stops the mounts. This leaves it to the
/// last step of the shutdown, which makes it read-only, so that it is clean at the next start.
const DATA_MOUNT: &str = "[Unit]\nDefaultDependencies=no\n";
const DATA_MOUNT_AT: &str = "/new/run/systemd/system/data.mount.d";
/// `MODULE_INIT_COMPRESSED_FILE`.
const COMPRESSED: i32 = 4;

/// A step that failed, and so stops the start.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    #[error("the disk {0} did not appear")]
    NoDisk(String),
    #[error("cannot {action}: {error}")]
    Step { action: String, error: io::Error },
}

/// Adds to an error what was attempted.
trait Attempt<T> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, BootError> {
        self.map_err(|error| BootError::Step { action: action(), error: error.into() })
    }
}

/// Starts the guest. If that fails, stays as its only program and tells the manager. Never ends: the kernel would panic.
pub(crate) fn boot() -> ExitCode {
    let begin = Instant::now();
    let mut problems = Vec::new();
    if let Err(error) = kernel_mounts() {
        note(&mut problems, &error.to_string());
    }
    log::open();
    load_modules(&mut problems);
    log::info(&format!("modules loaded after {} ms", begin.elapsed().as_millis()));
    // The new root is entered only once everything in it is in place.
    match stack_disks().and_then(|disks| enter(&disks)) {
        Ok(own_program) => {
            if let Err(error) = disk::grow(0) {
                note(&mut problems, &format!("the data disk is not used to its end: {error}"));
            }
            log::info(&format!("root file system ready after {} ms", begin.elapsed().as_millis()));
            start_init(&own_program, &mut problems);
        }
        Err(error) => note(&mut problems, &error.to_string()),
    }
    log::error("the guest was not started; waiting for the manager");
    port::serve(problems)
}

fn note(problems: &mut Vec<String>, text: &str) {
    log::error(text);
    problems.push(text.to_owned());
}

fn kernel_mounts() -> Result<(), BootError> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        directory(at)?;
        match mount(kind, at, kind, MountFlags::empty(), None) {
            // The kernel may have done it.
            Err(Errno::BUSY) => {}
            other => other.attempt(|| format!("mount {at}"))?,
        }
    }
    Ok(())
}

/// Loads what the image's builder listed. A module that does not load is a problem, but maybe not one for this guest.
fn load_modules(problems: &mut Vec<String>) {
    let list = match fs::read_to_string("/modules.list") {
        Ok(list) => list,
        Err(error) => return note(problems, &format!("cannot read /modules.list: {error}")),
    };
    for path in list.lines().map(str::trim).filter(|path| !path.is_empty()) {
        let flags = if path.ends_with(".ko") { 0 } else { COMPRESSED };
        let loaded = File::open(path).and_then(|file| match finit_module(&file, c"", flags) {
            Err(Errno::EXIST) => Ok(()),
            other => Ok(other?),
        });
        if let Err(error) = loaded {
            note(problems, &format!("cannot load {path}: {error}"));
        }
    }
}

/// Mounts the disks and stacks them at `/new`.
fn stack_disks() -> Result<Disks, BootError> {
    let cmdline = fs::read_to_string("/proc/cmdline").attempt(|| "read the kernel's command line".into())?;
    let disks = Disks::parse(&cmdline)?;
    mount_disk(&disks.root, "/root", "erofs", MountFlags::RDONLY, None)?;
    let mut lower = Vec::new();
    for (number, layer) in disks.layers.iter().enumerate() {
        let at = format!("/layer{number}");
        mount_disk(layer, &at, "erofs", MountFlags::RDONLY, None)?;
        lower.push(at);
    }
    lower.push("/root".to_owned());
    mount_disk(&disks.data, "/data", "ext4", MountFlags::NOATIME, Some(c"errors=remount-ro"))?;
    directory("/data/overlay/upper")?;
    directory("/data/overlay/work")?;
    directory("/new")?;
    // The lower layers change with every update of the image, so nothing may be recorded that refers to their inodes.
    let options = format!(
        "lowerdir={},upperdir=/data/overlay/upper,workdir=/data/overlay/work,index=off,metacopy=off,redirect_dir=off",
        lower.join(":")
    );
    let options = CString::new(options).map_err(io::Error::from).attempt(|| "name the layers".into())?;
    mount("overlay", "/new", "overlay", MountFlags::NOATIME, options.as_c_str())
        .attempt(|| "stack the root file system".into())?;
    Ok(disks)
}

fn mount_disk(name: &str, at: &str, kind: &str, flags: MountFlags, options: Option<&CStr>) -> Result<(), BootError> {
    let device = format!("/dev/{name}");
    let begin = Instant::now();
    while !Path::new(&device).exists() {
        if begin.elapsed() > DISK_PATIENCE {
            return Err(BootError::NoDisk(device));
        }
        thread::sleep(Duration::from_millis(2));
    }
    directory(at)?;
    mount(device.as_str(), at, kind, flags, options).attempt(|| format!("mount {device} as {kind}"))
}

/// Makes the stacked file system the root. Gives this program's file, whose path is out of reach from then on.
fn enter(disks: &Disks) -> Result<File, BootError> {
    rustix::fs::accessat(
        rustix::fs::CWD,
        Path::new("/new").join(INIT.to_string_lossy().trim_start_matches('/')),
        Access::EXEC_OK,
        rustix::fs::AtFlags::empty(),
    )
    .or_else(|error| {
        // An absolute symbolic link does not resolve from out here.
        fs::symlink_metadata("/new/sbin/init").map(drop).map_err(|_| error)
    })
    .attempt(|| "find /sbin/init in the image".into())?;
    let own_program = File::open("/proc/self/exe").attempt(|| "open this program".into())?;
    for at in ["/new/data", "/new/dev", "/new/proc", "/new/run", "/new/sys"] {
        directory(at)?;
    }
    mount("tmpfs", "/new/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755,size=20%")
        .attempt(|| "mount /run".into())?;
    directory(DATA_MOUNT_AT)?;
    fs::write(format!("{DATA_MOUNT_AT}/clan.conf"), DATA_MOUNT).attempt(|| "write to /run".into())?;
    if disks.template {
        renew::make_gate(Path::new("/new")).attempt(|| "make the controller wait".into())?;
    }
    for name in ["data", "dev", "sys", "proc"] {
        mount_move(format!("/{name}"), format!("/new/{name}")).attempt(|| format!("move /{name}"))?;
    }
    // What the initramfs held is memory.
    let _ = fs::remove_dir_all("/modules");
    rustix::process::chdir("/new").attempt(|| "enter the root file system".into())?;
    mount_move(".", "/").attempt(|| "move the root file system".into())?;
    chroot(".").attempt(|| "change to the root file system".into())?;
    rustix::process::chdir("/").attempt(|| "enter the root file system".into())?;
    Ok(own_program)
}

fn directory(at: &str) -> Result<(), BootError> {
    fs::create_dir_all(at).attempt(|| format!("create {at}"))
}

/// Leaves a copy of this program running, then becomes the guest's init. Returns only if that fails.
fn start_init(own_program: &File, problems: &mut Vec<String>) {
    // SAFETY: this process has one thread, so the child may do anything.
    let child = match unsafe { libc::fork() } {
        0 => become_resident(own_program, problems),
        child if child < 0 => {
            return note(problems, &format!("cannot stay beside init: {}", io::Error::last_os_error()));
        }
        child => child,
    };
    let error = execute(None, INIT, &[INIT.to_owned()]);
    note(problems, &format!("cannot start /sbin/init: {error}"));
    if let Some(child) = Pid::from_raw(child) {
        let _ = kill_process(child, Signal::KILL);
        let _ = waitpid(Some(child), WaitOptions::empty());
    }
}

fn become_resident(own_program: &File, problems: &[String]) -> ! {
    let _ = setsid();
    let words = std::iter::once(RESIDENT).chain(problems.iter().map(String::as_str));
    let args: Vec<CString> = words.filter_map(|word| CString::new(word).ok()).collect();
    let error = execute(Some(own_program), c"", &args);
    log::error(&format!("cannot stay beside init: {error}"));
    std::process::exit(1)
}

/// Becomes another program, named by an open file or by its path. Returns only if that fails.
fn execute(file: Option<&File>, path: &CStr, args: &[CString]) -> io::Error {
    let mut pointers: Vec<_> = args.iter().map(|arg| arg.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the path and the arguments end with NUL, the list of arguments with a null pointer; all outlive the call,
    // and no other thread changes the environment.
    unsafe {
        match file {
            Some(file) => libc::fexecve(file.as_raw_fd(), pointers.as_ptr(), environ()),
            None => libc::execv(path.as_ptr(), pointers.as_ptr()),
        };
    }
    io::Error::last_os_error()
}

fn environ() -> *const *const libc::c_char {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: the C library sets it before `main`; nothing in this program changes it.
    unsafe { environ }
}
