//! Secrets stay where they belong.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use clan_lab::{Lab, LabError, matching};

use crate::{Checked, Checks};

/// Looks at the process list again and again, as any user of the computer may.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    thread: thread::JoinHandle<()>,
}

impl Watch {
    pub(crate) fn begin() -> Self {
        let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (end, list) = (Arc::clone(&over), Arc::clone(&seen));
        let look = move || {
            while !end.load(Ordering::SeqCst) {
                matching(|proc| {
                    if let (Ok(line), Ok(mut list)) = (fs::read(proc.join("cmdline")), list.lock())
                        && !list.contains(&line)
                    {
                        list.push(line);
                    }
                    false
                });
                thread::sleep(Duration::from_millis(150));
            }
        };
        Self { over, seen, thread: thread::spawn(look) }
    }

    fn finish(self) -> Vec<Vec<u8>> {
        self.over.store(true, Ordering::SeqCst);
        let _ = self.thread.join();
        self.seen.lock().map(|seen| seen.clone()).unwrap_or_default()
    }
}

/// A secret, and what to call it.
struct Secret {
    name: String,
    bytes: Vec<u8>,
}

pub(crate) fn check(checks: &mut Checks, lab: &mut Lab, link: &str, watch: Watch) {
    let lines = watch.finish();
    let secrets = secrets(lab, link);
    checks.that("the secrets of both people were found, to look for", || {
        let found = |name: &str| secrets.iter().filter(|secret| secret.name.ends_with(name)).count();
        if found("token") >= 2 && found("person.key") >= 2 {
            Ok(())
        } else {
            Err(LabError::Promise(format!("only {:?}", names(&secrets))))
        }
    });
    checks.that("no secret is in the process list", || {
        absent(&secrets, lines.iter().map(|line| ("a command line".into(), line.clone())))
    });
    let logs = files(&lab.record().logs())
        .into_iter()
        .chain(lab.people().flat_map(|p| files(&p.data())).filter(|f| is_log(f)));
    let logs: Vec<_> = logs.filter_map(|path| Some((path.display().to_string(), fs::read(&path).ok()?))).collect();
    checks.that("no secret is in a log", || absent(&secrets, logs.into_iter()));
    for person in lab.people() {
        let (name, data) = (person.name().to_owned(), person.data());
        checks.that(&format!("no file of {name} that others can read is secret"), || private(&data));
    }
    let vms: Vec<_> = lab.people().map(|person| person.data().display().to_string()).collect();
    checks.that("nothing of the product runs as root", || {
        let roots = matching(|proc| {
            let arguments = fs::read(proc.join("cmdline"))
                .map(|line| String::from_utf8_lossy(&line).into_owned())
                .unwrap_or_default();
            vms.iter().any(|data| arguments.contains(data)) && fs::metadata(proc).is_ok_and(|meta| meta.uid() == 0)
        });
        if roots.is_empty() { Ok(()) } else { Err(LabError::Promise(format!("processes {roots:?} do"))) }
    });
}

fn secrets(lab: &mut Lab, link: &str) -> Vec<Secret> {
    let payload = link.rsplit('/').next().unwrap_or(link);
    let mut secrets = vec![Secret { name: "invitation link".into(), bytes: payload.as_bytes().to_vec() }];
    for person in lab.people() {
        let data = person.data();
        let keys = files(&data)
            .into_iter()
            .filter(|path| path.extension().is_some_and(|e| e == "key") || path.ends_with("token"));
        for path in keys {
            let bytes = fs::read(&path).unwrap_or_default().trim_ascii().to_vec();
            if bytes.len() >= 16 {
                secrets.push(Secret { name: path.display().to_string(), bytes });
            }
        }
    }
    secrets
}

fn names(secrets: &[Secret]) -> Vec<&str> {
    secrets.iter().map(|secret| secret.name.as_str()).collect()
}

fn absent(secrets: &[Secret], places: impl Iterator<Item = (String, Vec<u8>)>) -> Checked {
    for (place, content) in places {
        let found =
            secrets.iter().find(|secret| content.windows(secret.bytes.len()).any(|window| window == secret.bytes));
        if let Some(secret) = found {
            return Err(LabError::Promise(format!("{place} holds {}", secret.name)));
        }
    }
    Ok(())
}

fn is_log(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "log")
}

/// INVARIANT: of a data folder, others reach at most images and caches, which hold nothing of a clan.
fn private(data: &Path) -> Checked {
    let mut open = vec![data.to_owned()];
    while let Some(folder) = open.pop() {
        let others_pass = fs::metadata(&folder).is_ok_and(|meta| meta.mode() & 0o011 != 0);
        if !others_pass {
            continue;
        }
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if folder == *data && ["images", "cache"].iter().any(|name| path.ends_with(name)) {
                continue;
            }
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                open.push(path);
            } else if meta.mode() & 0o066 != 0 && !meta.is_symlink() {
                return Err(LabError::Promise(format!("{} has mode {:o}", path.display(), meta.mode() & 0o7777)));
            }
        }
    }
    Ok(())
}

/// Every plain file below a folder, images and caches left out.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() && !["images", "cache"].iter().any(|name| path.ends_with(name)) => {
                found.extend(files(&path))
            }
            Ok(meta) if meta.is_file() => found.push(path),
            _ => {}
        }
    }
    found
}
