//! Signatures that were checked and are good: the same token comes again with every request, and a signature costs more
//! than all the rest of the request.
//!
//! Each thread remembers its own, so that nobody waits for a lock. Only good ones are remembered, under a digest that
//! covers all that was checked and the number of the key set; a set that is replaced takes its memory with it. What a
//! token says of time is checked each time anew, and not here.

use std::{cell::RefCell, collections::HashSet};

use aws_lc_rs::digest::{Context, SHA256};
use node_core::policy::tokens::Algorithm;

/// Digests that one thread remembers, twice at most: 32 bytes each. At the limit those that were not seen since the last
/// time are forgotten.
const SEEN_MAX: usize = 8_192;

pub(super) type Digest = [u8; 32];

#[derive(Default)]
struct Seen {
    recent: HashSet<Digest>,
    older: HashSet<Digest>,
}

thread_local! {
    static SEEN: RefCell<Seen> = RefCell::default();
}

pub(super) fn digest(
    number: u64,
    algorithm: Algorithm,
    kid: Option<&str>,
    signed: &[u8],
    signature: &[u8],
) -> Digest {
    let mut context = Context::new(&SHA256);
    context.update(&number.to_be_bytes());
    context.update(algorithm.name().as_bytes());
    let kid = kid.unwrap_or_default();
    for part in [kid.as_bytes(), signed, signature] {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

pub(super) fn contains(digest: &Digest) -> bool {
    SEEN.with_borrow_mut(|seen| {
        let is_older = || seen.older.contains(digest);
        let is_known = seen.recent.contains(digest);
        if !is_known && is_older() {
            seen.insert(*digest);
            return true;
        }
        is_known
    })
}

pub(super) fn insert(digest: Digest) {
    SEEN.with_borrow_mut(|seen| seen.insert(digest));
}

impl Seen {
    fn insert(&mut self, digest: Digest) {
        if self.recent.len() >= SEEN_MAX {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_piece_of_what_was_checked_can_be_another() {
        let one = digest(1, Algorithm::Rs256, Some("a"), b"bc", b"d");
        for other in [
            digest(2, Algorithm::Rs256, Some("a"), b"bc", b"d"),
            digest(1, Algorithm::Rs384, Some("a"), b"bc", b"d"),
            digest(1, Algorithm::Rs256, Some("ab"), b"c", b"d"),
            digest(1, Algorithm::Rs256, Some("a"), b"b", b"cd"),
            digest(1, Algorithm::Rs256, None, b"abc", b"d"),
        ] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn the_memory_is_bounded_and_keeps_what_is_used() {
        let kept = [1; 32];
        insert(kept);
        for number in 0..SEEN_MAX * 5 {
            insert(digest(number as u64, Algorithm::Es256, None, b"", b""));
            assert!(contains(&kept));
        }
        SEEN.with_borrow(|seen| assert!(seen.recent.len() + seen.older.len() <= 2 * SEEN_MAX));
        assert!(!contains(&digest(0, Algorithm::Es256, None, b"", b"")));
    }
}
