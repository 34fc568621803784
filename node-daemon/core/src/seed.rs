//! Numbers from a seed that the caller drew: the core has no randomness of its own.

/// Values that a fraction can take: as many as an `f64` holds exactly.
const FRACTION_STEPS: u64 = 1 << 53;

/// Spreads neighbouring seeds over all 64 bits (the output function of SplitMix64).
pub(crate) fn mix(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A number from 0 to below 1; another one for each `turn`.
#[expect(clippy::cast_precision_loss, reason = "both numbers are at most 2^53")]
pub(crate) fn fraction(seed: u64, turn: u32) -> f64 {
    let mixed = mix(seed ^ mix(u64::from(turn)));
    (mixed % FRACTION_STEPS) as f64 / FRACTION_STEPS as f64
}

/// An index below `length`, which is not 0.
pub(crate) fn index(seed: u64, length: usize) -> usize {
    let length = u64::try_from(length).unwrap_or(u64::MAX);
    usize::try_from(mix(seed) % length).unwrap_or_default()
}
