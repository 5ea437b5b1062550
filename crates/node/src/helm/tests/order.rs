//! Another image by an order: what the controller lets through to the manager, and what it writes down. The manager is played
//! here; what a real one makes of an order is tested there.

use clan_os::channel::{Channel, ChannelError, Stream};
use clan_types::ImageId;
use clan_wire::order::{Asks, MAX_ORDER, Order, Says};
use tokio::{io::DuplexStream, task::JoinHandle};

use super::*;

const OLD: ImageId = ImageId::from_bytes([6; 32]);
const NEW: ImageId = ImageId::from_bytes([7; 32]);
const CHALLENGE: [u8; 32] = [8; 32];

/// Bob's machine, as if it were a VM, and what connects it to a manager.
struct Guest {
    founder: Machine,
    bobs: Machine,
    helm: Arc<Helm>,
    manager: Channel,
    incoming: clan_os::channel::Incoming,
    _drivers: [JoinHandle<Result<(), ChannelError>>; 2],
    _guest: Channel,
}

impl Guest {
    async fn new(mode: ControlMode) -> Self {
        let (founder, bobs) = clan(mode).await;
        let helm = Helm::load(bobs.dir.path(), &Host::Guest, Possible::default(), bobs.id()).unwrap();
        let (here, there) = tokio::io::duplex(1 << 20);
        let cancel = CancellationToken::new();
        let (manager, driver) = Channel::host(here, "test", cancel.clone());
        let (guest, incoming, other) = Channel::guest(there, "test", cancel);
        let drivers = [tokio::spawn(driver), tokio::spawn(other)];
        manager.started().await.unwrap();
        Self { founder, bobs, helm: Arc::new(helm), manager, incoming, _drivers: drivers, _guest: guest }
    }

    /// A manager that waits for an order, and its end of the stream.
    async fn manager_waits(&mut self) -> Stream {
        let mut manager = self.manager.open().await.unwrap();
        // A stream is there for the other side once something is said on it.
        send_message(&mut manager, &0u8, 1).await.unwrap();
        let mut stream = self.incoming.accept().await.unwrap();
        recv_message::<u8, _>(&mut stream, 1).await.unwrap();
        self.helm.wait(stream);
        manager
    }

    /// Somebody's conversation with the machine, which goes on by itself.
    fn call(&self, caller: Caller, request: Request) -> DuplexStream {
        let (here, machine) = tokio::io::duplex(MAX_ANSWER);
        let (helm, core) = (self.helm.clone(), self.bobs.core.clone());
        tokio::spawn(async move {
            let (mut recv, mut send) = tokio::io::split(machine);
            let _ = helm.converse(&caller, request, &mut send, &mut recv, &core).await;
        });
        here
    }

    fn admin(&self) -> Caller {
        let device = DeviceId::from_bytes(key(FOUNDER).verifying_key().to_bytes());
        Caller::Member { person: person(FOUNDER), device, machine: self.founder.id() }
    }

    fn order(&self, image: ImageId, dry_run: bool) -> Order {
        Order { clan: self.bobs.core.view().clan, machine: self.bobs.id(), image, dry_run, challenge: CHALLENGE }
    }

    fn journal(&self) -> Vec<Deed> {
        self.helm.kept.borrow().journal().iter().map(|entry| entry.what.clone()).collect()
    }

    /// A whole order, of which the manager says in the end what it says. Whether it was told to begin.
    async fn ordered(&mut self, caller: Caller, request: Request, image: ImageId, says: Says) -> (Answer, bool) {
        let mut manager = self.manager_waits().await;
        let mut admin = self.call(caller, request.clone());
        let dry_run = matches!(request, Request::Update { dry_run: true, .. });
        let asks: Asks = recv_message(&mut manager, MAX_ORDER).await.unwrap();
        assert_eq!(asks, Asks::Order { image, dry_run });
        send_message(&mut manager, &Says::Sign(CHALLENGE), MAX_ORDER).await.unwrap();
        let sign: Answer = recv_message(&mut admin, MAX_ANSWER).await.unwrap();
        assert_eq!(sign, Answer::Sign { image, challenge: CHALLENGE });
        let order = self.order(image, dry_run);
        send_message(&mut admin, &order.sign(&key(FOUNDER)), MAX_CALL).await.unwrap();
        let Asks::Signed(proof) = recv_message(&mut manager, MAX_ORDER).await.unwrap() else { panic!("unsigned") };
        assert!(order.is_signed(&proof));
        let before = self.journal();
        send_message(&mut manager, &says, MAX_ORDER).await.unwrap();
        let noted = matches!(recv_message::<Asks, _>(&mut manager, MAX_ORDER).await, Ok(Asks::Noted));
        if noted {
            let kept = std::fs::read_to_string(&self.helm.path).unwrap();
            assert!(kept.contains(&image.to_string()), "who it was is on disk before it begins: {kept}");
            assert_eq!(self.journal().len(), before.len() + 1);
        } else {
            assert_eq!(self.journal(), before);
        }
        drop(manager);
        let answer = timeout(LIMIT, recv_message(&mut admin, MAX_ANSWER)).await.unwrap().unwrap();
        (answer, noted)
    }
}

fn update(dry_run: bool) -> Request {
    Request::Update { image: NEW, dry_run }
}

#[tokio::test]
async fn another_image_is_written_down_before_it_comes_and_is_taken_back_from_either_side() {
    let mut guest = Guest::new(ControlMode::Shared).await;
    let admin = guest.admin();
    let accepted = |before| Says::Accepted { before };
    let (seen, noted) = guest.ordered(admin.clone(), update(true), NEW, accepted(OLD)).await;
    assert!(matches!(seen, Answer::Done(_)) && !noted, "looking changes nothing: {seen:?}");

    let (done, noted) = guest.ordered(admin.clone(), update(false), NEW, accepted(OLD)).await;
    let Answer::Done(entry) = done else { panic!("{done:?}") };
    assert!(noted);
    assert_eq!(entry.what, Deed::Image { before: OLD, after: NEW, reverts: None });
    assert_eq!((entry.by.name.unwrap().as_str(), entry.by.here), ("ada", false));

    // Bob takes it back, at his own computer, but not what went back by itself.
    let revert = Request::Revert { number: entry.number, dry_run: false };
    let (stale, noted) = guest.ordered(Caller::Here, revert.clone(), OLD, accepted(OLD)).await;
    assert_eq!(stale, Answer::Refused(Refusal::Stale { number: entry.number, now: OLD.short() }));
    assert!(!noted);
    let (back, noted) = guest.ordered(Caller::Here, revert, OLD, accepted(NEW)).await;
    let Answer::Done(back) = back else { panic!("{back:?}") };
    assert!(noted && back.by.here);
    assert_eq!(back.what, Deed::Image { before: NEW, after: OLD, reverts: Some(entry.number) });
}

#[tokio::test]
async fn what_the_manager_refuses_is_not_done() {
    let mut guest = Guest::new(ControlMode::Shared).await;
    let refusal = Refusal::NotPublished { image: NEW };
    for (says, expected) in
        [(Says::Refused(refusal.clone()), Answer::Refused(refusal.clone())), (Says::Unchanged, Answer::Unchanged)]
    {
        let (answer, noted) = guest.ordered(guest.admin(), update(false), NEW, says).await;
        assert_eq!(answer, expected);
        assert!(!noted);
    }
}

#[tokio::test]
async fn nobody_who_may_not_gets_through_to_the_manager() {
    let mut guest = Guest::new(ControlMode::Local).await;
    let member = Caller::Member {
        person: person(BOB),
        device: DeviceId::from_bytes(key(BOB).verifying_key().to_bytes()),
        machine: guest.bobs.id(),
    };
    let mut manager = guest.manager_waits().await;
    for (mode, caller, refusal) in [
        (ControlMode::Local, guest.admin(), Refusal::Local),
        (ControlMode::Shared, member, Refusal::NotAdmin),
        (ControlMode::Remote, Caller::Here, Refusal::Remote),
    ] {
        guest.helm.set_mode(mode, &guest.bobs.core).unwrap();
        let mut call = guest.call(caller, update(false));
        let answer: Answer = recv_message(&mut call, MAX_ANSWER).await.unwrap();
        assert_eq!(answer, Answer::Refused(refusal));
    }
    assert!(recv_message::<Asks, _>(&mut manager, MAX_ORDER).now_or_never().is_none(), "the manager was asked");
    // A computer itself has no image.
    let answer = ask(&guest.founder, &guest.bobs, FOUNDER, update(false)).await;
    assert_eq!(answer, Answer::Refused(Refusal::Local));
    guest.bobs.helm.set_mode(ControlMode::Shared, &guest.bobs.core).unwrap();
    let answer = ask(&guest.founder, &guest.bobs, FOUNDER, update(false)).await;
    assert_eq!(answer, Answer::Refused(Refusal::NoImage));
}
