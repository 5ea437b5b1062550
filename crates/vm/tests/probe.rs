//! The accelerator of the computer that runs the tests.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use clan_vm::{AccelKind, probe};

#[tokio::test]
async fn the_probe_says_why_and_remembers_what_a_guest_run_told() {
    let cache = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let first = probe::accelerator(cache.path()).await;
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    assert!(first.reason.ends_with('.'), "{}", first.reason);
    println!("{first:?} after {:?}", start.elapsed());
    let cached = cache.path().join("accelerator.json").exists();
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    assert_eq!(cached, device.is_ok(), "only the verdict of a guest run is kept");
    assert_eq!(probe::accelerator(cache.path()).await, first);
    if let Err(error) = device {
        let expected = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "permission",
            std::io::ErrorKind::NotFound => "has no KVM",
            _ => "cannot be used",
        };
        assert!(first.kind == AccelKind::Tcg && first.reason.contains(expected), "{}", first.reason);
    }
}

#[tokio::test]
async fn distrust_lasts() {
    let cache = tempfile::tempdir().unwrap();
    let verdict = probe::distrust(cache.path(), "The guest did not answer.").await;
    assert_eq!(verdict.kind, AccelKind::Tcg);
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok() {
        assert_eq!(probe::accelerator(cache.path()).await, verdict);
    }
}
