//! Connections that stand when their workload is enrolled (T-25): they never went through the daemon. Under STRICT the inbound
//! ones are ended, the others go on and are counted.
//!
//! [`list`] -> [`Standing`] -> [`destroy`]; [`remaining`] for as long as some are left.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
};

use ebpf_abi::TUNNEL_PORT;

use crate::sys::{
    Namespace,
    diag::{Diag, State, TcpSocket},
};

/// Whose connections are meant.
#[derive(Debug)]
pub(super) struct Scope<'a> {
    /// Addresses of the namespace, loopback left out.
    pub(super) own: &'a BTreeSet<IpAddr>,
    /// `None`: all ports (a pod). Else the ports that the host workload serves.
    pub(super) ports: Option<&'a BTreeSet<u16>>,
    /// Ports that bypass the daemon in any case.
    pub(super) exempt: &'a BTreeSet<u16>,
    /// `None`: all sockets (a pod). Else the cgroups of the host workload, for outbound ones.
    pub(super) cgroups: Option<&'a BTreeSet<u64>>,
}

/// One connection that the daemon has not seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    socket: TcpSocket,
    /// The port of the workload, if the connection came in.
    pub(super) inbound: Option<u16>,
}

/// Lists them. To be called when connections that arrive are steered and before connects are captured, and before the daemon
/// accepts: until then every socket in the namespace is the workload's.
pub(super) fn list(namespace: &Namespace, scope: &Scope<'_>) -> io::Result<Vec<Standing>> {
    let mut diag = Diag::open(namespace)?;
    let listening = diag.list(&[State::Listen])?.iter().map(|socket| socket.local.port()).collect();
    let mut states = State::LIVE.to_vec();
    states.push(State::SynSent);
    let sockets = diag.list(&states)?;
    Ok(sockets.into_iter().filter_map(|socket| classify(socket, &listening, scope)).collect())
}

/// Ends those that came in to a port for which `strict` holds. Returns how many were ended, and which go on.
pub(super) fn destroy(
    namespace: &Namespace,
    standing: Vec<Standing>,
    strict: impl Fn(u16) -> bool,
) -> io::Result<(usize, Vec<Standing>)> {
    let (doomed, others): (Vec<Standing>, Vec<Standing>) =
        standing.into_iter().partition(|connection| connection.inbound.is_some_and(&strict));
    if doomed.is_empty() {
        return Ok((0, others));
    }
    let mut diag = Diag::open(namespace)?;
    let mut destroyed = 0;
    for connection in doomed {
        destroyed += usize::from(diag.destroy(&connection.socket)?);
    }
    Ok((destroyed, others))
}

/// Those that are still there.
pub(super) fn remaining(namespace: &Namespace, standing: Vec<Standing>) -> io::Result<Vec<Standing>> {
    if standing.is_empty() {
        return Ok(standing);
    }
    let mut states = State::LIVE.to_vec();
    states.push(State::SynSent);
    let alive: BTreeSet<[u8; 8]> =
        Diag::open(namespace)?.list(&states)?.iter().map(TcpSocket::cookie).collect();
    Ok(standing.into_iter().filter(|connection| alive.contains(&connection.socket.cookie())).collect())
}

fn classify(socket: TcpSocket, listening: &BTreeSet<u16>, scope: &Scope<'_>) -> Option<Standing> {
    let stays_inside = |address: SocketAddr| address.ip().is_loopback() || scope.own.contains(&address.ip());
    // Inside the workload, or in the accept queue of the daemon's outbound listener: its local address is the target.
    if stays_inside(socket.remote) || !scope.own.contains(&socket.local.ip()) {
        return None;
    }
    let port = socket.local.port();
    let inbound = match scope.ports {
        None => listening.contains(&port) && socket.state != State::SynSent,
        Some(ports) => ports.contains(&port),
    };
    if inbound {
        let judged = port != TUNNEL_PORT && !scope.exempt.contains(&port);
        return judged.then_some(Standing { socket, inbound: Some(port) });
    }
    let is_theirs = scope.cgroups.is_none_or(|cgroups| socket.cgroup.is_some_and(|id| cgroups.contains(&id)));
    is_theirs.then_some(Standing { socket, inbound: None })
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// A real connection of this machine over loopback, as the kernel describes its accepted end, with addresses changed to
    /// those that a test needs.
    fn socket(local: &str, remote: &str, state: State) -> TcpSocket {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (accepted, peer) = listener.accept().expect("it was dialled");
        let found = Diag::open_here()
            .and_then(|mut diag| diag.find(accepted.local_addr()?, peer))
            .expect("the kernel answers")
            .expect("established");
        drop(client);
        let mut described = found;
        described.local = local.parse().expect("an address");
        described.remote = remote.parse().expect("an address");
        described.state = state;
        described
    }

    fn own() -> BTreeSet<IpAddr> {
        ["10.0.0.1", "fd00::1"].map(|address| address.parse().expect("an address")).into()
    }

    #[track_caller]
    fn check(local: &str, remote: &str, expected: Option<Option<u16>>) {
        let own = own();
        let exempt = BTreeSet::from([9100]);
        let scope = Scope { own: &own, ports: None, exempt: &exempt, cgroups: None };
        let listening = BTreeSet::from([80, 9100, 15008]);
        let found = classify(socket(local, remote, State::Established), &listening, &scope);
        assert_eq!(found.map(|standing| standing.inbound), expected);
    }

    #[test]
    fn a_connection_to_a_port_that_listens_came_in() {
        check("10.0.0.1:80", "10.0.0.9:4000", Some(Some(80)));
        check("[fd00::1]:80", "[fd00::9]:4000", Some(Some(80)));
    }

    #[test]
    fn a_connection_from_another_port_went_out() {
        check("10.0.0.1:41000", "10.0.0.9:80", Some(None));
    }

    #[test]
    fn what_stays_inside_the_workload_is_nobodys_business() {
        check("127.0.0.1:80", "127.0.0.1:4000", None);
        check("10.0.0.1:80", "10.0.0.1:4000", None);
        check("10.0.0.1:80", "127.0.0.1:4000", None);
    }

    #[test]
    fn the_daemons_own_accept_queue_is_not_the_workloads() {
        check("10.0.0.9:80", "10.0.0.1:41000", None);
        check("10.0.0.1:15008", "10.0.0.9:41000", None);
    }

    #[test]
    fn an_exempt_port_bypasses_the_daemon_before_and_after() {
        check("10.0.0.1:9100", "10.0.0.9:41000", None);
    }

    #[test]
    fn a_host_workload_has_the_sockets_of_its_ports_and_of_its_cgroups_only() {
        let own = own();
        let ports = BTreeSet::from([80]);
        let exempt = BTreeSet::new();
        let sample = socket("10.0.0.1:41000", "10.0.0.9:80", State::Established);
        let theirs = BTreeSet::from([sample.cgroup.expect("a live socket has a cgroup")]);
        let nobody = BTreeSet::new();
        let check = |local: &str, cgroups: &BTreeSet<u64>| {
            let scope = Scope { own: &own, ports: Some(&ports), exempt: &exempt, cgroups: Some(cgroups) };
            classify(socket(local, "10.0.0.9:5000", State::Established), &BTreeSet::from([22]), &scope)
                .map(|standing| standing.inbound)
        };
        assert_eq!(check("10.0.0.1:80", &nobody), Some(Some(80)));
        assert_eq!(check("10.0.0.1:22", &nobody), None);
        assert_eq!(check("10.0.0.1:41000", &theirs), Some(None));
        assert_eq!(check("10.0.0.1:41000", &nobody), None);
    }

    #[test]
    fn connections_that_ended_are_not_counted_on() {
        let namespace = Namespace::own();
        let Ok(namespace) = namespace else {
            // Entering a namespace, even one's own, needs CAP_SYS_ADMIN; the privileged suite shows the same.
            return;
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
        let (mut accepted, peer) = listener.accept().expect("it was dialled");
        let socket = Diag::open_here()
            .and_then(|mut diag| diag.find(accepted.local_addr()?, peer))
            .expect("the kernel answers")
            .expect("established");
        let standing = vec![Standing { socket, inbound: Some(80) }];
        assert_eq!(remaining(&namespace, standing.clone()).expect("the kernel answers").len(), 1);
        socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).expect("a socket");
        drop(client);
        accepted.read(&mut [0; 1]).expect_err("it was reset");
        drop(accepted);
        assert_eq!(remaining(&namespace, standing).expect("the kernel answers").len(), 0);
    }
}
