//! Notices that something changed in a namespace's network configuration, not what: the kernel's messages are counted as one
//! and thrown away, so a flood of them costs neither memory nor order.

use std::{
    io::{self, Read},
    os::fd::AsRawFd,
};

use nix::{
    libc,
    sys::socket::{NetlinkAddr, bind},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;

use super::Namespace;

/// Groups of linux/rtnetlink.h: links, addresses, routes and rules of both families.
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];

/// Bytes of one message that are looked at, which is none of them: the rest is thrown away by the kernel.
const READ_BYTES: usize = 512;

/// Messages taken at once. At the limit the rest waits until the namespace was looked at.
const MESSAGES_AT_ONCE: usize = 4_096;

/// A watch on one namespace. It keeps the namespace alive: drop it when the enrolment ends.
#[derive(Debug)]
pub struct Watch {
    socket: AsyncFd<Socket>,
}

impl Watch {
    /// Opens it inside `namespace`. Everything that changes after this is noticed. To be called in a tokio runtime.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.visit(|| -> io::Result<Socket> {
            let socket = Socket::new(
                Domain::from(libc::AF_NETLINK),
                Type::DGRAM.nonblocking(),
                Some(Protocol::from(libc::NETLINK_ROUTE)),
            )?;
            let groups = GROUPS.into_iter().fold(0, |mask, group| mask | 1_u32 << (group - 1));
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
            Ok(socket)
        })??;
        Self::over(socket)
    }

    fn over(socket: Socket) -> io::Result<Self> {
        // SAFETY: a `Socket` owns its descriptor and always answers with the same one; it is moved in here and nobody takes it
        // out, so the descriptor stays open for as long as the registration.
        let socket = unsafe { AsyncFd::register(socket) }?;
        Ok(Self { socket })
    }

    /// Waits until something changed. Cancel-safe.
    pub async fn changed(&self) -> io::Result<()> {
        self.changed_within(MESSAGES_AT_ONCE).await
    }

    async fn changed_within(&self, messages_max: usize) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        let mut buffer = [0; READ_BYTES];
        for _ in 0..messages_max {
            match ready.try_io(|socket| socket.get_ref().read(&mut buffer)) {
                // Nothing more is there.
                Err(_) => break,
                Ok(Ok(_)) => {}
                // Messages were lost, so something changed.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A watch on what the other end sends.
    fn watched() -> (Watch, Socket) {
        let (watched, sender) = Socket::pair(Domain::UNIX, Type::DGRAM.nonblocking(), None).expect("a pair");
        (Watch::over(watched).expect("registered"), sender)
    }

    async fn is_quiet(watch: &Watch) -> bool {
        tokio::time::timeout(Duration::from_millis(1), watch.changed()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_taken_in_portions_and_the_rest_waits() {
        let (watch, sender) = watched();
        for _ in 0..7 {
            sender.send(b"changed").expect("room");
        }
        for portion in 1..=3 {
            watch.changed_within(3).await.unwrap_or_else(|error| panic!("portion {portion}: {error}"));
        }
        assert!(is_quiet(&watch).await, "seven are three portions of at most three");
        sender.send(b"changed").expect("room");
        watch.changed_within(3).await.expect("noticed");
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_long_message_the_rest_is_thrown_away() {
        let (watch, sender) = watched();
        sender.send(&[7; 8 * READ_BYTES]).expect("room");
        watch.changed_within(2).await.expect("noticed");
        assert!(is_quiet(&watch).await, "it was one message");
    }
}
