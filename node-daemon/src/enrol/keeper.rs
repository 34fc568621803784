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
    pub(super) async fn stop(mut self) {
        self.task.abort();
        // The task was cancelled; that is the one way in which it ends.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
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
    let mut reports = Reports { told, last: None, waiting: None };
    let mut next_look = Instant::now();
    loop {
        tokio::select! {
            noticed = notices.changed() => {
                if let Err(error) = noticed {
                    // Without notices the regular look remains.
                    reports.tell(Told::Failed { cookie, problem: format!("watching: {error}") }).await;
                    sleep_until(Instant::now() + LOOK_ANYWAY).await;
                }
            }
            changed = want.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = reports.due() => {
                reports.tell_waiting().await;
                continue;
            }
            () = sleep_until(Instant::now() + LOOK_ANYWAY) => {}
        }
        sleep_until(next_look).await;
        let wanted_changed = want.has_changed().unwrap_or(true);
        let wanted = want.borrow_and_update().clone();
        let settings = sysctl::apply(&namespace);
        let looked = routes::ensure(&namespace, &wanted).await;
        next_look = Instant::now() + LOOK_PAUSE;
        match settings {
            Ok(0) => {}
            Ok(_) => reports.tell(Told::Repaired { cookie, what: "settings" }).await,
            Err(error) => reports.tell(Told::Failed { cookie, problem: error.to_string() }).await,
        }
        match looked {
            Ok((changed, addresses)) => {
                let own_doing = wanted_changed || addresses != known;
                if addresses != known {
                    known.clone_from(&addresses);
                    reports.send(Told::Addresses { cookie, addresses }).await;
                }
                if changed.rules > 0 && !own_doing {
                    reports.tell(Told::Repaired { cookie, what: "rules" }).await;
                } else if changed.routes > 0 && !own_doing {
                    reports.tell(Told::Repaired { cookie, what: "routes" }).await;
                }
            }
            Err(error) => reports.tell(Told::Failed { cookie, problem: error.to_string() }).await,
        }
    }
}

/// Reports at a bounded rate: the first at once, then the latest of each pause.
struct Reports {
    told: mpsc::Sender<Told>,
    last: Option<Instant>,
    waiting: Option<Told>,
}

impl Reports {
    async fn tell(&mut self, what: Told) {
        self.waiting = Some(what);
        if self.last.is_none_or(|last| Instant::now() >= last + REPORT_PAUSE) {
            self.tell_waiting().await;
        }
    }

    async fn tell_waiting(&mut self) {
        if let Some(what) = self.waiting.take() {
            self.last = Some(Instant::now());
            self.send(what).await;
        }
    }

    /// Ends when a report that had to wait may be told; never where none waits.
    async fn due(&self) {
        match (&self.waiting, self.last) {
            (Some(_), Some(last)) => sleep_until(last + REPORT_PAUSE).await,
            _ => std::future::pending().await,
        }
    }

    async fn send(&self, what: Told) {
        // Where nobody listens any more the enrolment is ending.
        let _ = self.told.send(what).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_repairs_is_told_once_a_pause_and_its_last_is_not_lost() {
        let (told, mut heard) = mpsc::channel(64);
        let mut reports = Reports { told, last: None, waiting: None };
        for _ in 0..50 {
            reports.tell(Told::Repaired { cookie: 1, what: "rules" }).await;
        }
        reports.tell(Told::Failed { cookie: 1, problem: "the last".to_owned() }).await;
        assert!(matches!(heard.try_recv(), Ok(Told::Repaired { .. })));
        assert!(heard.try_recv().is_err(), "the rest waits");
        let before = Instant::now();
        reports.due().await;
        assert_eq!(Instant::now() - before, REPORT_PAUSE);
        reports.tell_waiting().await;
        assert!(matches!(heard.try_recv(), Ok(Told::Failed { .. })));
        assert!(heard.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_that_finds_no_room_waits_and_is_not_lost() {
        let (told, mut heard) = mpsc::channel(1);
        let reports = Reports { told, last: None, waiting: None };
        let addresses = |cookie| Told::Addresses { cookie, addresses: BTreeSet::new() };
        reports.send(addresses(1)).await;
        let mut waiting = Box::pin(reports.send(addresses(2)));
        assert!(tokio::time::timeout(REPORT_PAUSE, &mut waiting).await.is_err(), "its keeper waits");
        assert!(matches!(heard.recv().await, Some(Told::Addresses { cookie: 1, .. })));
        waiting.await;
        assert!(matches!(heard.recv().await, Some(Told::Addresses { cookie: 2, .. })));
    }
}
