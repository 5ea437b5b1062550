//! Listening on the lab's internet, as anybody between two people could.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal};

use crate::{LabError, Record, net::BRIDGE, process::MARK};

/// A running capture of everything that crosses the bridge.
#[derive(Debug)]
pub struct Capture {
    file: PathBuf,
    tcpdump: Child,
}

impl Capture {
    /// Starts to capture into `file` (pcap), and returns once packets are seen.
    ///
    /// # Errors
    /// When tcpdump is missing or may not capture.
    pub(crate) fn start(record: &Record, file: &Path) -> Result<Self, LabError> {
        let entrance = record.internet().open()?;
        let mut command = Command::new("tcpdump");
        // -Z root: it would otherwise hand its file to an account of its own that may not write here.
        command.args(["-Z", "root", "-U", "-n", "-s", "0", "-i", BRIDGE, "-w"]).arg(file);
        command.env(MARK, &record.prefix).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: between fork and exec only two system calls are made.
        unsafe {
            command.pre_exec(move || match (libc::setsid(), libc::setns(entrance.as_raw_fd(), libc::CLONE_NEWNET)) {
                (-1, _) | (_, -1) => Err(io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let mut tcpdump = command.spawn().map_err(LabError::io("start tcpdump (package tcpdump)"))?;
        let mut said = String::new();
        if let Some(stderr) = tcpdump.stderr.take() {
            let mut reader = BufReader::new(stderr);
            while !said.contains("listening on") {
                if reader.read_line(&mut said).map_err(LabError::io("hear tcpdump"))? == 0 {
                    let status = tcpdump.wait().map_err(LabError::io("wait for tcpdump"))?.to_string();
                    return Err(LabError::Command { command: "tcpdump".into(), status, output: said });
                }
            }
        }
        Ok(Self { file: file.to_owned(), tcpdump })
    }

    /// Ends the capture and returns all its bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn finish(mut self) -> Result<Vec<u8>, LabError> {
        self.stop();
        let mut bytes = Vec::new();
        let complain = || LabError::io(format!("read {}", self.file.display()));
        File::open(&self.file).map_err(complain())?.read_to_end(&mut bytes).map_err(complain())?;
        Ok(bytes)
    }

    fn stop(&mut self) {
        if let Some(pid) = i32::try_from(self.tcpdump.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::INT);
        }
        let _ = self.tcpdump.wait();
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if matches!(self.tcpdump.try_wait(), Ok(None)) {
            self.stop();
        }
    }
}
