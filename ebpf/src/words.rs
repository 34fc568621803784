//! Reads of a hook's context.
//!
//! The verifier allows one load at a fixed offset of the context pointer. Two reads that the compiler folds into one
//! through a computed pointer are refused ("dereference of modified ctx ptr"), so every field is read once, by a volatile
//! load of exactly its width.

use ebpf_abi::Address;

/// Reads one field of a context.
macro_rules! field {
    ($context:expr, $($field:tt)+) => {{
        // SAFETY: the kernel passes a valid context to the hook for as long as it runs, and the field is inside it.
        unsafe { core::ptr::read_volatile(&raw const (*$context).$($field)+) }
    }};
}

/// Reads the four words of an IPv6 address in a context, in network byte order.
macro_rules! address6 {
    ($context:expr, $($field:tt)+) => {
        $crate::words::v6([
            $crate::words::field!($context, $($field)+[0]),
            $crate::words::field!($context, $($field)+[1]),
            $crate::words::field!($context, $($field)+[2]),
            $crate::words::field!($context, $($field)+[3]),
        ])
    };
}

pub(crate) use {address6, field};

/// An IPv4 address from a word in network byte order.
#[inline(always)]
pub(crate) fn v4(word: u32) -> Address {
    Address::v4(word.to_ne_bytes())
}

/// An IPv6 address from words in network byte order.
#[inline(always)]
pub(crate) fn v6(words: [u32; 4]) -> Address {
    let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = words.map(u32::to_ne_bytes);
    Address([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
}

pub(crate) const AF_INET: u32 = 2;
