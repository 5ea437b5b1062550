//! Packs directories and archives into read-only file systems with `mkfs.erofs`.

use std::path::Path;

use tokio::process::Command;

use crate::{process::command, root::EPOCH};

/// A fixed file system id, for equal contents to be equal images. It identifies nothing: hashes do.
const UUID: &str = "636c616e-0000-4000-8000-000000000001";

/// Fast to read and not large; what the kernel of the guest can unpack.
const COMPRESSION: &str = "-zlz4hc,12";

/// Unpacks the archive $1 into the new directory $2, and packs that with the options that follow. Device nodes cannot be made in a user namespace,
/// and a guest's come from its kernel.
const PACK_ARCHIVE: &str = r#"set -eu
archive="$1"
tree="$2"
shift 2
mkdir "$tree"
tar -C "$tree" -xf "$archive" --numeric-owner --preserve-permissions --same-owner --exclude='./dev/*'
mkfs.erofs "$@" "$tree"
rm -rf "$tree"
"#;

/// The command that packs a whole system. Extended attributes are left out: all they hold is file capabilities, and
/// everything in a guest that needs them runs as root.
pub(crate) fn pack_archive(tar: &Path, tree: &Path, image: &Path) -> Command {
    let mut command = as_root("sh");
    command.args(["-c", PACK_ARCHIVE, "pack"]).arg(tar).arg(tree).args(options()).arg(image);
    command
}

/// The command that packs a directory; everything belongs to root.
pub(crate) fn pack_directory(tree: &Path, image: &Path) -> Command {
    let mut command = command("mkfs.erofs");
    command.args(options()).arg("--all-root").arg(image).arg(tree);
    command
}

/// The command that removes directories in which files belong to users of the namespace.
pub(crate) fn remove(directories: &[std::path::PathBuf]) -> Command {
    let mut command = as_root("rm");
    command.args(["-rf", "--"]).args(directories);
    command
}

/// The command that does nothing, as root of a user namespace: shows whether that is possible.
pub(crate) fn probe() -> Command {
    as_root("true")
}

fn options() -> [String; 4] {
    [COMPRESSION.to_owned(), "-x-1".to_owned(), format!("-T{EPOCH}"), format!("-U{UUID}")]
}

/// Root in a user namespace in which the user's subordinate ids stand for everybody else; root stays root.
fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return command(program);
    }
    let mut command = command("unshare");
    command.args(["--user", "--map-root-user", "--map-auto", "--", program]);
    command
}
