//! When a certificate is renewed: at a random point of its life, and after a failure with growing, jittered pauses.
//!
//! The caller passes the time and a seed per certificate; the old certificate serves until it expires.

use std::time::{Duration, SystemTime};

use crate::seed::fraction;

/// Renewal begins in this window of the lifetime, uniformly (DESIGN 3.5.4): a fleet that started together spreads out,
/// and 40 % of the life is left to find the authority again.
pub const RENEW_FRACTION_MIN: f64 = 0.45;
pub const RENEW_FRACTION_MAX: f64 = 0.60;

/// Shortest pause after a failed renewal.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);

/// Longest pause after a failed renewal: an authority that returns is found within a minute.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// A pause takes at most this part of the life that is left.
pub const BACKOFF_REMAINING_DIVISOR: u32 = 8;

/// No pause is shorter, however little life is left: 4 requests a second per certificate at worst.
pub const BACKOFF_FLOOR: Duration = Duration::from_millis(250);

/// How much the pause may grow from one failure to the next.
const BACKOFF_GROWTH: f64 = 3.0;

/// Failures that are counted: their steps are added up anew each time. After more, the pause stays as it was.
const FAILURES_COUNTED_MAX: u32 = 64;

/// The state of one certificate's renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    pub issued_at: SystemTime,
    pub not_after: SystemTime,
    /// Failed attempts since the last success.
    pub failures: u32,
    /// When the last of them ended; `None` without failures.
    pub failed_at: Option<SystemTime>,
    /// Random per certificate.
    pub seed: u64,
}

/// What to do about a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Renew at once.
    Renew,
    /// Nothing before this time.
    WaitUntil(SystemTime),
    /// It no longer serves; renewal is tried at once and on, by [`Rotation::retry_at`].
    Expired,
}

impl Rotation {
    pub fn issued(issued_at: SystemTime, not_after: SystemTime, seed: u64) -> Self {
        Self { issued_at, not_after, failures: 0, failed_at: None, seed }
    }

    /// One attempt more has failed.
    pub fn failed(self, now: SystemTime) -> Self {
        Self { failures: self.failures.saturating_add(1), failed_at: Some(now), ..self }
    }

    pub fn next(&self, now: SystemTime) -> Next {
        if self.not_after <= now {
            return Next::Expired;
        }
        let due = self.retry_at().unwrap_or_else(|| self.renew_at());
        if due <= now { Next::Renew } else { Next::WaitUntil(due) }
    }

    /// When the renewal begins: 45 to 60 % of the lifetime, by the seed.
    pub fn renew_at(&self) -> SystemTime {
        let lifetime = self.not_after.duration_since(self.issued_at).unwrap_or_default();
        let window = RENEW_FRACTION_MAX - RENEW_FRACTION_MIN;
        self.issued_at + lifetime.mul_f64(RENEW_FRACTION_MIN + window * fraction(self.seed, 0))
    }

    /// When to try again after a failure; `None` without one.
    pub fn retry_at(&self) -> Option<SystemTime> {
        let failed_at = self.failed_at.filter(|_| self.failures > 0)?;
        let remaining = self.not_after.duration_since(failed_at).unwrap_or_default();
        let pause = if remaining.is_zero() {
            self.backoff()
        } else {
            self.backoff().min(remaining / BACKOFF_REMAINING_DIVISOR)
        };
        Some(failed_at + pause.max(BACKOFF_FLOOR))
    }

    /// Decorrelated jitter: each pause is uniform between the minimum and three times the one before.
    fn backoff(&self) -> Duration {
        let step = |pause: Duration, attempt: u32| {
            let high = pause.mul_f64(BACKOFF_GROWTH).min(BACKOFF_MAX);
            BACKOFF_MIN + (high - BACKOFF_MIN).mul_f64(fraction(self.seed, attempt))
        };
        (1..=self.failures.min(FAILURES_COUNTED_MAX)).fold(BACKOFF_MIN, step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn after(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    fn fresh(seed: u64) -> Rotation {
        Rotation::issued(after(0), after(0) + HOUR, seed)
    }

    fn pause(rotation: &Rotation) -> Duration {
        let (failed_at, retry_at) = (rotation.failed_at.expect("it failed"), rotation.retry_at());
        retry_at.expect("it failed").duration_since(failed_at).expect("later")
    }

    #[test]
    fn renewal_is_spread_over_45_to_60_percent_of_the_life() {
        let parts: Vec<f64> = (0..2000)
            .map(|seed| {
                fresh(seed).renew_at().duration_since(after(0)).expect("later").as_secs_f64() / 3600.0
            })
            .collect();
        assert!(parts.iter().all(|part| (RENEW_FRACTION_MIN..=RENEW_FRACTION_MAX).contains(part)));
        // Uniform: each fifth of the window gets about a fifth.
        for fifth in 0..5 {
            let from = 0.45 + 0.03 * f64::from(fifth);
            let count = parts.iter().filter(|part| (from..from + 0.03).contains(*part)).count();
            assert!((320..480).contains(&count), "fifth {fifth}: {count}");
        }
    }

    #[test]
    fn it_waits_renews_and_expires_in_this_order() {
        let rotation = fresh(42);
        let due = rotation.renew_at();
        assert_eq!(rotation.next(after(0)), Next::WaitUntil(due));
        assert_eq!(rotation.next(after(1619)), Next::WaitUntil(due), "not before 45 %");
        assert_eq!(rotation.next(due), Next::Renew);
        assert_eq!(rotation.next(after(3599)), Next::Renew);
        assert_eq!(rotation.next(after(3600)), Next::Expired);
        assert_eq!(rotation.next(after(1_000_000)), Next::Expired);
    }

    #[test]
    fn a_clock_before_the_issue_waits() {
        let rotation = fresh(1);
        assert_eq!(rotation.next(SystemTime::UNIX_EPOCH), Next::WaitUntil(rotation.renew_at()));
    }

    #[test]
    fn a_certificate_without_a_life_has_expired() {
        let rotation = Rotation::issued(after(10), after(5), 1);
        assert_eq!(rotation.next(after(10)), Next::Expired);
    }

    #[test]
    fn pauses_begin_between_1_and_3_seconds_and_end_between_1_and_60() {
        for seed in 0..500 {
            let mut rotation = fresh(seed).failed(after(1700));
            assert!((BACKOFF_MIN..=3 * BACKOFF_MIN).contains(&pause(&rotation)), "{seed}");
            let mut before = pause(&rotation);
            for _ in 0..100 {
                rotation = rotation.failed(after(1700));
                let next = pause(&rotation);
                assert!((BACKOFF_MIN..=BACKOFF_MAX).contains(&next), "{seed}: {next:?}");
                assert!(next <= before * 3 + Duration::from_millis(1), "{seed}: {before:?} {next:?}");
                before = next;
                if rotation.failures == FAILURES_COUNTED_MAX {
                    break;
                }
            }
        }
    }

    #[test]
    fn after_as_many_failures_as_are_counted_the_pause_stays() {
        for seed in 0..100 {
            let of = |failures| pause(&Rotation { failures, ..fresh(seed) }.failed(after(1700)));
            let last = of(FAILURES_COUNTED_MAX - 1);
            assert_ne!(of(FAILURES_COUNTED_MAX - 2), last, "{seed}: the last one counts");
            for more in [FAILURES_COUNTED_MAX, FAILURES_COUNTED_MAX + 1, 100_000] {
                assert_eq!(of(more), last, "{seed}");
            }
        }
    }

    #[test]
    fn pauses_differ_between_certificates() {
        let pauses: std::collections::BTreeSet<Duration> =
            (0..100).map(|seed| pause(&fresh(seed).failed(after(1700)))).collect();
        assert!(pauses.len() > 95, "{}", pauses.len());
    }

    #[test]
    fn a_pause_counts_from_the_failure() {
        let rotation = fresh(3).failed(after(1700)).failed(after(2000));
        let due = rotation.retry_at().expect("it failed");
        assert!(due >= after(2001));
        assert_eq!(rotation.next(after(2000)), Next::WaitUntil(due));
        assert_eq!(rotation.next(due), Next::Renew);
    }

    #[test]
    fn a_pause_is_at_most_an_eighth_of_what_is_left() {
        for seed in 0..200 {
            let mut rotation = fresh(seed);
            for _ in 0..20 {
                rotation = rotation.failed(after(3560));
            }
            assert!(pause(&rotation) <= Duration::from_secs(5), "{seed}");
            let last = rotation.failed(after(3599));
            assert_eq!(pause(&last), BACKOFF_FLOOR, "{seed}");
        }
    }

    #[test]
    fn after_expiry_the_pauses_go_on() {
        let rotation = fresh(9).failed(after(4000));
        assert_eq!(rotation.next(after(4000)), Next::Expired);
        assert!((BACKOFF_MIN..=BACKOFF_MAX).contains(&pause(&rotation)));
    }

    #[test]
    fn endless_failures_do_not_overflow() {
        let rotation = Rotation { failures: u32::MAX, ..fresh(9) }.failed(after(1700));
        assert_eq!(rotation.failures, u32::MAX);
        assert!(pause(&rotation) <= BACKOFF_MAX);
    }
}
