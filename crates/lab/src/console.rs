//! A shell on a guest's serial console, driven through `clan vm console`.

use std::{
    io::{Read, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{Interrupt, LabError, process::end};

/// The root shell that waits on the console of a guest.
#[derive(Debug)]
pub struct Console {
    child: Child,
    input: Option<ChildStdin>,
    heard: Arc<Mutex<String>>,
    interrupt: Interrupt,
    commands: u32,
}

impl Console {
    pub(crate) fn attach(mut command: Command, interrupt: Interrupt) -> Result<Self, LabError> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(LabError::io("start `clan vm console`"))?;
        let heard = Arc::new(Mutex::new(String::new()));
        listen(child.stdout.take(), &heard)?;
        listen(child.stderr.take(), &heard)?;
        let input = child.stdin.take();
        Ok(Self { child, input, heard, interrupt, commands: 0 })
    }

    /// Runs a shell command in the guest, and returns what it wrote and its status.
    ///
    /// # Errors
    /// When the console does not answer within `limit`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<(String, i32), LabError> {
        let began = Instant::now();
        let mut sent: Option<Instant> = None;
        self.commands += 1;
        // The echo of the command must not look like its end: the number is put together by the shell.
        let number = self.commands;
        let (begin, finish) = (format!("<begin-{number}>"), format!("<end-{number}-"));
        loop {
            // A shell that was not there yet never saw the command: say it again, unless it has begun.
            let text = self.heard();
            let start = text.rfind(&begin).map(|at| at + begin.len());
            if let Some((output, rest)) = start.and_then(|start| text[start..].split_once(&finish))
                && let Some((status, _)) = rest.split_once('>')
            {
                return Ok((clean(output), status.parse().unwrap_or(-1)));
            }
            if start.is_none() && sent.is_none_or(|at| at.elapsed() > Duration::from_secs(4)) {
                let line = format!(
                    "\r\nprintf '<%s-%s>\\n' begin {number}; {command}; printf '<%s-{number}-%s>\\n' end $?\r\n"
                );
                let input = self.input.as_mut().ok_or_else(|| LabError::Promise("the console was closed".into()))?;
                input
                    .write_all(line.as_bytes())
                    .and_then(|()| input.flush())
                    .map_err(LabError::io("type on the guest's console"))?;
                sent = Some(Instant::now());
            }
            if self.interrupt.is_set() {
                return Err(LabError::Interrupted);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(LabError::Command {
                    command: "clan vm console".into(),
                    status: status.to_string(),
                    output: tail(&text, 4000),
                });
            }
            if began.elapsed() > limit {
                return Err(LabError::TooSlow {
                    command: format!("{command} (on the guest's console)"),
                    limit,
                    output: tail(&text, 4000),
                });
            }
            thread::sleep(Duration::from_millis(30));
        }
    }

    fn heard(&self) -> String {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        drop(self.input.take());
        end(&mut self.child);
    }
}

fn listen(stream: Option<impl Read + Send + 'static>, heard: &Arc<Mutex<String>>) -> Result<(), LabError> {
    let Some(mut stream) = stream else { return Ok(()) };
    let heard = Arc::clone(heard);
    let listen = move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            heard.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    };
    thread::Builder::new()
        .name("lab-console".into())
        .spawn(listen)
        .map(|_| ())
        .map_err(LabError::io("listen to the guest's console"))
}

/// Without carriage returns and terminal sequences.
fn clean(output: &str) -> String {
    let mut text = String::new();
    let mut chars = output.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' if chars.peek() == Some(&'[') => while chars.next().is_some_and(|c| !c.is_ascii_alphabetic()) {},
            '\r' | '\x1b' => {}
            c => text.push(c),
        }
    }
    text.trim().to_owned()
}

pub(crate) fn tail(text: &str, most: usize) -> String {
    let mut start = text.len().saturating_sub(most);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell() -> Console {
        let mut command = Command::new("sh");
        // Echoes what is typed, as a terminal does.
        command.args(["-c", "while IFS= read -r line; do printf '# %s\\r\\n' \"$line\"; eval \"${line%?}\"; done"]);
        Console::attach(command, Interrupt::default()).unwrap()
    }

    #[test]
    fn the_output_of_a_command_is_told_from_its_echo() {
        let mut console = shell();
        assert_eq!(console.run("echo hello", Duration::from_secs(10)).unwrap(), ("hello".to_owned(), 0));
        assert_eq!(console.run("(exit 3)", Duration::from_secs(10)).unwrap(), (String::new(), 3));
    }

    #[test]
    fn a_console_that_closes_is_an_error_and_not_a_wait() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no console here; exit 1"]);
        let mut console = Console::attach(command, Interrupt::default()).unwrap();
        let error = console.run("true", Duration::from_secs(10)).unwrap_err();
        assert!(matches!(error, LabError::Command { .. } | LabError::Io { .. }), "{error}");
    }
}
