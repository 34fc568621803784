//! How long to wait before the authority is asked again.

use std::time::Duration;

/// First wait, in seconds: short enough that a restart of the authority goes unnoticed.
const WAIT_SECONDS_MIN: f64 = 1.0;

/// Longest wait, in seconds: a thousand nodes then ask less than twenty times a second.
const WAIT_SECONDS_MAX: f64 = 60.0;

/// Decorrelated jitter: each wait is random between the shortest and three times the last.
#[derive(Debug)]
pub(super) struct Backoff {
    last: f64,
}

impl Backoff {
    pub(super) const fn new() -> Self {
        Self { last: WAIT_SECONDS_MIN }
    }

    pub(super) fn next(&mut self) -> Duration {
        let upper = (self.last * 3.0).clamp(WAIT_SECONDS_MIN * 1.5, WAIT_SECONDS_MAX);
        self.last = rand::random_range(WAIT_SECONDS_MIN..=upper);
        Duration::from_secs_f64(self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_from_a_second_to_a_minute_and_no_further() {
        let mut longest = Duration::ZERO;
        for _ in 0..50 {
            let mut backoff = Backoff::new();
            let first = backoff.next();
            assert!((1.0..=3.0).contains(&first.as_secs_f64()), "{first:?}");
            for _ in 0..50 {
                let wait = backoff.next();
                assert!((WAIT_SECONDS_MIN..=WAIT_SECONDS_MAX).contains(&wait.as_secs_f64()), "{wait:?}");
                longest = longest.max(wait);
            }
        }
        assert!(longest > Duration::from_secs(40), "{longest:?}");
    }
}
