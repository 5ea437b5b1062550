//! Network namespaces for tests. Each belongs to one thread and has no name, so the kernel removes it, and everything
//! in it, when the thread ends, also after a panic.

use std::{future::Future, os::fd::AsRawFd, process::Command, sync::mpsc, thread};

use futures_util::TryStreamExt;
use rtnetlink::{LinkUnspec, LinkVeth};
use tokio::{runtime::Handle, sync::oneshot};

const INSIDE: &str = "CLAN_TEST_IN_NAMESPACE";

/// Runs the rest of the test `name` where it may make namespaces: right here for root, else in a copy of this process
/// that is root in a user namespace. Returns false if the copy has done the work.
pub(crate) fn enter(name: &str) -> bool {
    if rustix::process::geteuid().is_root() || std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let copy = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .status();
    match copy {
        Ok(status) => assert!(
            status.success(),
            "the test failed in its user namespace, or user namespaces are not allowed here: run it as root"
        ),
        Err(error) => panic!("this test needs root, or user namespaces and the `unshare` program: {error}"),
    }
    false
}

/// Makes /run writable where this process is root in a user namespace only: there it is a folder of its own.
#[allow(dead_code)] // Not every test needs it.
pub(crate) fn own_run() {
    if std::env::var_os(INSIDE).is_some() {
        let mounted = rustix::mount::mount("none", "/run", "tmpfs", rustix::mount::MountFlags::empty(), None);
        mounted.expect("a user namespace may mount a tmpfs");
    }
}

/// A namespace with a single-threaded runtime inside it.
pub(crate) struct Namespace {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
    /// Keeps the namespace reachable for [`join`].
    net: std::fs::File,
}

impl Namespace {
    pub(crate) fn new(name: &str) -> Self {
        let (ready, started) = mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // SAFETY: only this thread's network namespace changes; nothing else of the process is unshared.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                    .expect("a network namespace needs root or a user namespace");
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let net = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
                ready.send((runtime.handle().clone(), net)).unwrap();
                let _ = runtime.block_on(stopped);
            })
            .unwrap();
        let (handle, net) = started.recv().expect("the namespace is ready");
        Self { handle, stop: Some(stop), thread: Some(thread), net }
    }

    /// Runs a future inside and waits for it.
    pub(crate) fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        self.handle.spawn(async move {
            let _ = sender.send(future.await);
        });
        receiver.recv().expect("the task in the namespace did not panic")
    }

    /// Starts a future inside.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(future);
    }

    /// Runs a program inside; it must succeed.
    pub(crate) fn command(&self, line: &'static str) {
        self.run(async move {
            let mut words = line.split_whitespace();
            let output =
                Command::new(words.next().unwrap()).args(words).output().unwrap_or_else(|e| panic!("`{line}`: {e}"));
            assert!(output.status.success(), "`{line}`: {}", String::from_utf8_lossy(&output.stderr));
        });
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Connects two namespaces by a virtual cable whose ends are both named `wire0`, with these addresses.
pub(crate) fn join(a: &Namespace, b: &Namespace, addresses: [&'static [&'static str]; 2]) {
    let other = b.net.as_raw_fd();
    a.run(async move {
        let kernel = kernel();
        kernel.link().add(LinkVeth::new("wire0", "wire1").build()).execute().await.unwrap();
        let end = kernel.link().get().match_name("wire1".to_owned()).execute().try_next().await.unwrap().unwrap();
        kernel
            .link()
            .set(LinkUnspec::new_with_index(end.header.index).name("wire0").setns_by_fd(other).build())
            .execute()
            .await
            .unwrap();
    });
    for (namespace, addresses) in [a, b].into_iter().zip(addresses) {
        namespace.run(async move {
            let kernel = kernel();
            let wire = kernel.link().get().match_name("wire0".to_owned()).execute().try_next().await.unwrap().unwrap();
            for address in addresses {
                let (ip, prefix) = address.split_once('/').unwrap();
                kernel
                    .address()
                    .add(wire.header.index, ip.parse().unwrap(), prefix.parse().unwrap())
                    .execute()
                    .await
                    .unwrap();
            }
            for name in ["lo", "wire0"] {
                kernel.link().set(LinkUnspec::new_with_name(name).up().build()).execute().await.unwrap();
            }
        });
    }
}

fn kernel() -> rtnetlink::Handle {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    tokio::spawn(connection);
    handle
}
