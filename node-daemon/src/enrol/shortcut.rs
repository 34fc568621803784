//! The shortcut past the host's network stack: which pods get one, and what is cleared away behind its connections.
//!
//! The host's connection tracking sees the handshake of a connection and nothing after that, so its entry goes when the
//! connection ends: what opens with the same ports later would be held for a part of the old one.

use std::{
    collections::{BTreeMap, VecDeque},
    net::{IpAddr, SocketAddr},
};

use ebpf_abi::{
    DirectEvent, DirectEventKind, Tuple, WorkloadNumber,
    limits::{SHORTCUT_AFTER_CLOSE_NANOS, SHORTCUTS_CLOSED_MAX},
};
use node_core::workload::ObjectName;

use super::veth;
use crate::{
    kernel::{self, Closed, Kernel, Shortcuts},
    sys::{Namespace, conntrack::Conntrack},
    telemetry::{Event, Sink},
};

/// Which pods of this node have a shortcut.
pub(super) struct Shortcut {
    events: Sink,
    is_wanted: bool,
    /// Pods that have none, and why.
    without: BTreeMap<ObjectName, String>,
    with: BTreeMap<ObjectName, WorkloadNumber>,
}

impl Shortcut {
    pub(super) fn new(is_wanted: bool, events: Sink) -> Self {
        Self { events, is_wanted, without: BTreeMap::new(), with: BTreeMap::new() }
    }

    /// Gives a pod its shortcut, or says why it has none; it works without. A predecessor's is taken away where it is not wanted.
    pub(super) async fn give(
        &mut self,
        kernel: &mut Kernel,
        (name, number): (&ObjectName, WorkloadNumber),
        (pod, host): (&Namespace, &Namespace),
        addresses: &[IpAddr],
    ) {
        let given = if self.is_wanted {
            match veth::host_side(pod, host, addresses).await {
                Ok(interface) => kernel.shortcut(number, interface).map_err(|error| error.to_string()),
                Err(none) => Err(none.to_string()),
            }
        } else {
            Err(String::new())
        };
        let Err(problem) = given else {
            self.without.remove(name);
            self.with.insert(name.clone(), number);
            return;
        };
        self.with.remove(name);
        if let Err(error) = kernel.no_shortcut(number) {
            self.failed("taking a shortcut away", &error);
        }
        if self.is_wanted && self.without.get(name) != Some(&problem) {
            self.events.emit(&Event::ShortcutOff { workload: name.clone(), problem: problem.clone() });
            self.without.insert(name.clone(), problem);
        }
    }

    /// The pod left; the kernel's half took its shortcut away.
    pub(super) fn leave(&mut self, name: &ObjectName) {
        self.with.remove(name);
        self.without.remove(name);
    }

    /// Pods that have one.
    pub(super) fn count(&self) -> usize {
        self.with.len()
    }

    fn failed(&self, call: &'static str, error: &dyn std::error::Error) {
        self.events.emit(&Event::KernelFailed { call, problem: error.to_string() });
    }
}

/// Clears away behind connections that are over.
pub(super) struct Trail {
    events: Sink,
    shortcuts: Shortcuts,
    /// `None` where the kernel tracks no connections, or does not let us.
    tracking: Option<Conntrack>,
    /// In the order of their ends.
    over: VecDeque<Closed>,
}

impl Trail {
    /// Begins with what ended while no daemon was there (T-16).
    pub(super) fn begin(shortcuts: Shortcuts, events: Sink) -> Self {
        let tracking = match Conntrack::open_here() {
            Ok(tracking) => Some(tracking),
            Err(error) => {
                let call = "opening the connection tracking";
                events.emit(&Event::KernelFailed { call, problem: error.to_string() });
                None
            }
        };
        let mut trail = Self { events, shortcuts, tracking, over: VecDeque::new() };
        match trail.shortcuts.closed() {
            Ok(mut closed) => {
                closed.sort_by_key(|closed| closed.at_nanos);
                trail.untrack(&closed.iter().map(|closed| ends_of(&closed.tuple)).collect::<Vec<_>>());
                trail.over.extend(closed);
            }
            Err(error) => trail.failed("listing shortcuts", &error),
        }
        trail
    }

    /// Takes note of what the kernel told.
    pub(super) fn take(&mut self, events: &[DirectEvent]) {
        let mut ends = Vec::new();
        for event in events.iter().filter(|event| event.kind() == Some(DirectEventKind::Closed)) {
            match self.shortcuts.of(event) {
                Ok(Some(closed)) => {
                    ends.push(ends_of(&closed.tuple));
                    self.over.push_back(closed);
                }
                Ok(None) => {}
                Err(error) => self.failed("looking for a shortcut", &error),
            }
        }
        self.untrack(&ends);
    }

    /// Removes what ended a minute ago, and what is more than [`SHORTCUTS_CLOSED_MAX`].
    pub(super) fn expire(&mut self) {
        let now = match kernel::now_nanos() {
            Ok(now) => now,
            Err(error) => return self.failed("expiring shortcuts", &error),
        };
        let is_due = |closed: &Closed, left: usize| {
            left > SHORTCUTS_CLOSED_MAX || closed.at_nanos.saturating_add(SHORTCUT_AFTER_CLOSE_NANOS) <= now
        };
        while let Some(closed) = self.over.front().copied().filter(|closed| is_due(closed, self.over.len())) {
            self.over.pop_front();
            if let Err(error) = self.shortcuts.remove(&closed) {
                self.failed("removing a shortcut", &error);
            }
        }
    }

    fn untrack(&mut self, ends: &[(SocketAddr, SocketAddr)]) {
        if ends.is_empty() {
            return;
        }
        let outcome = self.tracking.as_mut().map(|tracking| tracking.forget(ends));
        if let Some(Err(error)) = outcome {
            self.failed("removing entries of the connection tracking", &error);
        }
    }

    fn failed(&self, call: &'static str, error: &dyn std::error::Error) {
        self.events.emit(&Event::KernelFailed { call, problem: error.to_string() });
    }
}

fn ends_of(tuple: &Tuple) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(tuple.source.into(), tuple.source_port),
        SocketAddr::new(tuple.target.into(), tuple.target_port),
    )
}
