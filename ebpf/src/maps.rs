//! Every map and global, and the only code that touches them.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, SO_MARK, SOL_SOCKET, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::{bpf_setsockopt, bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, SockMap},
    programs::SkLookupContext,
};
use ebpf_abi::{
    Address, CapturedRecord, Delivery, DropReason, ExemptRecord, Origin, OriginKind, OwnAddressKey, Port,
    PortAction, PortRule, SocketSlot, SteerMeta, Tuple, Verdict, WorkloadNumber, WorkloadValue,
    limits::{
        COUNTERS_MAX, DELIVERIES_MAX, ORIGINS_MAX, OWN_ADDRESSES_MAX, SOCKETS_MAX, STATE_MAX,
        STEER_ADDRESSES_MAX, STEER_PORTS_MAX, STEER_SLOTS_FACTOR, WORKLOADS_MAX,
    },
    workload::WORKLOAD_CAPTURE,
};

// Maps of the node.

#[btf_map]
static EXEMPT: SkStorage<ExemptRecord> = SkStorage::new();

#[btf_map]
static CAPTURED: SkStorage<CapturedRecord> = SkStorage::new();

#[map]
static WORKLOADS: HashMap<u64, WorkloadValue> = HashMap::with_max_entries(WORKLOADS_MAX, BPF_F_NO_PREALLOC);

#[map]
static OWN_ADDRESSES: HashMap<OwnAddressKey, u8> =
    HashMap::with_max_entries(OWN_ADDRESSES_MAX, BPF_F_NO_PREALLOC);

#[map]
static ORIGINS: HashMap<Tuple, Origin> = HashMap::with_max_entries(ORIGINS_MAX, BPF_F_NO_PREALLOC);

#[map]
static DELIVERIES: HashMap<Tuple, Delivery> = HashMap::with_max_entries(DELIVERIES_MAX, BPF_F_NO_PREALLOC);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_MAX, 0);

/// No program reads it: the daemon keeps there what must outlive it.
#[map]
static STATE: Array<u64> = Array::with_max_entries(STATE_MAX, 0);

// Maps of one instance of `steer`.

#[map]
static SOCKETS: SockMap = SockMap::with_max_entries(SOCKETS_MAX, 0);

#[map]
static STEER_ADDRESSES: HashMap<Address, u8> =
    HashMap::with_max_entries(STEER_ADDRESSES_MAX * STEER_SLOTS_FACTOR, BPF_F_NO_PREALLOC);

/// The instance of a host workload reads those of the host.
#[map]
static STEER_PORTS: HashMap<Port, PortRule> =
    HashMap::with_max_entries(STEER_PORTS_MAX * STEER_SLOTS_FACTOR, BPF_F_NO_PREALLOC);

/// No program reads it: a successor reads there whose instance it found.
#[map]
static STEER_META: Array<SteerMeta> = Array::with_max_entries(1, 0);

// Globals, set when an instance is loaded.

#[unsafe(no_mangle)]
static MARK: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static HOST_WORKLOAD: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
static HOST_NETNS_COOKIE: Global<u64> = Global::new(0);

#[unsafe(no_mangle)]
static HOST: Global<u32> = Global::new(0);

/// Our bits in a socket's mark.
#[inline(always)]
pub(crate) fn our_mark() -> u32 {
    MARK.load()
}

/// Whether this instance of `steer` serves the host's namespace.
#[inline(always)]
pub(crate) fn is_host() -> bool {
    HOST.load() != 0
}

/// The host workload whose cgroup this instance is attached to, for a socket of the host's namespace.
#[inline(always)]
pub(crate) fn host_workload(netns_cookie: u64) -> Option<WorkloadNumber> {
    let number = HOST_WORKLOAD.load();
    (number != 0 && HOST_NETNS_COOKIE.load() == netns_cookie).then_some(WorkloadNumber(number))
}

/// Whether this instance is attached to the cgroup of one host workload.
#[inline(always)]
pub(crate) fn is_instance_of_host_workload() -> bool {
    HOST_WORKLOAD.load() != 0
}

/// The workload that owns a network namespace.
#[inline(always)]
pub(crate) fn workload_of(netns_cookie: u64) -> Option<WorkloadNumber> {
    // SAFETY: user space writes the eight bytes at once; a reader sees the old or the new ones.
    let value = unsafe { WORKLOADS.get(&netns_cookie) }?;
    (value.flags & WORKLOAD_CAPTURE != 0).then_some(value.number)
}

/// Whether the workload itself has an address.
#[inline(always)]
pub(crate) fn is_own_address(workload: WorkloadNumber, address: &Address) -> bool {
    OWN_ADDRESSES.get_ptr(&OwnAddressKey { workload, address: *address }).is_some()
}

/// Whether the daemon recorded a socket as its own.
///
/// # Safety
/// `sk` is a socket pointer from a hook's context, and the verifier knows that it is not null.
#[inline(always)]
pub(crate) unsafe fn is_exempt(sk: *mut bpf_sock) -> bool {
    // SAFETY: the caller vouches for `sk`; the map is a map of this type.
    !unsafe { bpf_sk_storage_get(address_of(&EXEMPT), sk.cast(), ptr::null_mut(), 0) }.is_null()
}

/// Whether a socket's connection was captured.
///
/// # Safety
/// As for [`is_exempt`].
#[inline(always)]
pub(crate) unsafe fn is_captured(sk: *mut bpf_sock) -> bool {
    // SAFETY: the caller vouches for `sk`; the map is a map of this type.
    !unsafe { bpf_sk_storage_get(address_of(&CAPTURED), sk.cast(), ptr::null_mut(), 0) }.is_null()
}

/// Records a socket as captured; false where there is no memory.
///
/// # Safety
/// As for [`is_exempt`].
#[inline(always)]
pub(crate) unsafe fn record_captured(sk: *mut bpf_sock, workload: WorkloadNumber) -> bool {
    let mut record = CapturedRecord { workload };
    // SAFETY: the caller vouches for `sk`; the record has the size of the map's value and outlives the call.
    let stored = unsafe {
        bpf_sk_storage_get(
            address_of(&CAPTURED),
            sk.cast(),
            (&raw mut record).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
    };
    if stored.is_null() {
        return false;
    }
    // SAFETY: the kernel returned a record of this socket; aligned stores of four bytes do not tear.
    unsafe { *stored.cast::<CapturedRecord>() = record };
    true
}

/// Removes the record of a captured socket; no record is no error.
///
/// # Safety
/// As for [`is_exempt`].
#[inline(always)]
pub(crate) unsafe fn forget_captured(sk: *mut bpf_sock) {
    // SAFETY: the caller vouches for `sk`; the map is a map of this type.
    unsafe { bpf_sk_storage_delete(address_of(&CAPTURED), sk.cast()) };
}

/// Sets a socket's mark; false where the kernel refuses.
///
/// # Safety
/// `context` is the context of a hook on `connect` or of `sock_ops`.
#[inline(always)]
pub(crate) unsafe fn set_mark(context: *mut c_void, mut mark: u32) -> bool {
    // SAFETY: the caller vouches for the context; the value is four bytes and outlives the call.
    unsafe { bpf_setsockopt(context, SOL_SOCKET as i32, SO_MARK as i32, (&raw mut mark).cast(), 4) == 0 }
}

/// Publishes who opened a connection; false at the limit.
#[inline(always)]
pub(crate) fn publish_origin(tuple: &Tuple, origin: &Origin) -> bool {
    ORIGINS.insert(tuple, origin, 0).is_ok()
}

/// Whether a connect of a host workload published this connection as one of this kind.
#[inline(always)]
pub(crate) fn is_origin(tuple: &Tuple, kind: OriginKind) -> bool {
    // SAFETY: the field is written before the entry is published and never after.
    unsafe { ORIGINS.get(tuple) }.is_some_and(|origin| origin.kind == kind as u32)
}

/// Takes a connection back, if it is still the one of this socket.
#[inline(always)]
pub(crate) fn forget_origin(tuple: &Tuple, socket_cookie: u64) {
    // SAFETY: the field is written before the entry is published and never after.
    if unsafe { ORIGINS.get(tuple) }.is_some_and(|origin| origin.socket_cookie == socket_cookie) {
        let _: Result<(), i32> = ORIGINS.remove(tuple);
    }
}

/// Notes when a connection ended in order, if it is still the one of this socket.
#[inline(always)]
pub(crate) fn close_origin(tuple: &Tuple, socket_cookie: u64, now_nanos: u64) {
    let Some(origin) = ORIGINS.get_ptr_mut(tuple) else { return };
    // SAFETY: the entry is memory of the map; aligned eight-byte loads and stores do not tear.
    unsafe {
        if (*origin).socket_cookie == socket_cookie {
            (*origin).closed_nanos = now_nanos;
        }
    }
}

/// Whether the daemon announced this connection as its delivery.
#[inline(always)]
pub(crate) fn is_delivery(tuple: &Tuple) -> bool {
    DELIVERIES.get_ptr(tuple).is_some()
}

/// Whether the namespace of this instance has an address.
#[inline(always)]
pub(crate) fn is_steer_address(address: &Address) -> bool {
    STEER_ADDRESSES.get_ptr(address).is_some()
}

/// Whether a port of this instance has this action.
#[inline(always)]
pub(crate) fn has_action(port: Port, action: PortAction) -> bool {
    // SAFETY: user space replaces an entry as a whole, so a reader sees the old or the new one.
    unsafe { STEER_PORTS.get(&port) }.is_some_and(|rule| rule.action == action as u32)
}

/// Which host workload serves a port; `WorkloadNumber::NONE` where several declare it.
#[inline(always)]
pub(crate) fn port_owner(port: Port) -> Option<WorkloadNumber> {
    // SAFETY: as in `has_action`.
    let rule = unsafe { STEER_PORTS.get(&port) }?;
    (rule.action == PortAction::Inbound as u32).then_some(rule.owner)
}

/// How handing over to a listener ended.
pub(crate) enum Handed {
    Over,
    NoListener,
    Refused,
}

/// Hands a connection to the listener in a slot.
#[inline(always)]
pub(crate) fn hand_to(context: &SkLookupContext, slot: SocketSlot) -> Handed {
    match SOCKETS.redirect_sk_lookup(context, slot.index(), 0) {
        // While programs are swapped two of them run; the first one has decided.
        Ok(()) | Err(EEXIST) => Handed::Over,
        Err(ENOENT) => Handed::NoListener,
        Err(_) => Handed::Refused,
    }
}

#[inline(always)]
pub(crate) fn count_drop(reason: DropReason) {
    count(reason.slot());
}

#[inline(always)]
pub(crate) fn count_verdict(verdict: Verdict) {
    count(verdict.slot());
}

#[inline(always)]
fn count(slot: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: the slot belongs to this CPU. A hook that interrupts another on the same CPU may lose one count.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}

/// What the generic helpers take for a map.
#[inline(always)]
fn address_of<T>(map: &'static SkStorage<T>) -> *mut c_void {
    ptr::from_ref(map).cast_mut().cast()
}

const ENOENT: i32 = -2;
const EEXIST: i32 = -17;
