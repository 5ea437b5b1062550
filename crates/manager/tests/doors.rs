//! A whole manager without any VM: its two doors, and what it says when it cannot do as asked.

#![allow(clippy::unwrap_used, reason = "the helpers of these tests fail the test")]

use std::{path::PathBuf, time::Duration};

use clan_api::{
    ClanLogQuery, ClientError, CreateClan, CreateInvite, DeleteQuery, ErrorCode, JoinClan, LogQuery, MakeLogin,
    ManagerClient, PreviewJoin, RevocationKind, Revoke, TaskEvent, TaskState,
};
use clan_manager::{Manager, Options};
use clan_vm::Qemu;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);

struct Running {
    client: ManagerClient,
    address: std::net::SocketAddr,
    data: tempfile::TempDir,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    /// With a program in QEMU's place that would start, and run nothing.
    async fn start() -> Self {
        Self::start_with("/usr/bin/false").await
    }

    async fn start_with(qemu: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        // Programs that are nowhere: nothing is built or started.
        let mut options = Options::new("/nonexistent/clan", "/nonexistent/clan-agent");
        options.listen.set_port(0);
        options.qemu = Qemu::At(PathBuf::from(qemu));
        let manager = Manager::open(data.path(), options).await.unwrap();
        let (address, client) = (manager.address(), ManagerClient::unix(manager.socket()));
        let cancel = CancellationToken::new();
        let stop = cancel.clone();
        let task = tokio::spawn(async move { manager.run(stop).await.unwrap() });
        Self { client, address, data, cancel, task }
    }

    async fn stop(self) -> tempfile::TempDir {
        self.cancel.cancel();
        timeout(LIMIT, self.task).await.expect("the manager stops").unwrap();
        self.data
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.data.path().join("token")).unwrap().trim().to_owned()
    }

    /// What the TCP door answers: the whole text.
    async fn tcp(&self, request: &str) -> String {
        let mut tcp = TcpStream::connect(self.address).await.unwrap();
        tcp.write_all(request.replace('\n', "\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, tcp.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        answer
    }
}

fn problem<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> clan_api::ApiProblem {
    match outcome {
        Err(ClientError::Problem(problem)) => *problem,
        other => panic!("a problem was expected, not {other:?}"),
    }
}

fn preview(link: &str) -> PreviewJoin {
    PreviewJoin { link: link.to_owned(), integrate: None, container: false, memory: None, disk: None, cpus: None }
}

fn create() -> CreateClan {
    CreateClan {
        name: "family".parse().unwrap(),
        person: "anna".parse().unwrap(),
        machine: "laptop".parse().unwrap(),
        memory: None,
        disk: None,
        cpus: None,
        integrate: None,
        control: None,
        container: false,
        passphrase: None,
        recovery: false,
    }
}

#[tokio::test]
async fn the_command_line_needs_no_token() {
    let manager = Running::start().await;
    let status = manager.client.status().await.unwrap();
    assert!(status.clans.is_empty() && status.vms.is_empty());
    assert!(status.host.memory_total.as_bytes() > 0);
    assert!(!status.accelerator.reason.is_empty());
    manager.stop().await;
}

#[tokio::test]
async fn a_browser_needs_a_session_which_a_link_begins_once() {
    let manager = Running::start().await;
    let close = "connection: close\n\n";
    let status = |more: &str| format!("GET /api/v1/status HTTP/1.1\nhost: localhost\n{more}{close}");
    assert!(manager.tcp(&status("")).await.starts_with("HTTP/1.1 401"));
    assert!(
        manager.tcp(&status(&format!("authorization: Bearer {}\n", manager.token()))).await.starts_with("HTTP/1.1 200")
    );
    let rebound = manager.tcp(&format!("GET /api/v1/status HTTP/1.1\nhost: evil.example\n{close}")).await;
    assert!(rebound.starts_with("HTTP/1.1 403"), "{rebound}");

    let login = MakeLogin { open: Some("clan://join/a b".into()) };
    let url = manager.client.login(&login).await.unwrap().url;
    assert!(!url.contains("join"), "what is opened is in no process list: {url}");
    assert!(!url.contains(&manager.token()));
    let path = url.split_once(&format!(":{}", manager.address.port())).unwrap().1.to_owned();
    let visit = format!("GET {path} HTTP/1.1\nhost: localhost\n{close}");
    let answer = manager.tcp(&visit).await;
    assert!(answer.starts_with("HTTP/1.1 303"), "{answer}");
    assert!(answer.contains("location: /#/open/clan%3A%2F%2Fjoin%2Fa%20b\r\n"), "{answer}");
    let cookie =
        answer.lines().find_map(|l| l.strip_prefix("set-cookie: ")).unwrap().split(';').next().unwrap().to_owned();
    assert!(manager.tcp(&visit).await.starts_with("HTTP/1.1 401"), "a login link works once");
    assert!(manager.tcp(&status(&format!("cookie: {cookie}\n"))).await.starts_with("HTTP/1.1 200"));

    let page = manager.tcp(&format!("GET / HTTP/1.1\nhost: localhost\n{close}")).await;
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("content-security-policy: default-src 'self'"), "{page}");
    let logins = format!(
        "POST /api/v1/logins HTTP/1.1\nhost: localhost\nauthorization: Bearer {}\ncontent-length: 0\n{close}",
        manager.token()
    );
    assert!(manager.tcp(&logins).await.starts_with("HTTP/1.1 404"), "links are made over the Unix socket only");
    manager.stop().await;
}

#[tokio::test]
async fn a_service_without_a_session_is_locked() {
    let manager = Running::start().await;
    let answer = manager.tcp("GET / HTTP/1.1\nhost: web.family.localhost\nconnection: close\n\n").await;
    assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("clan service open web"), "{answer}");
    manager.stop().await;
}

#[tokio::test]
async fn what_cannot_be_done_is_said_with_a_reason() {
    let manager = Running::start().await;
    let client = &manager.client;
    assert_eq!(problem(client.preview_join(&preview("https://example.org")).await).code, ErrorCode::LinkInvalid);
    assert_eq!(problem(client.preview_join(&preview("clan://join/AAAA")).await).code, ErrorCode::LinkInvalid);
    assert_eq!(problem(client.invite("family", &CreateInvite::default()).await).code, ErrorCode::NotFound);
    assert_eq!(problem(client.vm_logs("family", LogQuery::default()).await).code, ErrorCode::NotFound);
    assert_eq!(problem(client.vm_console("family").await).code, ErrorCode::NotFound);
    assert_eq!(problem(client.delete_vm("family", DeleteQuery { force: true }).await).code, ErrorCode::NotFound);
    let mut greedy = create();
    greedy.memory = Some(clan_types::ByteSize::from_mib(1 << 30));
    assert_eq!(problem(client.create_clan(&greedy).await).code, ErrorCode::TooSmall);
    manager.stop().await;
}

#[tokio::test]
async fn a_link_to_a_machine_that_is_off_says_what_was_tried() {
    let manager = Running::start().await;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let link = clan_types::InviteLink {
        purpose: clan_types::Purpose::Join,
        clan: clan_types::ClanId::from_bytes([1; 32]),
        secret: clan_types::InviteSecret::from_bytes([2; 32]),
        peers: vec![clan_types::PeerAddr {
            machine: clan_types::MachineId::from_bytes(
                ed25519_dalek::SigningKey::from_bytes(&[3; 32]).verifying_key().to_bytes(),
            ),
            addrs: vec![silent.local_addr().unwrap()],
        }],
        relays: Vec::new(),
    };
    let join = JoinClan {
        link: link.to_string(),
        person: "bob".parse().unwrap(),
        machine: "desk".parse().unwrap(),
        memory: None,
        disk: None,
        cpus: None,
        integrate: None,
        control: None,
        container: false,
        agreed: None,
        passphrase: None,
    };
    let problem = problem(timeout(LIMIT, manager.client.join(&join)).await.expect("an answer in time"));
    assert_eq!(problem.code, ErrorCode::Unreachable);
    assert!(problem.why.as_deref().unwrap().contains(&silent.local_addr().unwrap().to_string()), "{problem:?}");
    assert!(manager.client.status().await.unwrap().clans.is_empty(), "nothing was put on disk");
    manager.stop().await;
}

#[tokio::test]
async fn a_missing_qemu_is_said_before_anything_is_begun() {
    let manager = Running::start_with("/nonexistent/qemu").await;
    let problem = problem(manager.client.create_clan(&create()).await);
    assert_eq!(problem.code, ErrorCode::MissingProgram);
    assert!(manager.client.tasks().await.unwrap().is_empty(), "no task was begun");
    let data = manager.stop().await;
    assert_eq!(std::fs::read_dir(data.path().join("clans")).unwrap().count(), 0);
}

#[tokio::test]
async fn founding_that_fails_says_why_and_leaves_nothing() {
    let manager = Running::start().await;
    let task = manager.client.create_clan(&create()).await.unwrap().task;
    let mut events = manager.client.task_events(task.id).await.unwrap();
    let mut last = None;
    while let Some(event) = timeout(LIMIT, events.next()).await.expect("an event in time") {
        if let TaskEvent::Update { task } = event.unwrap() {
            last = Some(task);
        }
    }
    let last = last.expect("the first event is an update");
    assert_eq!(last.state, TaskState::Failed);
    assert!(!last.problem.unwrap().message.is_empty());
    assert!(manager.client.status().await.unwrap().clans.is_empty());
    let data = manager.stop().await;
    assert_eq!(std::fs::read_dir(data.path().join("clans")).unwrap().count(), 0);
    assert!(!data.path().join("run/manager.sock").exists());
}

#[tokio::test]
async fn authority_over_a_clan_that_is_not_here_is_told_as_such() {
    let manager = Running::start().await;
    let request = Revoke { kind: RevocationKind::Person, subject: "ben".into(), dry_run: true };
    let told = [
        problem(manager.client.revoke("nowhere", &request).await),
        problem(manager.client.invites("nowhere").await),
        problem(manager.client.clan_log("nowhere", ClanLogQuery::default()).await),
    ];
    for problem in told {
        assert_eq!(problem.code, ErrorCode::NotFound);
        assert!(problem.message.contains("nowhere"), "{problem:?}");
    }
    manager.stop().await;
}

#[tokio::test]
async fn a_computer_without_a_controller_cannot_be_integrated_and_nothing_is_begun() {
    let manager = Running::start().await;
    let mut integrated = create();
    integrated.integrate = Some("/nonexistent/clan.sock".into());
    let down = problem(manager.client.create_clan(&integrated).await);
    assert_eq!(down.code, ErrorCode::ControllerDown);
    assert!(down.why.as_deref().unwrap().contains("/nonexistent/clan.sock"), "{down:?}");
    integrated.memory = Some(clan_types::ByteSize::from_mib(512));
    assert_eq!(problem(manager.client.create_clan(&integrated).await).code, ErrorCode::BadRequest);
    assert!(manager.client.tasks().await.unwrap().is_empty(), "no task was begun");
    manager.stop().await;
}
