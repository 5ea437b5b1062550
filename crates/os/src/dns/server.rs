//! The name server's sockets.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, debug, debug_span, trace};

use super::{
    Zone,
    answer::{Answer, answer, truncate, udp_limit},
};

/// INVARIANT: no more questions than this are passed on at the same time, and no more TCP connections are open.
const MAX_FORWARDED: usize = 256;
const MAX_CONNECTIONS: usize = 64;
const UPSTREAM_LIMIT: Duration = Duration::from_secs(2);
const CONNECTION_IDLE: Duration = Duration::from_secs(10);
const MAX_UDP_QUESTION: usize = 4096;
const RETRY_PAUSE: Duration = Duration::from_millis(50);
const BIND_ATTEMPTS: usize = 8;

/// Why the name server could not start.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// The address could not be bound.
    #[error("cannot serve names at {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A running name server; dropping it ends it too, without waiting.
pub struct DnsServer {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

struct Service {
    zone: watch::Receiver<Arc<Zone>>,
    upstream: Option<SocketAddr>,
    forwarded: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl DnsServer {
    /// Serves `zone` on `bind`, over UDP and TCP. Other names go to `upstream`, or are refused without one.
    pub async fn start(
        bind: SocketAddr,
        zone: watch::Receiver<Arc<Zone>>,
        upstream: Option<SocketAddr>,
    ) -> Result<Self, DnsError> {
        let (udp, tcp) = bind_both(bind).await.map_err(|source| DnsError::Bind { address: bind, source })?;
        let address = udp.local_addr().map_err(|source| DnsError::Bind { address: bind, source })?;
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let service = Arc::new(Service {
            zone,
            upstream,
            forwarded: Arc::new(Semaphore::new(MAX_FORWARDED)),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        tasks.spawn(service.clone().serve_udp(Arc::new(udp)).instrument(debug_span!("dns_udp", %address)));
        tasks.spawn(service.serve_tcp(tcp).instrument(debug_span!("dns_tcp", %address)));
        tasks.close();
        Ok(Self { address, stop, tasks })
    }

    /// Where it listens: the port is filled in if `bind` had port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it and waits until its sockets are closed.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Both sockets on the same port; where the system chooses it, it may be free for UDP only.
async fn bind_both(bind: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let udp = UdpSocket::bind(bind).await?;
        match TcpListener::bind(udp.local_addr()?).await {
            Err(_) if bind.port() == 0 && attempt < BIND_ATTEMPTS => {}
            tcp => return Ok((udp, tcp?)),
        }
    }
}

impl Service {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = vec![0; MAX_UDP_QUESTION];
        loop {
            let received = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                received = socket.recv_from(&mut buffer) => received,
            };
            let (length, from) = match received {
                Ok(received) => received,
                Err(error) => {
                    trace!(%error, "receiving failed");
                    tokio::time::sleep(RETRY_PAUSE).await;
                    continue;
                }
            };
            let question = &buffer[..length];
            let answer = answer(question, &self.zone.borrow());
            match answer {
                Answer::Ignore => {}
                Answer::Reply(bytes) => send(&socket, truncate(bytes, udp_limit(question)), from).await,
                Answer::Forward { refusal } => {
                    // A place is taken before the task is made, so that a flood makes no tasks.
                    let place = self
                        .upstream
                        .and_then(|upstream| Some((upstream, self.forwarded.clone().try_acquire_owned().ok()?)));
                    let Some((upstream, place)) = place else {
                        send(&socket, refusal, from).await;
                        continue;
                    };
                    let (service, socket, question) = (self.clone(), socket.clone(), question.to_vec());
                    self.tasks.spawn(async move {
                        if let Some(bytes) = service.forward(&question, upstream).await {
                            send(&socket, bytes, from).await;
                        }
                        drop(place);
                    });
                }
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    // Beyond the limit a connection is closed at once.
                    let Ok(place) = places.clone().try_acquire_owned() else { continue };
                    let service = self.clone();
                    self.tasks.spawn(async move {
                        tokio::select! {
                            biased;
                            () = service.stop.cancelled() => {}
                            ended = service.serve_connection(stream) => if let Err(error) = ended { trace!(%error, "a connection ended") },
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    trace!(%error, "accepting failed");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let question = timeout(CONNECTION_IDLE, async {
                let mut question = vec![0; usize::from(stream.read_u16().await?)];
                stream.read_exact(&mut question).await?;
                io::Result::Ok(question)
            })
            .await??;
            let answer = answer(&question, &self.zone.borrow());
            let bytes = match answer {
                Answer::Ignore => return Ok(()),
                Answer::Reply(bytes) => truncate(bytes, usize::from(u16::MAX)),
                Answer::Forward { refusal } => match (self.upstream, self.forwarded.try_acquire()) {
                    (Some(upstream), Ok(_place)) => self.forward(&question, upstream).await.unwrap_or(refusal),
                    _ => refusal,
                },
            };
            let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
            timeout(CONNECTION_IDLE, async {
                stream.write_u16(length).await?;
                stream.write_all(&bytes).await
            })
            .await??;
        }
    }

    /// Asks the upstream server; `None` if it does not answer in time.
    async fn forward(&self, question: &[u8], upstream: SocketAddr) -> Option<Vec<u8>> {
        let asked = timeout(UPSTREAM_LIMIT, async {
            let any: SocketAddr =
                if upstream.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
            // A socket, and with it a port, of its own for each question; only the upstream's packets come in.
            let socket = UdpSocket::bind(any).await?;
            socket.connect(upstream).await?;
            socket.send(question).await?;
            let mut buffer = vec![0; usize::from(u16::MAX)];
            loop {
                let length = socket.recv(&mut buffer).await?;
                if length >= 12 && buffer[..2] == question[..2] && buffer[2] & 0x80 != 0 {
                    buffer.truncate(length);
                    return io::Result::Ok(buffer);
                }
            }
        });
        let answered = tokio::select! {
            biased;
            () = self.stop.cancelled() => return None,
            answered = asked => answered,
        };
        match answered {
            Ok(Ok(bytes)) => Some(bytes),
            Ok(Err(error)) => {
                debug!(%error, %upstream, "the upstream name server cannot be asked");
                None
            }
            Err(_) => None,
        }
    }
}

async fn send(socket: &UdpSocket, bytes: Vec<u8>, to: SocketAddr) {
    if bytes.is_empty() {
        return;
    }
    if let Err(error) = socket.send_to(&bytes, to).await {
        trace!(%error, %to, "an answer was not sent");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::{
        op::{Message, Query, ResponseCode},
        rr::{Name, RecordType},
    };

    fn ask(name: &str) -> Vec<u8> {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::AAAA));
        message.to_vec().unwrap()
    }

    async fn by_udp(server: SocketAddr, question: &[u8]) -> Message {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(question, server).await.unwrap();
        let mut buffer = [0; 4096];
        let length = timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.unwrap().unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    async fn by_tcp(server: SocketAddr, question: &[u8]) -> Message {
        let mut stream = TcpStream::connect(server).await.unwrap();
        stream.write_u16(question.len() as u16).await.unwrap();
        stream.write_all(question).await.unwrap();
        let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
        Message::from_vec(&answer).unwrap()
    }

    fn zone(host: &str) -> Arc<Zone> {
        Arc::new(Zone {
            ipv4: Default::default(),
            clan: "family".parse().unwrap(),
            hosts: [(host.to_owned(), "fd01::1".parse().unwrap())].into(),
        })
    }

    #[tokio::test]
    async fn names_are_served_over_udp_and_tcp_and_follow_the_zone() {
        let (sender, receiver) = watch::channel(zone("alice"));
        let server = DnsServer::start("127.0.0.1:0".parse().unwrap(), receiver, None).await.unwrap();
        let question = ask("alice.family.clan.");
        assert_eq!(by_udp(server.address(), &question).await.answers.len(), 1);
        assert_eq!(by_tcp(server.address(), &question).await.answers.len(), 1);
        assert_eq!(by_udp(server.address(), &ask("example.org.")).await.metadata.response_code, ResponseCode::Refused);
        sender.send(zone("bob")).unwrap();
        assert_eq!(by_udp(server.address(), &question).await.metadata.response_code, ResponseCode::NXDomain);
        let address = server.address();
        server.stop().await;
        UdpSocket::bind(address).await.expect("the port is free again");
    }

    #[tokio::test]
    async fn other_names_are_asked_upstream() {
        let (_sender, above) =
            watch::channel(Arc::new(Zone { clan: "other".parse().unwrap(), ..(*zone("carol")).clone() }));
        let upstream = DnsServer::start("127.0.0.1:0".parse().unwrap(), above, None).await.unwrap();
        let (_sender, below) = watch::channel(zone("alice"));
        let server = DnsServer::start("127.0.0.1:0".parse().unwrap(), below, Some(upstream.address())).await.unwrap();
        // The refusal is the upstream's own answer, which proves that it was asked.
        let question = ask("example.org.");
        assert_eq!(by_udp(server.address(), &question).await.metadata.response_code, ResponseCode::Refused);
        assert_eq!(by_tcp(server.address(), &question).await.metadata.response_code, ResponseCode::Refused);
        upstream.stop().await;
        server.stop().await;
    }

    #[tokio::test]
    async fn an_upstream_that_says_nothing_is_not_waited_for_long() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (_sender, zone) = watch::channel(zone("alice"));
        let server =
            DnsServer::start("127.0.0.1:0".parse().unwrap(), zone, Some(silent.local_addr().unwrap())).await.unwrap();
        let refused = timeout(UPSTREAM_LIMIT * 2, by_tcp(server.address(), &ask("example.org."))).await.unwrap();
        assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
        let mut buffer = [0; 100];
        assert!(silent.try_recv(&mut buffer).is_ok(), "it was asked");
        server.stop().await;
    }
}
