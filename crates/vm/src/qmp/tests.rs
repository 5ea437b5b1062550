use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};

use super::*;

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

/// A client whose n-th connection is the n-th of the streams; then there are no more.
fn client_of(streams: Vec<DuplexStream>) -> Qmp {
    let streams = Arc::new(Mutex::new(streams.into_iter()));
    let connect = move || {
        let next = streams.lock().unwrap().next();
        async move { next.ok_or_else(|| io::ErrorKind::ConnectionRefused.into()) }
    };
    let (qmp, task) = client(connect, CancellationToken::new());
    tokio::spawn(task);
    qmp
}

/// QEMU's side after the negotiation.
async fn negotiate(server: DuplexStream) -> BufReader<DuplexStream> {
    let mut server = BufReader::new(server);
    server.get_mut().write_all(GREETING.as_bytes()).await.unwrap();
    let request = read(&mut server).await;
    assert_eq!(request["execute"], "qmp_capabilities");
    reply(&mut server, json!({"return": {}, "id": request["id"]})).await;
    server
}

async fn read(server: &mut BufReader<DuplexStream>) -> Value {
    let mut line = String::new();
    server.read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap()
}

async fn reply(server: &mut BufReader<DuplexStream>, value: Value) {
    server.get_mut().write_all(format!("{value}\r\n").as_bytes()).await.unwrap();
}

#[tokio::test]
async fn answers_reach_those_who_asked_whatever_their_order() {
    let (near, far) = duplex(4096);
    let qmp = client_of(vec![near]);
    let server = tokio::spawn(async move {
        let mut server = negotiate(far).await;
        let (first, second) = (read(&mut server).await, read(&mut server).await);
        reply(&mut server, json!({"event": "RESUME"})).await;
        reply(&mut server, json!({"return": "second", "id": second["id"]})).await;
        reply(&mut server, json!({"error": {"class": "C", "desc": "no"}, "id": first["id"]})).await;
        (first, server)
    });
    let mut events = qmp.events();
    let (first, second) =
        tokio::join!(biased; qmp.execute("first", json!({"x": 1})), qmp.execute("second", Value::Null));
    let refused = QmpError::Refused { command: "first".into(), class: "C".into(), description: "no".into() };
    assert_eq!((first, second), (Err(refused), Ok(json!("second"))));
    assert_eq!(events.recv().await.unwrap().name, "RESUME");
    assert_eq!(server.await.unwrap().0["arguments"], json!({"x": 1}));
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_reported_and_comes_back() {
    let (near, far) = duplex(4096);
    let (near_again, far_again) = duplex(4096);
    let qmp = client_of(vec![near, near_again]);
    tokio::spawn(async move {
        let mut server = negotiate(far).await;
        read(&mut server).await;
        drop(server);
        let mut server = negotiate(far_again).await;
        let request = read(&mut server).await;
        reply(&mut server, json!({"return": 2, "id": request["id"]})).await;
        let _ = server.read_to_end(&mut Vec::new()).await;
    });
    assert_eq!(qmp.execute("one", Value::Null).await, Err(QmpError::Disconnected { command: "one".into() }));
    assert_eq!(qmp.execute("two", Value::Null).await, Ok(json!(2)));
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_goes_to_nobody() {
    let (near, far) = duplex(4096);
    let qmp = client_of(vec![near]);
    tokio::spawn(async move {
        let mut server = negotiate(far).await;
        let late = read(&mut server).await;
        let request = read(&mut server).await;
        reply(&mut server, json!({"return": "late", "id": late["id"]})).await;
        reply(&mut server, json!({"return": "right", "id": request["id"]})).await;
        let _ = server.read_to_end(&mut Vec::new()).await;
    });
    let limit = Duration::from_secs(1);
    let late = qmp.execute_within("slow", Value::Null, limit).await;
    assert_eq!(late, Err(QmpError::TimedOut { command: "slow".into(), limit }));
    assert_eq!(qmp.execute("quick", Value::Null).await, Ok(json!("right")));
}

/// Whatever comes after the negotiation ends that connection, and only that.
async fn survives(hostile: &[u8]) {
    let (near, far) = duplex(4096);
    let (near_again, far_again) = duplex(4096);
    let qmp = client_of(vec![near, near_again]);
    let hostile = hostile.to_owned();
    tokio::spawn(async move {
        let mut server = negotiate(far).await;
        // The client may hang up in the middle.
        let _ = server.get_mut().write_all(&hostile).await;
        let mut server = negotiate(far_again).await;
        loop {
            let request = read(&mut server).await;
            reply(&mut server, json!({"return": "fine", "id": request["id"]})).await;
        }
    });
    let limit = Duration::from_secs(30);
    let answer = loop {
        match qmp.execute_within("query-status", Value::Null, limit).await {
            Err(QmpError::Disconnected { .. }) => {}
            answer => break answer,
        }
    };
    assert_eq!(answer, Ok(json!("fine")));
}

#[tokio::test(start_paused = true)]
async fn hostile_lines_end_the_connection_and_nothing_else() {
    survives(b"nonsense\n").await;
    survives(b"{}\n").await;
    survives(b"{\"event\": 7}\n").await;
    survives(b"\xff\xfe\n").await;
    survives(&vec![b'x'; MAX_LINE + 1]).await;
    survives(&[vec![b'x'; MAX_LINE + 1], b"\n".to_vec()].concat()).await;
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_reason_is_kept() {
    let (near, far) = duplex(4096);
    let qmp = client_of(vec![near]);
    let mut events = qmp.events();
    let mut server = negotiate(far).await;
    reply(&mut server, json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}})).await;
    assert_eq!(events.recv().await.unwrap().name, "SHUTDOWN");
    assert_eq!(qmp.shutdown_reason().as_deref(), Some("guest-shutdown"));
}
