//! A guest's state in a file: saved once, and gone on with any number of times. It is QEMU's migration stream:
//! <https://www.qemu.org/docs/master/devel/migration/main.html>.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::{Begin, Qmp, QmpError, VmError, process::Dir};

/// Where QEMU writes to: it is confined, and opens no files for this.
const SOCKET: &str = "save.sock";
/// A guest of 512 MiB that has just booted takes 0.5 s.
const SAVE_LIMIT: Duration = Duration::from_secs(60);
/// Nothing else shall have the way.
const BANDWIDTH: u64 = 1 << 40;
const LOOK_AGAIN: Duration = Duration::from_millis(3);

/// The file that a guest begins with; QEMU inherits it.
pub(crate) fn open(begin: &Begin) -> Result<Option<File>, VmError> {
    match begin {
        Begin::Boot | Begin::BootToSave => Ok(None),
        Begin::Saved(path) => {
            let file = File::open(path).map_err(|source| VmError::MissingFile { path: path.clone(), source })?;
            Ok(Some(file))
        }
    }
}

/// Writes the state of a guest that is paused to a new file, which is not there after an error.
pub(crate) async fn save(qmp: &Qmp, dir: &Dir, to: &Path) -> Result<(), VmError> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(to).map_err(VmError::io("create", to))?;
    let saved = write(qmp, dir, file, to).await;
    // It may be gone.
    let _ = fs::remove_file(dir.join(SOCKET));
    if saved.is_err() {
        let _ = fs::remove_file(to);
    }
    saved
}

async fn write(qmp: &Qmp, dir: &Dir, file: File, to: &Path) -> Result<(), VmError> {
    let listener = dir.listen(SOCKET).map_err(VmError::io("listen at", dir.join(SOCKET)))?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH })).await?;
    qmp.execute("migrate", json!({ "uri": format!("unix:{SOCKET}") })).await?;
    let written = async {
        let (stream, _) = listener.accept().await?;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(SAVE_LIMIT))?;
        let copied = tokio::task::spawn_blocking(move || {
            let (mut stream, mut file) = (stream, file);
            io::copy(&mut stream, &mut file)
        });
        copied.await.map_err(io::Error::other)?
    };
    let done = async {
        let (written, finished) = tokio::join!(written, finished(qmp));
        // Where nothing could be written any more, QEMU only knows that nobody reads.
        written.map_err(VmError::io("write", to))?;
        finished
    };
    match timeout(SAVE_LIMIT, done).await {
        Ok(done) => done,
        Err(_) => {
            qmp.execute("migrate_cancel", Value::Null).await?;
            Err(VmError::NotSaved { why: format!("it took longer than {} s", SAVE_LIMIT.as_secs()) })
        }
    }
}

/// Waits until QEMU has written everything.
async fn finished(qmp: &Qmp) -> Result<(), VmError> {
    loop {
        let answer = qmp.execute("query-migrate", Value::Null).await?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let why = answer["error-desc"].as_str().unwrap_or("it does not say why");
                return Err(VmError::NotSaved { why: why.chars().filter(|c| !c.is_control()).take(300).collect() });
            }
            _ => sleep(LOOK_AGAIN).await,
        }
    }
}

/// Waits until QEMU has read the state, and lets the guest go on. Never returns if QEMU cannot read it: it ends then.
pub(crate) async fn go_on(qmp: &Qmp) -> Result<(), VmError> {
    loop {
        match status(qmp).await.as_deref() {
            Ok("inmigrate") => sleep(LOOK_AGAIN).await,
            Ok("running") => return Ok(()),
            Ok(_) => {
                qmp.execute("cont", Value::Null).await?;
            }
            Err(QmpError::Disconnected { .. } | QmpError::Ended) => std::future::pending().await,
            Err(error) => return Err(error.clone().into()),
        }
    }
}

/// Whether the guest's processors are halted, on request.
pub(crate) async fn is_paused(qmp: &Qmp) -> Result<bool, VmError> {
    Ok(matches!(status(qmp).await?.as_str(), "paused" | "postmigrate" | "finish-migrate"))
}

/// Whether a disk could not be written, and the guest is halted for that.
pub(crate) async fn lacks_room(qmp: &Qmp) -> Result<bool, VmError> {
    Ok(status(qmp).await? == "io-error")
}

async fn status(qmp: &Qmp) -> Result<String, QmpError> {
    let answer = qmp.execute("query-status", Value::Null).await?;
    Ok(answer["status"].as_str().unwrap_or_default().to_owned())
}
