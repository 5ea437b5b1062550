//! A program that a test runs beside what it tests.

use std::process::Child;

/// It has ended, at the latest, when this is dropped.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// Ends it now.
    pub(crate) fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}
