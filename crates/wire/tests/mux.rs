//! Two muxes on an in-memory port that may cut, delay and keep bytes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Instant;

use clan_wire::mux::{Event, HELLO_INTERVAL, MAX_PAYLOAD, MAX_STREAMS, Mux, Role, StreamId, WINDOW};
use proptest::prelude::*;

/// A port: bytes on their way in each direction.
struct Port {
    now: Instant,
    to_guest: Vec<u8>,
    to_host: Vec<u8>,
}

impl Port {
    fn new() -> Self {
        Self { now: Instant::now(), to_guest: Vec::new(), to_host: Vec::new() }
    }

    fn host(&self, session: u64) -> Mux {
        Mux::new(Role::Host, session, "host-1", self.now)
    }

    fn guest(&self, incarnation: u64) -> Mux {
        Mux::new(Role::Guest, incarnation, "guest-1", self.now)
    }

    fn transmit(&mut self, host: &mut Mux, guest: &mut Mux) {
        while let Some(bytes) = host.poll_transmit() {
            self.to_guest.extend(bytes);
        }
        while let Some(bytes) = guest.poll_transmit() {
            self.to_host.extend(bytes);
        }
    }

    /// Passes everything on, in chunks, until both sides are quiet.
    fn settle(&mut self, host: &mut Mux, guest: &mut Mux, chunk: usize) {
        loop {
            self.transmit(host, guest);
            if self.to_guest.is_empty() && self.to_host.is_empty() {
                return;
            }
            for bytes in std::mem::take(&mut self.to_guest).chunks(chunk) {
                guest.handle_bytes(bytes);
            }
            for bytes in std::mem::take(&mut self.to_host).chunks(chunk) {
                host.handle_bytes(bytes);
            }
        }
    }

    /// The same, with time passing, until both have a session.
    fn settle_started(&mut self, host: &mut Mux, guest: &mut Mux) {
        for _ in 0..10 {
            self.settle(host, guest, 4096);
            if host.is_started() && guest.is_started() {
                return;
            }
            self.now += HELLO_INTERVAL;
            host.handle_timeout(self.now);
            guest.handle_timeout(self.now);
        }
        panic!("no session after ten Hellos");
    }
}

fn events(mux: &mut Mux) -> Vec<Event> {
    std::iter::from_fn(|| mux.poll_event()).collect()
}

fn started() -> (Port, Mux, Mux) {
    let mut port = Port::new();
    let (mut host, mut guest) = (port.host(100), port.guest(1));
    port.settle_started(&mut host, &mut guest);
    assert_eq!(events(&mut host), [Event::Started { peer_version: "guest-1".into() }]);
    assert_eq!(events(&mut guest), [Event::Started { peer_version: "host-1".into() }]);
    (port, host, guest)
}

/// Opens a stream, sends a word over it, and expects it at the other side.
fn check_a_stream_works(port: &mut Port, host: &mut Mux, guest: &mut Mux) -> StreamId {
    let id = host.open().unwrap();
    assert_eq!(host.send(id, b"word"), 4);
    port.settle(host, guest, 4096);
    let news = events(guest);
    let [Event::Opened(at_guest), Event::Data(_, data)] = &news[..] else { panic!("{news:?}") };
    assert_eq!(data, b"word");
    *at_guest
}

#[test]
fn the_host_repeats_its_hello_until_it_is_answered() {
    let mut port = Port::new();
    let mut host = port.host(100);
    while host.poll_transmit().is_some() {}
    host.handle_timeout(port.now + HELLO_INTERVAL / 2);
    assert_eq!(host.poll_transmit(), None);
    host.handle_timeout(port.now + HELLO_INTERVAL);
    let hello = host.poll_transmit().unwrap();
    let mut guest = port.guest(1);
    guest.handle_bytes(&hello);
    port.settle(&mut host, &mut guest, 7);
    assert!(host.is_started() && guest.is_started());
    assert_eq!(host.next_timeout(), None);
}

#[test]
fn a_stream_that_nobody_reads_holds_a_window_and_stops_no_other() {
    let (mut port, mut host, mut guest) = started();
    let (stuck, lively) = (host.open().unwrap(), host.open().unwrap());
    let mut sent = 0;
    for _ in 0..100 {
        sent += host.send(stuck, &[1; 10_000]);
        port.settle(&mut host, &mut guest, 50_000);
        events(&mut host);
    }
    assert_eq!(sent, WINDOW);
    let mut arrived = 0;
    for _ in 0..200 {
        host.send(lively, &[2; 10_000]);
        port.settle(&mut host, &mut guest, 50_000);
        for event in events(&mut guest) {
            if let Event::Data(id, data) = event
                && data.first() == Some(&2)
            {
                arrived += data.len();
                guest.consumed(id, data.len());
            }
        }
    }
    assert_eq!(arrived, 2_000_000);
}

#[test]
fn room_is_announced_once_the_other_side_consumed() {
    let (mut port, mut host, mut guest) = started();
    let id = host.open().unwrap();
    let mut sent = 0;
    while sent < WINDOW {
        sent += host.send(id, &vec![0; WINDOW]);
        port.settle(&mut host, &mut guest, 50_000);
        events(&mut host);
    }
    assert_eq!(host.send(id, b"more"), 0);
    for event in events(&mut guest) {
        if let Event::Data(id, data) = event {
            guest.consumed(id, data.len());
        }
    }
    port.settle(&mut host, &mut guest, 50_000);
    assert!(events(&mut host).contains(&Event::Writable(id)));
    assert_eq!(host.send(id, b"more"), 4);
}

#[test]
fn fin_comes_after_all_data_and_both_fins_free_the_stream() {
    let (mut port, mut host, mut guest) = started();
    let id = host.open().unwrap();
    host.send(id, &[5; 100_000]);
    host.fin(id);
    assert_eq!(host.send(id, b"late"), 0);
    port.settle(&mut host, &mut guest, 1000);
    let news = events(&mut guest);
    let at_guest = match &news[..] {
        [Event::Opened(id), Event::Data(_, data), Event::Fin(_)] if data.len() == 100_000 => *id,
        other => panic!("{} events", other.len()),
    };
    guest.send(at_guest, b"answer");
    guest.fin(at_guest);
    port.settle(&mut host, &mut guest, 1000);
    assert_eq!(events(&mut host), [Event::Data(id, b"answer".to_vec()), Event::Fin(id)]);
    guest.reset(at_guest);
    port.settle(&mut host, &mut guest, 1000);
    assert_eq!(events(&mut host), []);
}

#[test]
fn what_was_sent_before_fin_arrives_after_the_stream_was_released() {
    let (mut port, mut host, mut guest) = started();
    let at_guest = check_a_stream_works(&mut port, &mut host, &mut guest);
    guest.send(at_guest, b"answer");
    guest.fin(at_guest);
    guest.release(at_guest);
    port.settle(&mut host, &mut guest, 1000);
    assert!(matches!(&events(&mut host)[..], [Event::Data(_, data), Event::Fin(_)] if data == b"answer"));
}

#[test]
fn a_released_stream_is_reset_when_the_other_side_sends_for_long() {
    let (mut port, mut host, mut guest) = started();
    let id = host.open().unwrap();
    port.settle(&mut host, &mut guest, 1000);
    let [Event::Opened(at_guest)] = events(&mut guest)[..] else { panic!("not opened") };
    guest.fin(at_guest);
    guest.release(at_guest);
    for _ in 0..10 {
        host.send(id, &vec![0; WINDOW / 8]);
        port.settle(&mut host, &mut guest, 1000);
    }
    assert!(events(&mut host).contains(&Event::Reset(id)));
    assert_eq!(events(&mut guest), []);
}

#[test]
fn streams_over_the_limit_are_refused() {
    let (mut port, mut host, mut guest) = started();
    let ids: Vec<_> = std::iter::from_fn(|| host.open()).collect();
    assert_eq!(ids.len(), MAX_STREAMS);
    port.settle(&mut host, &mut guest, 1000);
    assert_eq!(events(&mut guest).len(), MAX_STREAMS);
    host.reset(ids[0]);
    assert!(host.open().is_some());
    port.settle(&mut host, &mut guest, 1000);
    assert!(matches!(events(&mut guest)[..], [Event::Reset(_), Event::Opened(_)]));
}

#[test]
fn a_new_host_replaces_the_session_of_the_old_one() {
    let (mut port, mut host, mut guest) = started();
    let old = check_a_stream_works(&mut port, &mut host, &mut guest);
    let mut host = port.host(200);
    port.settle_started(&mut host, &mut guest);
    port.settle(&mut host, &mut guest, 1000);
    assert_eq!(events(&mut guest), [Event::Restarted, Event::Started { peer_version: "host-1".into() }]);
    assert_eq!(guest.send(old, b"lost"), 0);
    let new = check_a_stream_works(&mut port, &mut host, &mut guest);
    assert_ne!(old, new);
}

#[test]
fn a_new_guest_gets_a_new_session() {
    let (mut port, mut host, mut guest) = started();
    check_a_stream_works(&mut port, &mut host, &mut guest);
    let mut guest = port.guest(2);
    port.settle_started(&mut host, &mut guest);
    assert_eq!(
        events(&mut host),
        [Event::Restarted, Event::Started { peer_version: "guest-1".into() }],
        "and no third one"
    );
    events(&mut guest);
    check_a_stream_works(&mut port, &mut host, &mut guest);
}

#[test]
fn another_version_is_reported() {
    let mut port = Port::new();
    let (mut host, mut guest) = (port.host(100), port.guest(1));
    while guest.poll_transmit().is_some() {}
    while let Some(mut bytes) = host.poll_transmit() {
        if bytes[0] != 0 {
            bytes[4] = 9;
            let crc = crc32fast::hash(&bytes[..28]);
            bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        }
        port.to_guest.extend(bytes);
    }
    port.settle(&mut host, &mut guest, 1000);
    assert_eq!(events(&mut guest), [Event::Incompatible { protocol: 9 }]);
}

#[test]
fn a_gap_within_a_session_ends_it() {
    let (mut port, mut host, mut guest) = started();
    let at_guest = check_a_stream_works(&mut port, &mut host, &mut guest);
    guest.send(at_guest, &[1; 1000]);
    port.transmit(&mut host, &mut guest);
    port.to_host.drain(500..600);
    guest.send(at_guest, &[2; 1000]);
    port.transmit(&mut host, &mut guest);
    port.settle_started(&mut host, &mut guest);
    assert!(matches!(events(&mut host)[..], [Event::Restarted, Event::Started { .. }]));
    events(&mut guest);
    check_a_stream_works(&mut port, &mut host, &mut guest);
}

/// Bytes as a session leaves them in the port: real frames, cut anywhere.
fn stale(port: &Port, data: usize, cut: usize) -> (Vec<u8>, Vec<u8>) {
    let mut other = Port { now: port.now, to_guest: Vec::new(), to_host: Vec::new() };
    let (mut host, mut guest) = (port.host(7), port.guest(1));
    other.settle_started(&mut host, &mut guest);
    for _ in 0..3 {
        let id = host.open().unwrap();
        host.send(id, &vec![0xC1; data]);
        let id = guest.open().unwrap();
        guest.send(id, &vec![0xC1; data]);
    }
    other.transmit(&mut host, &mut guest);
    other.to_guest.truncate(cut.min(other.to_guest.len()));
    other.to_host.truncate(cut.min(other.to_host.len()));
    (other.to_guest, other.to_host)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_streams_deliver_all_bytes_in_order_whatever_the_chunks(
        writes in prop::collection::vec((0usize..8, 1usize..200_000, any::<bool>()), 1..8),
        chunks in prop::collection::vec(1usize..40_000, 1..20),
    ) {
        let (mut port, mut host, mut guest) = started();
        let at_host: Vec<_> = (0..8).map(|_| host.open().unwrap()).collect();
        port.settle(&mut host, &mut guest, 1000);
        let at_guest: Vec<_> = events(&mut guest)
            .into_iter()
            .map(|event| if let Event::Opened(id) = event { id } else { panic!("{event:?}") })
            .collect();
        let ids = [at_host, at_guest];
        // Per direction and stream: bytes wanted, sent, received. Byte n of a stream is n modulo 251.
        let (mut want, mut sent, mut got) = ([[0; 8]; 2], [[0; 8]; 2], [[0; 8]; 2]);
        for (stream, length, from_host) in &writes {
            want[usize::from(!*from_host)][*stream] += length;
        }
        let mut chunks = chunks.iter().cycle();
        let mut rounds = 0;
        while got != want {
            rounds += 1;
            prop_assert!(rounds < 10_000, "no progress: {:?} of {:?}", got, want);
            for (side, mux) in [&mut host, &mut guest].into_iter().enumerate() {
                for stream in 0..8 {
                    let at = sent[side][stream];
                    let bytes: Vec<u8> = (at..want[side][stream].min(at + 9_000)).map(|n| (n % 251) as u8).collect();
                    sent[side][stream] += mux.send(ids[side][stream], &bytes);
                }
            }
            port.transmit(&mut host, &mut guest);
            for (bytes, mux) in [(&mut port.to_guest, &mut guest), (&mut port.to_host, &mut host)] {
                // Some bytes stay behind, as long as there is something behind them.
                while !bytes.is_empty() && (bytes.len() > 100 || rounds % 2 == 0) {
                    let count = (*chunks.next().unwrap()).min(bytes.len());
                    mux.handle_bytes(&bytes.drain(..count).collect::<Vec<_>>());
                }
            }
            for (side, mux) in [&mut guest, &mut host].into_iter().enumerate() {
                for event in events(mux) {
                    if let Event::Data(id, data) = event {
                        let stream = ids[1 - side].iter().position(|known| *known == id).unwrap();
                        let at = got[side][stream];
                        prop_assert!(data.iter().enumerate().all(|(n, byte)| *byte == ((at + n) % 251) as u8));
                        got[side][stream] += data.len();
                        mux.consumed(id, data.len());
                    }
                }
            }
        }
    }

    #[test]
    fn a_session_starts_behind_garbage(garbage in prop::collection::vec(any::<u8>(), 0..5000), chunk in 1usize..5000) {
        let mut port = Port::new();
        port.to_guest.extend(&garbage);
        port.to_host.extend(&garbage);
        let (mut host, mut guest) = (port.host(100), port.guest(1));
        port.settle(&mut host, &mut guest, chunk);
        prop_assert!(host.is_started() && guest.is_started());
        events(&mut guest);
        check_a_stream_works(&mut port, &mut host, &mut guest);
    }

    #[test]
    fn a_session_starts_at_once_behind_a_former_one_that_was_cut(
        data in 0usize..70_000,
        cut in 0usize..250_000,
        guest_is_old in any::<bool>(),
        chunk in 1usize..5000,
    ) {
        let mut port = Port::new();
        (port.to_guest, port.to_host) = stale(&port, data, cut);
        let (mut host, mut guest) = (port.host(100), port.guest(1));
        if guest_is_old {
            let mut former = Port::new();
            former.settle_started(&mut port.host(7), &mut guest);
        }
        port.settle(&mut host, &mut guest, chunk);
        prop_assert!(host.is_started() && guest.is_started());
        let news = events(&mut host);
        prop_assert!(matches!(news[..], [Event::Started { .. }]), "{:?}", news);
        let news = events(&mut guest);
        prop_assert!(matches!(news.last(), Some(Event::Started { .. })), "{:?}", news);
        check_a_stream_works(&mut port, &mut host, &mut guest);
    }

    #[test]
    fn damaged_sessions_recover_and_stay_within_bounds(
        damage in prop::collection::vec((0usize..80_000, any::<u8>(), any::<bool>()), 0..20),
        rounds in 1usize..6,
    ) {
        let (mut port, mut host, mut guest) = started();
        for _ in 0..rounds {
            if let Some(id) = host.open() {
                host.send(id, &[3; 30_000]);
            }
            if let Some(id) = guest.open() {
                guest.send(id, &[4; 30_000]);
            }
            port.transmit(&mut host, &mut guest);
            for (at, byte, to_host) in &damage {
                let bytes = if *to_host { &mut port.to_host } else { &mut port.to_guest };
                if let Some(place) = bytes.get_mut(*at) {
                    *place ^= byte;
                }
            }
            port.settle(&mut host, &mut guest, 8192);
            for event in events(&mut host).into_iter().chain(events(&mut guest)) {
                if let Event::Data(_, data) = event {
                    prop_assert!(data.len() <= WINDOW);
                }
            }
        }
        // A new host always gets through.
        let mut host = port.host(9000);
        port.settle_started(&mut host, &mut guest);
        events(&mut guest);
        check_a_stream_works(&mut port, &mut host, &mut guest);
    }

    #[test]
    fn bytes_that_are_no_frames_yield_nothing(bytes in prop::collection::vec(any::<u8>(), 0..20_000), host in any::<bool>()) {
        let port = Port::new();
        let mut mux = if host { port.host(5) } else { port.guest(5) };
        while mux.poll_transmit().is_some() {}
        mux.handle_bytes(&bytes);
        prop_assert_eq!(mux.poll_event(), None);
        prop_assert_eq!(mux.poll_transmit(), None);
    }
}

#[test]
fn a_flood_of_pings_without_reading_the_answers_takes_bounded_memory() {
    let (mut port, mut host, mut guest) = started();
    host.ping(1);
    let ping = host.poll_transmit().unwrap();
    for _ in 0..100_000 {
        guest.handle_bytes(&ping);
    }
    port.transmit(&mut host, &mut guest);
    assert!(port.to_host.len() < 8 * MAX_PAYLOAD);
}
