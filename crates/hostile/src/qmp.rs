//! QEMU's monitor, when a guest has taken QEMU over.

use std::cell::OnceCell;

use clan_vm::{QmpError, qmp};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: OnceCell<Runtime> = const { OnceCell::new() };
}

/// What a monitor may say to a manager that asks it things. The first byte is how many.
///
/// INVARIANT looked for: every question has one answer, or is told that there is none, when the connection has ended; and
/// events are bounded in number.
pub fn qmp(data: &[u8]) {
    let Some((count, said)) = data.split_first() else { return };
    let count = usize::from(count % 4);
    let session = async {
        let (client, served) = qmp::over(tokio::io::join(said, tokio::io::sink()));
        let mut events = client.events();
        let questions = (0..count).map(|_| client.execute("query-status", Value::Null));
        let mut answers = Vec::new();
        let asked = async {
            for question in questions {
                answers.push(question.await);
            }
        };
        // What serves is dropped with the connection, by which nobody waits for ever.
        tokio::join!(async { drop(served.await) }, asked);
        drop(client);
        let mut heard = 0;
        while let Ok(event) = events.try_recv() {
            assert!(event.name.len() <= said.len(), "an event is no longer than what was said");
            heard += 1;
        }
        assert!(heard <= 64, "events pile up");
        (answers, said.len())
    };
    let (answers, length) = RUNTIME.with(|runtime| {
        let runtime =
            runtime.get_or_init(|| Builder::new_current_thread().enable_time().build().expect("a runtime is had"));
        runtime.block_on(session)
    });
    assert_eq!(answers.len(), count);
    for answer in answers {
        match answer {
            Ok(value) => assert!(value.to_string().len() <= 8 * length, "an answer is not longer than what was said"),
            Err(QmpError::Refused { class, description, .. }) => {
                assert!(class.len() + description.len() <= 2 * length, "a refusal is not longer than what was said");
            }
            Err(QmpError::TimedOut { .. }) => panic!("a monitor that is gone is waited for"),
            Err(QmpError::Disconnected { .. } | QmpError::Ended | QmpError::Malformed(_)) => {}
        }
    }
}
