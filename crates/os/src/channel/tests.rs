use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::{JoinHandle, JoinSet},
    time::timeout,
};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(LIMIT, future).await.expect("took too long")
}

fn host(io: DuplexStream) -> (Channel, JoinHandle<Result<(), ChannelError>>, CancellationToken) {
    let cancel = CancellationToken::new();
    let (channel, driver) = Channel::host(io, "host-1", cancel.clone());
    (channel, tokio::spawn(driver), cancel)
}

fn guest(io: DuplexStream) -> (Channel, Incoming) {
    let (channel, incoming, driver) = Channel::guest(io, "guest-1", CancellationToken::new());
    tokio::spawn(driver);
    (channel, incoming)
}

/// Sends back what arrives, on every stream.
fn echo(mut incoming: Incoming) {
    tokio::spawn(async move {
        while let Some(stream) = incoming.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
}

/// A port whose host side can be replaced; what was in flight is cut.
struct Port {
    guest_end: Arc<tokio::sync::Mutex<DuplexStream>>,
    pump: Option<JoinHandle<()>>,
}

impl Port {
    fn new() -> (Self, DuplexStream) {
        let (guest_end, guest_io) = duplex(10_000);
        (Self { guest_end: Arc::new(tokio::sync::Mutex::new(guest_end)), pump: None }, guest_io)
    }

    async fn plug(&mut self) -> DuplexStream {
        if let Some(pump) = self.pump.take() {
            pump.abort();
            let _ = pump.await;
        }
        let (host_io, mut host_end) = duplex(10_000);
        let guest_end = self.guest_end.clone();
        self.pump = Some(tokio::spawn(async move {
            let _ = tokio::io::copy_bidirectional(&mut *guest_end.lock().await, &mut host_end).await;
        }));
        host_io
    }
}

#[tokio::test]
async fn many_streams_carry_megabytes_at_once() {
    let (host_io, guest_io) = duplex(5000);
    let (host, _driver, _cancel) = host(host_io);
    let (_guest, incoming) = guest(guest_io);
    echo(incoming);
    assert_eq!(within(host.started()).await.unwrap(), "guest-1");
    let mut jobs = JoinSet::new();
    for number in 0..20u8 {
        let stream = host.open().await.unwrap();
        jobs.spawn(async move {
            let sent: Vec<u8> = (0..1_500_000usize).map(|at| (at % 251) as u8 ^ number).collect();
            let (mut reader, mut writer) = tokio::io::split(stream);
            let write = async {
                writer.write_all(&sent).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (count, ()) = tokio::join!(reader.read_to_end(&mut got), write);
            assert_eq!(count.unwrap(), sent.len());
            assert!(got == sent);
        });
    }
    within(jobs.join_all()).await;
    assert_eq!(host.shared.lock().slots.len(), 0);
}

#[tokio::test]
async fn a_reader_that_stalls_stops_no_other_stream() {
    let (host_io, guest_io) = duplex(5000);
    let (host, _driver, _cancel) = host(host_io);
    let (_guest, mut incoming) = guest(guest_io);
    let mut stuck = within(host.open()).await.unwrap();
    let held = within(incoming.accept()).await.unwrap();
    let writing = tokio::spawn(async move { stuck.write_all(&vec![0; 3_000_000]).await });
    echo(incoming);
    let mut lively = within(host.open()).await.unwrap();
    for _ in 0..20 {
        within(lively.write_all(&[7; 100_000])).await.unwrap();
        let mut back = vec![0; 100_000];
        within(lively.read_exact(&mut back)).await.unwrap();
    }
    assert!(!writing.is_finished());
    drop(held);
    assert_eq!(within(writing).await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_new_host_takes_over_and_old_streams_end_with_an_error() {
    let (mut port, guest_io) = Port::new();
    let (guest, mut incoming) = guest(guest_io);
    let (host_1, driver, cancel) = host(port.plug().await);
    let mut at_host = within(host_1.open()).await.unwrap();
    at_host.write_all(b"x").await.unwrap();
    let mut at_guest = within(incoming.accept()).await.unwrap();
    within(at_guest.read_exact(&mut [0])).await.unwrap();
    // Both are in the middle of something.
    let flood = tokio::spawn(async move { at_guest.write_all(&vec![1; 3_000_000]).await });
    at_host.write_all(&[2; 200_000]).await.unwrap();
    within(at_host.read_exact(&mut [0; 50_000])).await.unwrap();
    cancel.cancel();
    within(driver).await.unwrap().unwrap();
    let host_io = port.plug().await;
    assert_eq!(at_host.write_all(b"x").await.unwrap_err().kind(), io::ErrorKind::NotConnected);

    let (host_2, _driver, _cancel) = host(host_io);
    within(host_2.started()).await.unwrap();
    assert_eq!(within(flood).await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    within(guest.started()).await.unwrap();
    echo(incoming);
    let mut stream = within(host_2.open()).await.unwrap();
    stream.write_all(b"again").await.unwrap();
    let mut back = [0; 5];
    within(stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"again");
}

#[tokio::test]
async fn an_answer_arrives_though_its_sender_let_go_of_the_stream() {
    let (host_io, guest_io) = duplex(100);
    let (host, _driver, _cancel) = host(host_io);
    let (_guest, mut incoming) = guest(guest_io);
    let mut asking = within(host.open()).await.unwrap();
    send_message(&mut asking, &"question", 100).await.unwrap();
    let mut answering = within(incoming.accept()).await.unwrap();
    assert_eq!(within(recv_message::<String, _>(&mut answering, 100)).await.unwrap(), "question");
    send_message(&mut answering, &vec![9u8; 50_000], 60_000).await.unwrap();
    answering.shutdown().await.unwrap();
    drop(answering);
    let answer: Vec<u8> = within(recv_message(&mut asking, 60_000)).await.unwrap();
    assert_eq!(answer.len(), 50_000);
    assert!(matches!(within(recv_message::<u8, _>(&mut asking, 10)).await, Err(MessageError::Ended)));
}

#[tokio::test]
async fn opening_waits_while_too_many_streams_are_open() {
    let (host_io, guest_io) = duplex(5000);
    let (host, _driver, _cancel) = host(host_io);
    let (_guest, _incoming) = guest(guest_io);
    let mut streams = Vec::new();
    for _ in 0..clan_wire::mux::MAX_STREAMS {
        streams.push(within(host.open()).await.unwrap());
    }
    let another = tokio::spawn(async move { host.open().await.map(drop) });
    tokio::task::yield_now().await;
    assert!(!another.is_finished());
    streams.pop();
    within(another).await.unwrap().unwrap();
}

#[tokio::test]
async fn streams_that_both_sides_ended_make_place_for_others() {
    let (host_io, guest_io) = duplex(100);
    let (host, _driver, _cancel) = host(host_io);
    let (_guest, mut incoming) = guest(guest_io);
    tokio::spawn(async move {
        while let Some(mut stream) = incoming.accept().await {
            let _ = stream.shutdown().await;
        }
    });
    for _ in 0..5 * clan_wire::mux::MAX_STREAMS {
        let mut stream = within(host.open()).await.unwrap();
        stream.write_all(b"word").await.unwrap();
        stream.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn when_the_byte_stream_ends_everybody_is_told() {
    let (host_io, guest_io) = duplex(5000);
    let (host, driver, _cancel) = host(host_io);
    let (guest_channel, mut incoming) = guest(guest_io);
    let mut stream = within(host.open()).await.unwrap();
    stream.write_all(b"last words").await.unwrap();
    let mut at_guest = within(incoming.accept()).await.unwrap();
    within(at_guest.read_exact(&mut [0; 4])).await.unwrap();
    driver.abort();
    assert!(within(incoming.accept()).await.is_none());
    assert!(matches!(within(guest_channel.started()).await, Err(ChannelError::Ended | ChannelError::Io(_))));
    assert!(matches!(within(host.open()).await, Err(ChannelError::Closed)));
    let mut rest = [0; 6];
    within(at_guest.read_exact(&mut rest)).await.unwrap();
    assert_eq!(&rest, b" words");
    assert_eq!(within(at_guest.read(&mut rest)).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_and_a_cut_one_is_an_error() {
    let mut bytes: &[u8] = &[255, 255, 255, 255, 1];
    assert!(matches!(recv_message::<u8, _>(&mut bytes, 100).await, Err(MessageError::Codec(_))));
    let mut bytes: &[u8] = &[9, 0, 0, 0, 1];
    assert!(matches!(recv_message::<u8, _>(&mut bytes, 100).await, Err(MessageError::Io(_))));
    let mut bytes: &[u8] = &[];
    assert!(matches!(recv_message::<u8, _>(&mut bytes, 100).await, Err(MessageError::Ended)));
}

#[tokio::test]
async fn a_bridged_port_carries_channels_both_ways() {
    let (device, other_end) = std::os::unix::net::UnixStream::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    other_end.set_nonblocking(true).unwrap();
    let port = port::bridged(std::fs::File::from(std::os::fd::OwnedFd::from(device))).unwrap();
    let cancel = CancellationToken::new();
    let (_guest, incoming, driver) = Channel::guest(port, "guest-1", cancel.clone());
    let driver = tokio::spawn(driver);
    echo(incoming);
    let (host, host_driver) =
        Channel::host(tokio::net::UnixStream::from_std(other_end).unwrap(), "host-1", CancellationToken::new());
    let host_driver = tokio::spawn(host_driver);
    let stream = within(host.open()).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let writing = tokio::spawn(async move { writer.write_all(&vec![3; 2_000_000]).await });
    within(reader.read_exact(&mut vec![0; 2_000_000])).await.unwrap();
    writing.await.unwrap().unwrap();
    // The guest's program goes; its thread lets go of the device.
    cancel.cancel();
    within(driver).await.unwrap().unwrap();
    assert!(within(host_driver).await.unwrap().is_err());
}
