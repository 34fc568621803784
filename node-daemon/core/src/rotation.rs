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

/// After so many failures the pause is at its maximum whatever the seed.
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
