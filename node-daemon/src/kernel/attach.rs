//! Programs -> hooks. A link is pinned under its program's name; where one is pinned already its program is replaced in
//! place, so that a new daemon swaps and never stacks.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, LinkOrder, Program, ProgramError,
        SchedClassifier, SkLookup, SockOps, TcAttach, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
    },
};
use ebpf_abi::names;
use nix::errno::Errno;

use super::{
    error::{During as _, KernelError},
    load::load,
    pins::NEW_SUFFIX,
};
use crate::sys::bpf;

/// Attaches the five programs of an instance to a cgroup, guards before capture, and pins their links in `folder`.
///
/// `same` says that links found there belong to this cgroup; otherwise new ones are attached before the old ones go.
pub(super) fn to_cgroup(
    instance: &mut Ebpf,
    cgroup: &Path,
    folder: &Path,
    same: bool,
) -> Result<(), KernelError> {
    let group = File::open(cgroup).map_err(KernelError::file(cgroup, "opening the cgroup"))?;
    for name in names::CGROUP_PROGRAMS {
        load(instance, name)?;
        let pin = folder.join(name);
        if same && replace(instance, name, &pin)? {
            continue;
        }
        let link = attach(instance, name, Hook::Cgroup(&group))
            .during(|| format!("attaching `{name}` to the cgroup {}", cgroup.display()))?;
        pin_over(link, &pin)?;
    }
    Ok(())
}

/// Attaches `steer` of an instance to a network namespace and pins its link in `folder`.
pub(super) fn to_namespace(
    instance: &mut Ebpf,
    netns: BorrowedFd<'_>,
    folder: &Path,
) -> Result<(), KernelError> {
    load(instance, names::PROGRAM_STEER)?;
    let pin = folder.join(names::PROGRAM_STEER);
    if replace(instance, names::PROGRAM_STEER, &pin)? {
        return Ok(());
    }
    let link = attach(instance, names::PROGRAM_STEER, Hook::Namespace(netns))
        .during(|| "attaching `steer` to the network namespace".to_owned())?;
    pin_over(link, &pin)
}

/// Attaches `shortcut` to the host side of a pod's veth and pins its link in `folder`. Only where nobody else's program is: it
/// would not see what the shortcut takes.
pub(super) fn to_interface(instance: &mut Ebpf, interface: u32, folder: &Path) -> Result<(), KernelError> {
    let name = names::PROGRAM_SHORTCUT;
    let pin = folder.join(name);
    let ours = PinnedLink::from_pin(&pin).ok().map(FdLink::from);
    let ours = ours.and_then(|link| link.info().ok()).map(|info| info.program_id());
    let (_, present) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress)
        .during(|| format!("asking for the programs of interface {interface} (tcx, Linux 6.6)"))?;
    let others = present.iter().filter(|program| Some(program.id()) != ours).count();
    if others > 0 {
        return Err(KernelError::Occupied { interface, others });
    }
    if replace(instance, name, &pin)? {
        return Ok(());
    }
    let attaching = || format!("attaching `{name}` to interface {interface}");
    let program = instance.program_mut(name).ok_or(KernelError::NoObject)?;
    let program: &mut SchedClassifier = program.try_into().during(attaching)?;
    let hook = TcAttach::Tcx { attach_type: TcAttachType::Ingress, order: LinkOrder::first() };
    let id = program.attach(interface, hook).during(attaching)?;
    let link = program.take_link(id).during(attaching)?;
    pin_over(link.try_into().during(attaching)?, &pin)
}

/// Replaces the program of a pinned link; false where there is none, or what it was attached to is gone.
fn replace(instance: &Ebpf, name: &'static str, pin: &Path) -> Result<bool, KernelError> {
    let link = match bpf::pinned_object(pin) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(KernelError::file(pin, "opening the pinned link")(error)),
    };
    let program = instance.program(name).ok_or(KernelError::NoObject)?;
    let program = program.fd().during(|| format!("using the program `{name}`"))?;
    match bpf::update_link(link.as_fd(), program.as_fd()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENOLINK as i32) => Ok(false),
        Err(error) => Err(KernelError::file(pin, "replacing the program of the pinned link")(error)),
    }
}

/// Pins a link in the place of another, which is detached by that, in one step.
fn pin_over(link: FdLink, pin: &Path) -> Result<(), KernelError> {
    let mut new = pin.as_os_str().to_owned();
    new.push(NEW_SUFFIX);
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(KernelError::file(&new, "removing a left-over pin")(error));
        }
        _ => {}
    }
    link.pin(&new).during(|| format!("pinning a link at {}", new.display()))?;
    fs::rename(&new, pin).map_err(KernelError::file(pin, "renaming the pin"))
}

enum Hook<'a> {
    Cgroup(&'a File),
    Namespace(BorrowedFd<'a>),
}

/// Links to a cgroup stand beside those of others whatever the mode; the kernel refuses every mode but this one for links.
const MODE: CgroupAttachMode = CgroupAttachMode::Single;

fn attach(instance: &mut Ebpf, name: &str, hook: Hook<'_>) -> Result<FdLink, ProgramError> {
    let program = instance.program_mut(name).ok_or(ProgramError::NotLoaded)?;
    match hook {
        Hook::Namespace(netns) => {
            let steer: &mut SkLookup = program.try_into()?;
            let id = steer.attach(netns)?;
            Ok(steer.take_link(id)?.into())
        }
        Hook::Cgroup(group) => attach_to_cgroup(program, name, group),
    }
}

fn attach_to_cgroup(program: &mut Program, name: &str, group: &File) -> Result<FdLink, ProgramError> {
    let link: Result<FdLink, LinkError> = if name == names::PROGRAM_SOCKET_EVENTS {
        let events: &mut SockOps = program.try_into()?;
        let id = events.attach(group, MODE)?;
        events.take_link(id)?.try_into()
    } else if name == names::PROGRAM_GUARD_EGRESS || name == names::PROGRAM_GUARD_INGRESS {
        let direction = if name == names::PROGRAM_GUARD_EGRESS {
            CgroupSkbAttachType::Egress
        } else {
            CgroupSkbAttachType::Ingress
        };
        let guard: &mut CgroupSkb = program.try_into()?;
        let id = guard.attach(group, direction, MODE)?;
        guard.take_link(id)?.try_into()
    } else {
        let connect: &mut CgroupSockAddr = program.try_into()?;
        let id = connect.attach(group, MODE)?;
        connect.take_link(id)?.try_into()
    };
    Ok(link?)
}
