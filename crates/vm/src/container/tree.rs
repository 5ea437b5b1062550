//! Trees of files whose owners are users of a container: unpacked from an image, and removed.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::process::Command;

use super::missing;
use crate::{VmError, file};

/// Arguments of `unshare` for a user namespace in which this user is root, and the subordinate ids are all others.
pub(super) const USER_NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--map-auto"];
const STAGING: &str = ".new";

/// What tools get to see of the environment.
pub(super) fn environment() -> Vec<(&'static str, OsString)> {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    path.push(":/usr/sbin:/sbin");
    vec![("LC_ALL", "C".into()), ("PATH", path)]
}

/// Unpacks an erofs file system to `tree`, whole or not at all, unless that is there. Nothing may unpack to it at the same
/// time. The kernel mounts no erofs for an ordinary user.
pub async fn unpack(image: &Path, tree: &Path) -> Result<(), VmError> {
    if tree.is_dir() {
        return Ok(());
    }
    let tools = missing::tools().map_err(VmError::Missing)?;
    let mut name = tree.as_os_str().to_owned();
    name.push(STAGING);
    let staging = PathBuf::from(name);
    remove(&staging).await?;
    file::create_private_dir(&staging).map_err(VmError::io("create", &staging))?;
    let mut command = in_namespace(&tools.unshare);
    // The image may be anybody's: whoever reads it sees it, its own place, and nothing else.
    command.arg(&tools.bwrap).args(["--unshare-net", "--unshare-pid", "--die-with-parent", "--new-session"]);
    for shared in ["/usr", "/lib", "/lib64", "/bin", "/sbin"] {
        command.args(["--ro-bind-try", shared, shared]);
    }
    command.arg("--ro-bind").arg(image).arg("/image").arg("--bind").arg(&staging).arg("/out");
    command.args(["--dev", "/dev", "--proc", "/proc", "--"]).arg(&tools.fsck).args(["--extract=/out/tree", "/image"]);
    let done = run(command, "fsck.erofs").await;
    let done = done.and_then(|()| {
        fs::rename(staging.join("tree"), tree).map_err(VmError::io("rename", tree))?;
        file::sync_parent(tree).map_err(VmError::io("write", tree))
    });
    let cleared = remove(&staging).await;
    done.and(cleared)
}

/// Removes a folder with files that are of a container's users; nothing happens if it is not there.
pub async fn remove(folder: &Path) -> Result<(), VmError> {
    if !folder.exists() {
        return Ok(());
    }
    let Ok(tools) = missing::tools() else {
        // As far as it goes without more rights.
        return fs::remove_dir_all(folder).map_err(VmError::io("remove", folder));
    };
    let mut command = in_namespace(&tools.unshare);
    command.args(["rm", "-rf", "--one-file-system", "--"]).arg(folder);
    run(command, "rm").await
}

fn in_namespace(unshare: &Path) -> Command {
    let mut command = Command::new(unshare);
    command.args(USER_NAMESPACE).arg("--").env_clear().envs(environment()).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(mut command: Command, tool: &'static str) -> Result<(), VmError> {
    let Output { status, stdout, stderr } =
        command.output().await.map_err(VmError::io("run", command.as_std().get_program()))?;
    if status.success() {
        return Ok(());
    }
    let said = [stderr, stdout].concat();
    let said: Vec<String> = String::from_utf8_lossy(&said).lines().rev().take(3).map(str::to_owned).collect();
    Err(VmError::ToolFailed { tool, log: format!("{status}: {}", said.join("; ")) })
}
