//! Lines in the kernel's log, which also reach the console.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    sync::OnceLock,
};

static KMSG: OnceLock<Option<File>> = OnceLock::new();

/// Opens the log; before that, lines go to standard error. The open file outlives the move of `/dev`.
pub(crate) fn open() {
    KMSG.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok());
}

/// For whoever looks closely.
pub(crate) fn info(text: &str) {
    write(6, text);
}

/// Something does not work.
pub(crate) fn error(text: &str) {
    write(3, text);
}

fn write(level: u8, text: &str) {
    let line = format!("<{level}>clan-agent: {}\n", text.replace('\n', " "));
    // INVARIANT: one write is one record. There is nobody to tell if it fails.
    let _ = match KMSG.get().and_then(Option::as_ref) {
        Some(mut kmsg) => kmsg.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.get(3..).unwrap_or_default().as_bytes()),
    };
}
