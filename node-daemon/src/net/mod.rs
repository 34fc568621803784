//! Plain sockets inside workloads' namespaces: [`listen`], [`mod@dial`], [`copy`].
//!
//! In: a namespace and addresses. Out: sockets, and bytes from one to the other. Knows nothing of identities, policy or TLS.

pub mod listen;

pub mod dial;

pub mod copy;

pub use copy::{Ended, Progress, Relayed, relay, reset};
pub use dial::{Dial, DialError, Style, dial};
pub use listen::{Listeners, open_listeners};

use std::{io, os::fd::BorrowedFd, sync::Arc};

/// Records on a socket that it is the daemon's own (T-2). Called for every socket before it connects or listens.
pub type Exemption = Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>;

/// Bytes of each of the kernel's buffers of a socket over loopback, and the congestion control there, may be set here once it
/// is measured that they pay: `None` leaves the kernel's own growth (128 KiB to 6 MiB).
const LOOPBACK_BUFFER_BYTES: Option<usize> = None;
