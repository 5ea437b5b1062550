//! Machines that are steered by others, over real connections.

use std::time::Duration;

use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_types::Role;
use clan_wire::helm::{INPUT_WINDOW, Input, MAX_FRAME, OpenTerminal, Output, Proof, Size};
use ed25519_dalek::SigningKey;
use futures_util::FutureExt as _;
use iroh::endpoint::{RecvStream, SendStream};
use tokio::signal::unix::{SignalKind, signal};

use super::*;
use crate::tests::{Machine, add, endpoint, founded, joined, key, person, tomorrow};

mod order;

const LIMIT: Duration = Duration::from_secs(20);
/// Whoever is put out steers nothing any more within this time.
const CUT_OFF: Duration = Duration::from_secs(3);
/// The founder's key, and that of a second person: see [`founded`] and [`joined`].
const FOUNDER: u8 = 1;
const BOB: u8 = 4;
/// Bytes typed at once.
const CHUNK: usize = 32 << 10;

/// A clan whose founder (an owner) and bob (a member) each have a machine; bob's is steered as the mode says.
async fn clan(mode: ControlMode) -> (Machine, Machine) {
    let (founder, clan) = founded(3, tomorrow()).await;
    let bobs = joined(&founder, &clan, BOB, key(5), "bob").await;
    let id = bobs.id();
    founder.until("bob's machine is known", move |v| v.state.machines.contains_key(&id)).await;
    bobs.helm.set_mode(mode, &bobs.core).unwrap();
    (founder, bobs)
}

struct Conversation {
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
}

/// Calls with a person's key from a machine's endpoint.
async fn call(from: &Machine, to: &Machine, key: &SigningKey, request: Request) -> (Conversation, Answer) {
    let addr = net::endpoint_addr(&to.addr(), &[]).unwrap();
    let connection = from.endpoint.connect(addr, ALPN_HELM).await.unwrap();
    let (mut send, mut recv) = connection.accept_bi().await.unwrap();
    let greeting = recv_message::<Greeting, _>(&mut recv, MAX_CALL).await.unwrap();
    let Greeting::Challenge(challenge) = greeting else { panic!("{greeting:?}") };
    let ends = Ends { clan: to.core.view().clan, from: from.id(), to: to.id(), challenge };
    let call = Call { proof: Some(Proof::new(key, &ends, &request)), request };
    send_message(&mut send, &call, MAX_CALL).await.unwrap();
    let answer = timeout(LIMIT, recv_message::<Answer, _>(&mut recv, MAX_ANSWER)).await.unwrap().unwrap();
    (Conversation { connection, send, recv }, answer)
}

async fn ask(from: &Machine, to: &Machine, seed: u8, request: Request) -> Answer {
    call(from, to, &key(seed), request).await.1
}

fn set(value: &str) -> Request {
    Request::Set { name: "announce".into(), value: value.into(), dry_run: false }
}

fn terminal(command: &[&str], screen: bool) -> Request {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    let screen = screen.then(|| (Size { rows: 24, columns: 80 }, "xterm".to_owned()));
    Request::Terminal(OpenTerminal { command, screen })
}

#[tokio::test]
async fn each_mode_lets_steer_whom_it_says() {
    let (founder, bobs) = clan(ControlMode::Local).await;
    let view = || bobs.core.view();
    for (mode, admin, here) in [
        (ControlMode::Local, Some(Refusal::Local), None),
        (ControlMode::Shared, None, None),
        (ControlMode::Remote, None, Some(Refusal::Remote)),
    ] {
        bobs.helm.set_mode(mode, &bobs.core).unwrap();
        for request in [set("off"), set("on"), terminal(&["true"], false), Request::Report, Request::Journal] {
            let answer = ask(&founder, &bobs, FOUNDER, request.clone()).await;
            match &admin {
                Some(refusal) => assert_eq!(answer, Answer::Refused(refusal.clone()), "{mode}: {request:?}"),
                None => assert!(!matches!(answer, Answer::Refused(_) | Answer::Failed(_)), "{mode}: {answer:?}"),
            }
            let looks = matches!(request, Request::Report | Request::Journal);
            let own = bobs.helm.may(&Caller::Here, &view(), &request);
            assert_eq!(own.err(), here.clone().filter(|_| !looks), "{mode}: {request:?}");
        }
        // A member learns nothing, not even the mode.
        let answer = ask(&bobs, &founder, BOB, Request::Report).await;
        assert_eq!(answer, Answer::Refused(Refusal::NotAdmin));
    }
}

#[tokio::test]
async fn a_stranger_reaches_nothing_and_nobody_speaks_in_anothers_name() {
    let (founder, bobs) = clan(ControlMode::Shared).await;
    founder.helm.set_mode(ControlMode::Shared, &founder.core).unwrap();
    let stranger = endpoint(&key(40)).await;
    let connection = stranger.connect(net::endpoint_addr(&bobs.addr(), &[]).unwrap(), ALPN_HELM).await.unwrap();
    assert!(timeout(LIMIT, connection.accept_bi()).await.unwrap().is_err(), "it is closed before a word is said");
    // Bob's machine cannot call as its founder, nor with a key that it found somewhere, nor the founder from bob's.
    for seed in [40, BOB + 50, FOUNDER] {
        let answer = ask(&bobs, &founder, seed, Request::Report).await;
        assert_eq!(answer, Answer::Refused(Refusal::Stranger), "{seed}");
    }
}

#[tokio::test]
async fn what_one_side_changes_the_other_takes_back() {
    let (founder, bobs) = clan(ControlMode::Shared).await;
    let changed = ask(&founder, &bobs, FOUNDER, set("off")).await;
    let Answer::Done(entry) = changed else { panic!("{changed:?}") };
    let by = entry.by;
    assert_eq!((by.name.unwrap().as_str(), by.here), ("ada", false));
    assert!(!bobs.helm.announces());
    // The base OS user, by the control port.
    let revert = Request::Revert { number: entry.number, dry_run: false };
    let taken = bobs.helm.change(&Caller::Here, &revert, false, &bobs.core, |kept, by| {
        kept.revert(entry.number, &Possible::default(), by, now())
    });
    assert!(matches!(taken, Ok(Answer::Done(JournalEntry { by: Actor { here: true, .. }, .. }))));
    assert!(bobs.helm.announces());
    let again = ask(&founder, &bobs, FOUNDER, revert).await;
    assert_eq!(again, Answer::Refused(Refusal::Stale { number: entry.number, now: "on".into() }));
    let back = ask(&founder, &bobs, FOUNDER, Request::Revert { number: entry.number + 1, dry_run: false }).await;
    assert!(matches!(back, Answer::Done(_)), "{back:?}");
    assert!(!bobs.helm.announces());
    // On disk, with everything that was done.
    let Answer::Journal(journal) = ask(&founder, &bobs, FOUNDER, Request::Journal).await else { panic!("no journal") };
    let kept = Helm::load(bobs.dir.path(), &bobs.helm.host, Possible::default(), bobs.id()).unwrap();
    assert_eq!(kept.kept.borrow().journal(), journal);
    assert!(!kept.announces() && kept.mode() == ControlMode::Shared);
    // Looking whether it would work changes nothing.
    let dry = Request::Set { name: "announce".into(), value: "on".into(), dry_run: true };
    assert!(matches!(ask(&founder, &bobs, FOUNDER, dry).await, Answer::Done(_)));
    assert!(!bobs.helm.announces());
    assert_eq!(bobs.helm.kept.borrow().journal(), journal);
}

#[tokio::test]
async fn a_computer_of_its_own_standing_is_not_switched_off_by_others() {
    let (founder, bobs) = clan(ControlMode::Remote).await;
    for request in [Request::Restart, Request::Set { name: "memory".into(), value: "1G".into(), dry_run: false }] {
        let answer = ask(&founder, &bobs, FOUNDER, request).await;
        assert!(matches!(answer, Answer::Refused(Refusal::UserOnly { .. })), "{answer:?}");
    }
}

#[tokio::test]
async fn whoever_starts_a_container_anew_has_the_answer_before_it_ends() {
    let (founder, bobs) = clan(ControlMode::Shared).await;
    let mut asked = signal(SignalKind::terminate()).unwrap();
    let container = Host::Container("/nowhere".into());
    let helm = Helm::load(bobs.dir.path(), &container, Possible::default(), bobs.id()).unwrap();
    let (mut caller, machine) = tokio::io::duplex(MAX_ANSWER);
    let (mut recv, mut send) = tokio::io::split(machine);
    let then = helm.converse(&Caller::Here, Request::Restart, &mut send, &mut recv, &bobs.core).await;
    let answer = recv_message::<Answer, _>(&mut caller, MAX_ANSWER).await.unwrap();
    assert!(matches!(answer, Answer::Done(JournalEntry { what: Deed::Restart, .. })), "{answer:?}");
    assert_eq!(then, Then::End);
    assert!(asked.recv().now_or_never().is_none(), "it ended first");
    then.go();
    timeout(LIMIT, asked.recv()).await.expect("it ends");
    drop(founder);
}

impl Conversation {
    async fn next(&mut self) -> Output {
        timeout(LIMIT, recv_message::<Output, _>(&mut self.recv, MAX_FRAME)).await.unwrap().unwrap()
    }

    async fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.next().await {
                Output::Data(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                Output::Taken(_) => {}
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        seen
    }

    async fn type_in(&mut self, input: &Input) {
        send_message(&mut self.send, input, MAX_FRAME).await.unwrap();
    }
}

#[tokio::test]
async fn an_admin_has_a_terminal_with_its_size_ctrl_c_and_exit_status() {
    let (founder, bobs) = clan(ControlMode::Shared).await;
    let (mut shell, answer) = call(&founder, &bobs, &key(FOUNDER), terminal(&["sh"], true)).await;
    assert_eq!(answer, Answer::Terminal);
    shell.type_in(&Input::Data(b"stty size\n".to_vec())).await;
    shell.until("24 80").await;
    shell.type_in(&Input::Resize(Size { rows: 50, columns: 100 })).await;
    shell.type_in(&Input::Data(b"stty size; sh -c 'echo $((40 + 2)); exec sleep 1000'\n".to_vec())).await;
    let seen = shell.until("42").await;
    assert!(seen.contains("50 100"), "{seen}");
    shell.type_in(&Input::Data(vec![3])).await;
    shell.type_in(&Input::Data(b"exit 7\n".to_vec())).await;
    loop {
        match shell.next().await {
            Output::Data(_) | Output::Taken(_) => {}
            Output::Exit(status) => break assert_eq!(status, 7),
            other => panic!("{other:?}"),
        }
    }
    shell.connection.close(0u32.into(), b"done");
    let Answer::Journal(journal) = ask(&founder, &bobs, FOUNDER, Request::Journal).await else { panic!("no journal") };
    let last = &journal.last().unwrap();
    assert!(matches!(last.what, Deed::Terminal { ended: Some(_) }), "{last:?}");
    let kept = std::fs::read_to_string(&bobs.helm.path).unwrap();
    assert!(!kept.contains("stty"), "what was typed is kept");
}

/// Everybody's ledger, with what the founder decides added at their machine.
async fn decide(founder: &Machine, body: impl FnOnce(&Ledger) -> Vec<Body>) {
    let mut ledger = Ledger::open(founder.core.view().clan);
    ledger.insert_all(founder.core.entries().await.iter().map(|entry| Entry::decode(entry).unwrap()));
    for body in body(&ledger) {
        add(&mut ledger, &key(FOUNDER), body);
    }
    let author = AuthorId::of(&key(FOUNDER));
    let mine = ledger.entries().filter(|e| e.author() == author).map(Entry::encode).collect();
    founder.core.insert(mine).await.unwrap();
}

#[tokio::test]
async fn a_terminal_dies_with_the_right_to_it() {
    let (founder, clan_id) = founded(3, tomorrow()).await;
    let bobs = joined(&founder, &clan_id, BOB, key(5), "bob").await;
    let eves = joined(&founder, &clan_id, 6, key(7), "eve").await;
    bobs.helm.set_mode(ControlMode::Shared, &bobs.core).unwrap();
    let sleeper = |n: u8| terminal(&["sh", "-c", &format!("echo ready; exec sleep 100{n}")], true);
    for (n, how) in ["demoted", "mode", "revoked"].into_iter().enumerate() {
        let eve = person(6);
        decide(&founder, |ledger| vec![ledger.role_change(&eve, Role::Admin)]).await;
        bobs.until("eve is admin", move |v| v.state.role_of(&eve) == Some(Role::Admin)).await;
        let (mut shell, answer) = call(&eves, &bobs, &key(6), sleeper(n as u8)).await;
        assert_eq!(answer, Answer::Terminal, "{how}");
        shell.until("ready").await;
        let expected = match how {
            "demoted" => {
                decide(&founder, |ledger| vec![ledger.role_change(&eve, Role::Member)]).await;
                Refusal::NotAdmin
            }
            "mode" => {
                bobs.helm.set_mode(ControlMode::Local, &bobs.core).unwrap();
                Refusal::Local
            }
            _ => {
                decide(&founder, |ledger| ledger.revocation_of_person(&eve)).await;
                Refusal::Stranger
            }
        };
        let cut = timeout(CUT_OFF, shell.next()).await.expect("in time");
        assert_eq!(cut, Output::Cut(expected), "{how}");
        let journal = bobs.helm.kept.borrow().journal().to_vec();
        assert!(journal.iter().any(|e| matches!(e.what, Deed::Terminal { .. })));
        bobs.helm.set_mode(ControlMode::Shared, &bobs.core).unwrap();
    }
}

async fn all_end(machine: &Machine) {
    let all = u32::try_from(MAX_TERMINALS).unwrap();
    let room = timeout(LIMIT, machine.helm.terminals.acquire_many(all)).await;
    assert!(room.is_ok(), "a terminal does not end");
}

#[tokio::test]
async fn terminals_are_counted_and_a_hang_up_ends_one() {
    let (founder, bobs) = clan(ControlMode::Remote).await;
    let mut open = Vec::new();
    for _ in 0..MAX_TERMINALS {
        let (shell, answer) = call(&founder, &bobs, &key(FOUNDER), terminal(&["sleep", "1000"], false)).await;
        assert_eq!(answer, Answer::Terminal);
        open.push(shell);
    }
    let full = ask(&founder, &bobs, FOUNDER, terminal(&["true"], false)).await;
    assert_eq!(full, Answer::Refused(Refusal::Busy));
    for shell in open {
        shell.connection.close(0u32.into(), b"done");
    }
    all_end(&bobs).await;
}

#[tokio::test]
async fn a_hang_up_ends_a_program_that_reads_nothing_of_what_was_typed() {
    let (founder, bobs) = clan(ControlMode::Shared).await;
    let (mut shell, answer) = call(&founder, &bobs, &key(FOUNDER), terminal(&["sleep", "1000"], false)).await;
    assert_eq!(answer, Answer::Terminal);
    // More than a pipe has room for.
    for _ in 0..INPUT_WINDOW / CHUNK {
        shell.type_in(&Input::Data(vec![b'x'; CHUNK])).await;
    }
    assert!(matches!(shell.next().await, Output::Taken(_)));
    shell.connection.close(0u32.into(), b"done");
    all_end(&bobs).await;
}

#[tokio::test]
async fn whatever_is_typed_ahead_of_a_program_stays_within_the_window() {
    let (founder, bobs) = clan(ControlMode::Shared).await;
    let (mut shell, answer) = call(&founder, &bobs, &key(FOUNDER), terminal(&["wc", "-c"], false)).await;
    assert_eq!(answer, Answer::Terminal);
    // Whoever waits for room gets anything through.
    let (mut room, mut rest) = (INPUT_WINDOW, 3 * INPUT_WINDOW);
    while rest > 0 {
        if room < CHUNK {
            let Output::Taken(count) = shell.next().await else { panic!("no room is made") };
            room += usize::try_from(count).unwrap();
            continue;
        }
        shell.type_in(&Input::Data(vec![b'x'; CHUNK])).await;
        (room, rest) = (room - CHUNK, rest - CHUNK);
    }
    shell.type_in(&Input::End).await;
    let said = loop {
        match shell.next().await {
            Output::Taken(_) => {}
            Output::Data(bytes) => break String::from_utf8(bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(said.trim(), (3 * INPUT_WINDOW).to_string());
    // Whoever does not is cut.
    let (mut shell, _) = call(&founder, &bobs, &key(FOUNDER), terminal(&["sleep", "1000"], false)).await;
    // What a pipe takes is taken.
    for _ in 0..2 * INPUT_WINDOW / CHUNK {
        let frame = Input::Data(vec![b'x'; CHUNK]);
        if send_message(&mut shell.send, &frame, MAX_FRAME).await.is_err() {
            break;
        }
    }
    let last = loop {
        match shell.next().await {
            Output::Taken(_) => {}
            other => break other,
        }
    };
    assert_eq!(last, Output::Cut(Refusal::Malformed));
}

#[test]
fn a_damaged_file_leaves_the_machine_to_its_user() {
    let dir = tempfile::tempdir().unwrap();
    begin(dir.path(), ControlMode::Remote).unwrap();
    let load = || Helm::load(dir.path(), &Host::Guest, Possible::default(), MachineId::from_bytes([1; 32])).unwrap();
    assert_eq!(load().mode(), ControlMode::Remote);
    std::fs::write(file(dir.path()), b"{\"version\":1,\"mode\":\"rem").unwrap();
    assert_eq!(load().mode(), ControlMode::Local);
}
