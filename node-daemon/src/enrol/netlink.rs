//! Questions to the kernel about the interfaces, addresses, rules and routes of one namespace.

use std::{io, pin::pin};

use futures_util::{Stream, StreamExt};
use rtnetlink::Handle;
use tokio::task::JoinHandle;

use crate::sys::Namespace;

/// The kernel refused; `call` is what was asked of it.
pub(super) struct Failed {
    pub(super) call: &'static str,
    pub(super) source: io::Error,
}

impl Failed {
    pub(super) fn of(call: &'static str, error: rtnetlink::Error) -> Self {
        let source = if let rtnetlink::Error::NetlinkError(message) = &error {
            message.to_io()
        } else {
            io::Error::other(error.to_string())
        };
        Self { call, source }
    }
}

/// A connection to the kernel inside a namespace; closed, with its task, when dropped.
pub(super) struct Netlink {
    pub(super) handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Netlink {
    pub(super) fn open(namespace: &Namespace) -> Result<Self, Failed> {
        let (connection, handle, _) = namespace
            .visit(rtnetlink::new_connection_with_strict_check)
            .and_then(|opened| opened)
            .map_err(|source| Failed { call: "opening a netlink socket", source })?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }
}

/// All messages of a dump. A table or family that does not exist has none.
pub(super) async fn collect<T>(
    call: &'static str,
    messages: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, Failed> {
    let mut messages = pin!(messages);
    let mut collected = Vec::new();
    while let Some(message) = messages.next().await {
        match message {
            Ok(message) => collected.push(message),
            Err(rtnetlink::Error::NetlinkError(error))
                if matches!(
                    error.to_io().raw_os_error(),
                    Some(nix::libc::ENOENT | nix::libc::EAFNOSUPPORT | nix::libc::EOPNOTSUPP)
                ) =>
            {
                break;
            }
            Err(error) => return Err(Failed::of(call, error)),
        }
    }
    Ok(collected)
}
