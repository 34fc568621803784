//! Bulk data that both ends can make and check without sending it in advance.

use sha2::{Digest, Sha256};
use world::protocol::Payload;

/// Made and written at a time; a multiple of eight, so that the stream does not depend on it.
pub(crate) const CHUNK_BYTES: usize = 64 * 1024;

/// Makes a payload chunk by chunk.
pub(crate) struct Source<'a> {
    payload: &'a Payload,
    made: u64,
    state: u64,
}

impl<'a> Source<'a> {
    pub(crate) fn new(payload: &'a Payload) -> Self {
        // The state of the generator must not be zero.
        Self { payload, made: 0, state: payload.seed ^ 0x9e37_79b9_7f4a_7c15 }
    }

    /// The next bytes in the buffer, at most [`CHUNK_BYTES`]; none at the end.
    pub(crate) fn next<'b>(&mut self, buffer: &'b mut [u8]) -> &'b [u8] {
        let left = usize::try_from(self.payload.bytes - self.made).unwrap_or(usize::MAX);
        let length = left.min(CHUNK_BYTES);
        let chunk = &mut buffer[..length];
        if self.payload.needle.is_empty() {
            self.seeded(chunk);
        } else {
            self.repeated(chunk);
        }
        self.made += length as u64;
        chunk
    }

    /// Marsaglia's xorshift64: fast, and every byte counts for the checksum.
    fn seeded(&mut self, chunk: &mut [u8]) {
        for word in chunk.chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes()[..word.len()]);
        }
    }

    fn repeated(&self, chunk: &mut [u8]) {
        let needle = self.payload.needle.as_bytes();
        let length = needle.len() as u64;
        let offset = usize::try_from(self.made % length).expect("less than the needle's length");
        for (byte, from) in chunk.iter_mut().zip(needle.iter().cycle().skip(offset)) {
            *byte = *from;
        }
    }
}

/// SHA-256 of the whole payload.
pub(crate) fn digest(payload: &Payload) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut source = Source::new(payload);
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let chunk = source.next(&mut buffer);
        if chunk.is_empty() {
            return hash.finalize().into();
        }
        hash.update(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_repeated_over_the_border_of_chunks() {
        let payload = Payload::repeated(CHUNK_BYTES as u64 + 3, "abcdefg");
        let mut source = Source::new(&payload);
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut all = source.next(&mut buffer).to_vec();
        all.extend_from_slice(source.next(&mut buffer));
        assert!(all.chunks(7).all(|part| b"abcdefg".starts_with(part)));
        assert!(source.next(&mut buffer).is_empty());
    }

    #[test]
    fn two_seeds_give_two_streams() {
        assert_ne!(digest(&Payload::seeded(1000, 1)), digest(&Payload::seeded(1000, 2)));
    }
}
