use std::sync::atomic::{AtomicUsize, Ordering};

use node_core::rotation::{RENEW_FRACTION_MAX, RENEW_FRACTION_MIN};
use tokio::sync::Semaphore;

use super::*;
use crate::certs::{
    key::Request,
    testing::{Ca, Shape, identity, own_domain},
};

/// The wall clock, moved with tokio's paused one.
fn wall() -> SystemTime {
    SystemTime::now() + Instant::now().into_std().saturating_duration_since(std::time::Instant::now())
}

const LIFETIME: Duration = Duration::from_secs(3_600);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Good,
    Away,
    /// Answers for somebody else.
    Confused,
    /// Its clock is a day behind.
    Late,
}

struct Fake {
    ca: Ca,
    mood: Mutex<Mood>,
    asked: Mutex<Vec<(Instant, SpiffeId)>>,
    /// Requests that may be answered.
    answers: Semaphore,
    under_way: AtomicUsize,
    peak: AtomicUsize,
}

impl Fake {
    fn asked(&self, account: &str) -> Vec<Instant> {
        let asked = self.asked.lock().expect("no panic");
        asked.iter().filter(|(_, id)| *id == identity(account)).map(|(at, _)| *at).collect()
    }

    fn now(&self, mood: Mood) {
        *self.mood.lock().expect("no panic") = mood;
    }
}

impl Authority for Fake {
    async fn create(
        &self,
        identity: &SpiffeId,
        request: Request,
    ) -> Result<Vec<CertificateDer<'static>>, AuthorityFailed> {
        self.asked.lock().expect("no panic").push((Instant::now(), identity.clone()));
        let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(under_way, Ordering::SeqCst);
        self.answers.acquire().await.expect("never closed").forget();
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        let ahead = wall().duration_since(SystemTime::now()).unwrap_or_default().as_secs().cast_signed();
        let mut shape = Shape::good(&identity.to_string());
        // Dated back by two minutes, as authorities do.
        (shape.begins, shape.ends) = (ahead - 120, ahead + LIFETIME.as_secs().cast_signed());
        match *self.mood.lock().expect("no panic") {
            Mood::Good => {}
            Mood::Away => return Err(AuthorityFailed::Unreachable("nobody there".to_owned())),
            Mood::Confused => shape.uris = vec![super::super::testing::identity("somebody").to_string()],
            Mood::Late => (shape.begins, shape.ends) = (ahead - 86_400, ahead - 82_800),
        }
        Ok(self.ca.answer(&request, &shape))
    }
}

struct World {
    authority: Arc<Fake>,
    store: Arc<Store>,
    wanted: watch::Sender<Wanted>,
    views: Views,
    _task: JoinSet<()>,
}

impl World {
    fn new(accounts: &[&str], mood: Mood, answers: usize) -> Self {
        let authority = Arc::new(Fake {
            ca: Ca::new("mesh"),
            mood: Mutex::new(mood),
            asked: Mutex::default(),
            answers: Semaphore::new(answers),
            under_way: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        });
        let store = Arc::new(Store::with_clock(own_domain(), wall));
        let (wanted, receiver) = watch::channel(want(accounts));
        let views = Views::default();
        let rotator = Rotator {
            authority: Arc::clone(&authority),
            store: Arc::clone(&store),
            wanted: receiver,
            events: Sink::new(),
            views: Arc::clone(&views),
            wall,
        };
        let mut task = JoinSet::new();
        task.spawn(rotator.run());
        Self { authority, store, wanted, views, _task: task }
    }

    fn view(&self, account: &str) -> CertificateView {
        self.views.lock().expect("no panic").get(&identity(account)).cloned().expect("it is wanted")
    }
}

fn want(accounts: &[&str]) -> Wanted {
    Wanted { identities: accounts.iter().map(|account| identity(account)).collect(), aliases: Vec::new() }
}

async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn a_cold_start_asks_for_eight_at_a_time() {
    let accounts: Vec<String> = (0..20).map(|i| format!("account-{i}")).collect();
    let accounts: Vec<&str> = accounts.iter().map(String::as_str).collect();
    let world = World::new(&accounts, Mood::Good, 0);
    pass(1).await;
    assert_eq!(world.authority.under_way.load(Ordering::SeqCst), REQUESTS_AT_ONCE_MAX);
    world.authority.answers.add_permits(100);
    pass(1).await;
    assert_eq!(world.store.all().len(), 20);
    assert_eq!(world.authority.peak.load(Ordering::SeqCst), REQUESTS_AT_ONCE_MAX);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_once_between_45_and_60_percent_of_its_life() {
    let world = World::new(&["backend"], Mood::Good, 100);
    pass(1).await;
    let first = world.store.credentials(&identity("backend")).expect("issued");
    pass(LIFETIME.as_secs() * 60 / 100 + 1).await;
    let asked = world.authority.asked("backend");
    assert_eq!(asked.len(), 2, "dated back as it is, it is renewed once");
    let share = (asked[1] - asked[0]).as_secs_f64() / LIFETIME.as_secs_f64();
    assert!((RENEW_FRACTION_MIN - 0.01..=RENEW_FRACTION_MAX + 0.01).contains(&share), "{share}");
    let second = world.store.credentials(&identity("backend")).expect("renewed");
    assert!(second.generation() > first.generation());
    assert_ne!(second.serial(), first.serial());
    assert_eq!(world.view("backend").renewals, 1);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_away_at_a_renewal_harms_nobody_until_the_certificate_ends() {
    let world = World::new(&["backend"], Mood::Good, 10_000);
    pass(1).await;
    let first = world.store.credentials(&identity("backend")).expect("issued");
    world.authority.now(Mood::Away);
    pass(LIFETIME.as_secs() * 95 / 100).await;
    let still = world.store.credentials(&identity("backend")).expect("the old one serves");
    assert_eq!(still.serial(), first.serial());
    let view = world.view("backend");
    assert!(view.failures > 5 && view.last_problem.is_some_and(|problem| problem.contains("nobody there")));
    pass(LIFETIME.as_secs() * 6 / 100).await;
    assert!(world.store.credentials(&identity("backend")).is_none(), "an ended one does not");
    let attempts = world.authority.asked("backend").len();
    pass(600).await;
    let more = world.authority.asked("backend").len() - attempts;
    assert!((8..=600).contains(&more), "{more} attempts in ten minutes");
    world.authority.now(Mood::Good);
    pass(61).await;
    assert!(world.store.credentials(&identity("backend")).is_some());
    assert_eq!(world.view("backend").last_problem, None);
}

#[tokio::test(start_paused = true)]
async fn an_authority_that_is_away_at_the_start_is_found_within_a_minute_of_its_return() {
    let world = World::new(&["backend"], Mood::Away, 10_000);
    pass(1_000).await;
    let attempts = world.authority.asked("backend").len();
    assert!((10..=400).contains(&attempts), "{attempts} attempts");
    world.authority.now(Mood::Good);
    pass(61).await;
    assert!(world.store.credentials(&identity("backend")).is_some());
}

#[tokio::test(start_paused = true)]
async fn answers_that_cannot_be_used_are_put_off_and_not_asked_for_in_a_loop() {
    for mood in [Mood::Confused, Mood::Late] {
        let world = World::new(&["backend"], mood, 10_000);
        pass(60).await;
        assert!(world.store.credentials(&identity("backend")).is_none());
        let attempts = world.authority.asked("backend").len();
        assert!((2..=60).contains(&attempts), "{attempts} attempts in a minute");
        assert!(world.view("backend").last_problem.is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn an_identity_that_is_wanted_no_more_is_forgotten_even_if_its_answer_comes_late() {
    let world = World::new(&["backend", "frontend"], Mood::Good, 0);
    pass(1).await;
    world.wanted.send_replace(want(&["frontend"]));
    pass(1).await;
    world.authority.answers.add_permits(10);
    pass(1).await;
    assert!(world.store.credentials(&identity("frontend")).is_some());
    assert!(world.store.credentials(&identity("backend")).is_none());
    world.wanted.send_replace(want(&[]));
    pass(1).await;
    assert_eq!(world.store.all().len(), 0);
    assert!(world.views.lock().expect("no panic").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_new_workload_goes_before_routine_renewals() {
    let mut due = [
        (Urgency::Routine, identity("a")),
        (Urgency::New, identity("z")),
        (Urgency::NearExpiry, identity("m")),
    ];
    due.sort();
    assert_eq!(due.map(|(_, id)| id), [identity("z"), identity("m"), identity("a")]);
    let now = wall();
    let at = |issued: u64, ends: u64| {
        Rotation::issued(now - Duration::from_secs(issued), now + Duration::from_secs(ends), 0)
    };
    assert_eq!(urgency(&at(500, 500), now), Urgency::Routine);
    assert_eq!(urgency(&at(800, 200), now), Urgency::NearExpiry);
}
