//! What a guest writes to its console.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;

/// No more than this is looked through for the last lines.
const WINDOW: u64 = 4 << 20;
const CHUNK: u64 = 64 << 10;
const POLL: Duration = Duration::from_millis(400);

/// The last lines of a file; nothing if it is not there.
pub(crate) fn tail(path: &Path, lines: usize) -> io::Result<String> {
    read_tail(path, lines).map(|(text, _)| String::from_utf8_lossy(&text).into_owned())
}

fn read_tail(path: &Path, lines: usize) -> io::Result<(Vec<u8>, u64)> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        Err(error) => return Err(error),
    };
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(WINDOW)))?;
    let mut bytes = Vec::new();
    file.take(WINDOW).read_to_end(&mut bytes)?;
    let end = size.saturating_sub(WINDOW) + bytes.len() as u64;
    let body = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    let from = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, b)| **b == b'\n')
        .nth(lines.saturating_sub(1))
        .map_or(0, |(at, _)| at + 1);
    if lines == 0 {
        return Ok((Vec::new(), end));
    }
    Ok((bytes.split_off(from), end))
}

/// The last lines, and then what is added, for as long as the reader stays.
pub(crate) fn follow(path: PathBuf, lines: usize) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures_util::stream::try_unfold(None::<u64>, move |at| {
        let path = path.clone();
        async move {
            let Some(mut at) = at else {
                let (text, end) =
                    tokio::task::spawn_blocking(move || read_tail(&path, lines)).await.map_err(io::Error::other)??;
                return Ok(Some((Bytes::from(text), Some(end))));
            };
            loop {
                let reading = path.clone();
                let more =
                    tokio::task::spawn_blocking(move || read_from(&reading, at)).await.map_err(io::Error::other)??;
                match more {
                    More::Bytes(bytes) => {
                        at += bytes.len() as u64;
                        return Ok(Some((Bytes::from(bytes), Some(at))));
                    }
                    // A new run of the VM begins a new file.
                    More::Shorter => at = 0,
                    More::Nothing => tokio::time::sleep(POLL).await,
                }
            }
        }
    })
}

enum More {
    Bytes(Vec<u8>),
    Nothing,
    Shorter,
}

fn read_from(path: &Path, at: u64) -> io::Result<More> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(if at > 0 { More::Shorter } else { More::Nothing });
        }
        Err(error) => return Err(error),
    };
    let size = file.metadata()?.len();
    if size < at {
        return Ok(More::Shorter);
    }
    file.seek(SeekFrom::Start(at))?;
    let mut bytes = Vec::new();
    file.take(CHUNK).read_to_end(&mut bytes)?;
    Ok(if bytes.is_empty() { More::Nothing } else { More::Bytes(bytes) })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use futures_util::StreamExt;

    use super::*;

    #[test]
    fn the_last_lines_are_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(tail(&path, 3).unwrap(), "");
        std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
        assert_eq!(tail(&path, 2).unwrap(), "two\nthree\n");
        assert_eq!(tail(&path, 9).unwrap(), "one\ntwo\nthree\n");
        assert_eq!(tail(&path, 0).unwrap(), "");
        std::fs::write(&path, "one\ntwo").unwrap();
        assert_eq!(tail(&path, 1).unwrap(), "two");
    }

    #[tokio::test]
    async fn what_is_added_follows_and_a_new_run_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "one\ntwo\n").unwrap();
        let mut stream = Box::pin(follow(path.clone(), 1));
        assert_eq!(stream.next().await.unwrap().unwrap(), "two\n");
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"three\n").unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), "three\n");
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), "new\n");
    }
}
