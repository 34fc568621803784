//! Socket options that neither nix nor socket2 offers.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::libc;

/// `SO_NETNS_COOKIE` of the kernel (5.14 and later, all architectures that Rust's Linux targets share with x86-64).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Cookie of the network namespace to which `socket` belongs.
pub fn namespace_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    option(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE, 0_u64)
}

/// Lets an IPv6 socket use addresses that are not the namespace's own, in both families where it is dual-stack.
/// Needs CAP_NET_ADMIN in the socket's namespace.
pub fn set_transparent_v6(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)
}

/// Leaves the choice of the port of a socket that is bound to an address to `connect`, so that ports are shared between
/// destinations.
pub fn set_bind_address_no_port(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_option(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Reads an option whose value is a plain number.
fn option(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, mut value: u64) -> io::Result<u64> {
    let wanted = size_of::<u64>();
    let mut length = libc::socklen_t::try_from(wanted).map_err(io::Error::other)?;
    // SAFETY: `value` is a live u64 and `length` its size; the kernel writes at most `length` bytes. The descriptor is
    // borrowed, so it is open for the whole call.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(length).ok() != Some(wanted) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel answered with another size than 8 bytes",
        ));
    }
    Ok(value)
}

fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: `value` is a live c_int and `length` its size; the kernel only reads it. The descriptor is borrowed, so it is
    // open for the whole call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsFd};

    use super::*;

    #[test]
    fn sockets_of_one_namespace_have_one_cookie() {
        let a = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let b = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let cookie = namespace_cookie(a.as_fd()).expect("Linux 5.14 or later");
        assert_ne!(cookie, 0);
        assert_eq!(cookie, namespace_cookie(b.as_fd()).expect("the same call"));
    }

    #[test]
    fn a_file_has_no_cookie() {
        let file = std::fs::File::open("/dev/null").expect("a file");
        assert!(namespace_cookie(file.as_fd()).is_err());
    }
}
