//! The decisions of the kernel programs, as plain Rust: [`verdict`].
//!
//! What the hooks read and write stands in the binary of this package; what they decide stands here, where tests on the
//! host run it.
#![no_std]
#![forbid(unsafe_code)]

pub mod verdict;
