//! Where the controller waits in a guest that may become a template.

use std::{fs, io, os::unix::fs::FileTypeExt};

use clan_wire::agent::{AT_GATE, GATE};

/// Returns at once in most guests. Where the agent made a gate, returns when it opens it: until then this guest may be
/// saved, and many may go on from its state. To be called before anything draws a random number.
///
/// INVARIANT: no key is made, and nothing of a clan is here, before this returns.
pub fn pass_gate() -> io::Result<()> {
    if !fs::symlink_metadata(GATE).is_ok_and(|meta| meta.file_type().is_fifo()) {
        return Ok(());
    }
    fs::write(AT_GATE, "")?;
    match fs::File::open(GATE) {
        Ok(_) => Ok(()),
        // It opened just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
