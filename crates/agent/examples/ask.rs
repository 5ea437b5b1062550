//! Asks a guest's agent, through the socket of its port: `ask SOCKET [ping|set-clock|power-off|power-off-now]`.

use std::{
    error::Error,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clan_types::Timestamp;
use clan_wire::{
    agent::{AgentRequest, AgentResponse, MAX_MESSAGE},
    codec,
    mux::{Event, Mux, Role},
};

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().ok_or("which socket?")?;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let request = match args.next().as_deref() {
        None | Some("ping") => AgentRequest::Ping,
        Some("set-clock") => AgentRequest::SetClock(Timestamp::from_millis(u64::try_from(since_epoch.as_millis())?)),
        Some("power-off") => AgentRequest::PowerOff,
        Some("power-off-now") => AgentRequest::PowerOffNow,
        Some(other) => return Err(format!("cannot ask for {other}").into()),
    };
    let begin = Instant::now();
    let mut socket = UnixStream::connect(socket)?;
    let nonce = u64::from(since_epoch.subsec_nanos()) << 32 | u64::from(std::process::id());
    let mut mux = Mux::new(Role::Host, nonce, "ask", begin);
    let (mut buffer, mut answer) = (vec![0; 64 << 10], Vec::new());
    while begin.elapsed() < PATIENCE {
        mux.handle_timeout(Instant::now());
        while let Some(bytes) = mux.poll_transmit() {
            socket.write_all(&bytes)?;
        }
        socket.set_read_timeout(mux.next_timeout().map(|_| Duration::from_millis(100)))?;
        match socket.read(&mut buffer) {
            Ok(0) => return Err("the socket was closed".into()),
            Ok(count) => mux.handle_bytes(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
        while let Some(event) = mux.poll_event() {
            match event {
                Event::Started { .. } => {
                    let id = mux.open().ok_or("no stream")?;
                    mux.send(id, &codec::encode(&request, MAX_MESSAGE)?);
                }
                Event::Data(_, data) => answer.extend(data),
                Event::Fin(_) => {
                    let answer: AgentResponse = codec::decode(answer.get(codec::PREFIX..).unwrap_or_default())?;
                    writeln!(std::io::stdout(), "{answer:?} after {} ms", begin.elapsed().as_millis())?;
                    return Ok(());
                }
                Event::Reset(_) => return Err("the agent refused the request".into()),
                other => writeln!(std::io::stdout(), "{other:?}")?,
            }
        }
    }
    Err("no answer".into())
}
