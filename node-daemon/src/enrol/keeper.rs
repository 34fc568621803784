//! Keeps rules, routes and settings of one namespace as they should be, for as long as something in it is enrolled (T-5).
//!
//! One task a namespace, so that one whose workload deletes rules for fun holds up no other.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{
    routes::{self, Want},
    sysctl,
};
use crate::sys::{Namespace, Watch};

/// Least time between two looks at one namespace. Reckoning: a look takes 0.3 ms, so whoever changes rules without end costs the
/// node 2 % of one CPU. The first look comes at once.
const LOOK_PAUSE: Duration = Duration::from_millis(15);

/// A look without any notice, for what the kernel does not announce (settings) and for notices that were lost.
const LOOK_ANYWAY: Duration = Duration::from_secs(5);

/// Least time between two reports of repairs, or of failures, of one namespace. At the limit the repair is made and not told.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// What a keeper tells.
#[derive(Debug)]
pub(super) enum Told {
    /// The addresses of the namespace are these, loopback left out.
    Addresses { cookie: u64, addresses: BTreeSet<IpAddr> },
    /// Somebody had changed something; it stands again.
    Repaired { cookie: u64, what: &'static str },
    /// It could not be brought to what it should be; it is tried again.
    Failed { cookie: u64, problem: String },
}

/// The task, and what it should keep.
#[derive(Debug)]
pub(super) struct Keeper {
    want: watch::Sender<Want>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Begins to keep what `first` pass has made: `watch` was opened before that pass.
    pub(super) fn start(
        namespace: Arc<Namespace>,
        watch: Watch,
        want: Want,
        addresses: BTreeSet<IpAddr>,
        told: mpsc::Sender<Told>,
    ) -> Self {
        let (sender, receiver) = watch::channel(want);
        let task = tokio::spawn(keep(namespace, watch, receiver, addresses, told));
        Self { want: sender, task }
    }

    /// Changes what is kept.
    pub(super) fn want(&self, want: Want) {
        self.want.send_if_modified(|current| {
            let changed = *current != want;
            *current = want;
            changed
        });
    }

    /// Stops keeping, changes nothing, and closes what the task held of the namespace.
    pub(super) async fn stop(self) {
        self.task.abort();
        // The task was cancelled; that is the one way in which it ends.
        let _ = self.task.await;
    }
}

async fn keep(
    namespace: Arc<Namespace>,
    notices: Watch,
    mut want: watch::Receiver<Want>,
    mut known: BTreeSet<IpAddr>,
    told: mpsc::Sender<Told>,
) {
    let cookie = namespace.cookie();
    let mut last_report: Option<Instant> = None;
    let mut next_look = Instant::now();
    loop {
        let mut wanted_changed = false;
        tokio::select! {
            noticed = notices.changed() => {
                if let Err(error) = noticed {
                    // Without notices the regular look remains.
                    tell(&told, &mut last_report, Told::Failed { cookie, problem: format!("watching: {error}") }).await;
                    sleep_until(Instant::now() + LOOK_ANYWAY).await;
                }
            }
            changed = want.changed() => {
                if changed.is_err() {
                    return;
                }
                wanted_changed = true;
            }
            () = sleep_until(Instant::now() + LOOK_ANYWAY) => {}
        }
        sleep_until(next_look).await;
        let wanted = want.borrow_and_update().clone();
        let settings = sysctl::apply(&namespace);
        let looked = routes::ensure(&namespace, &wanted).await;
        next_look = Instant::now() + LOOK_PAUSE;
        match settings {
            Ok(0) => {}
            Ok(_) => tell(&told, &mut last_report, Told::Repaired { cookie, what: "settings" }).await,
            Err(error) => {
                tell(&told, &mut last_report, Told::Failed { cookie, problem: error.to_string() }).await;
            }
        }
        match looked {
            Ok((changed, addresses)) => {
                let own_doing = wanted_changed || addresses != known;
                if addresses != known {
                    known.clone_from(&addresses);
                    if told.send(Told::Addresses { cookie, addresses }).await.is_err() {
                        return;
                    }
                }
                if changed.rules > 0 {
                    tell(&told, &mut last_report, Told::Repaired { cookie, what: "rules" }).await;
                } else if changed.routes > 0 && !own_doing {
                    tell(&told, &mut last_report, Told::Repaired { cookie, what: "routes" }).await;
                }
            }
            Err(error) => {
                tell(&told, &mut last_report, Told::Failed { cookie, problem: error.to_string() }).await;
            }
        }
    }
}

async fn tell(told: &mpsc::Sender<Told>, last_report: &mut Option<Instant>, what: Told) {
    let now = Instant::now();
    if last_report.is_some_and(|last| now < last + REPORT_PAUSE) {
        return;
    }
    *last_report = Some(now);
    // Nobody listens any more: the enrolment is ending.
    let _ = told.send(what).await;
}
