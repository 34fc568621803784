//! Every map and global, and the only code that touches them.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    Global,
    bindings::{
        BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE,
        BPF_SK_STORAGE_GET_F_CREATE, SO_MARK, SOL_SOCKET, bpf_sock,
    },
    btf_maps::{self, ArrayOfMaps, SkStorage},
    helpers::generated::{
        bpf_map_lookup_elem, bpf_ringbuf_query, bpf_setsockopt, bpf_sk_release, bpf_sk_storage_delete,
        bpf_sk_storage_get,
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf, SockMap},
    programs::SkLookupContext,
};
use ebpf::verdict::direct::PairTable;
use ebpf_abi::{
    Address, CapturedRecord, Delivery, DirectArrival, DirectEvent, DirectEventKind, DirectValue, DropReason,
    ExemptRecord, Generation, Origin, OriginKind, OwnAddressKey, PairKey, PairValue, PairVerdict, Port,
    PortAction, PortRule, ShortcutKey, ShortcutValue, SocketSlot, SteerMeta, Tuple, Verdict, WorkloadNumber,
    WorkloadValue,
    limits::{
        COUNTERS_MAX, DELIVERIES_MAX, DIRECT_EVENTS_BYTES, DIRECT_MAX, ORIGINS_MAX, OWN_ADDRESSES_MAX,
        PAIRS_MAX, SHORTCUTS_MAX, SOCKETS_MAX, STATE_MAX, STEER_ADDRESSES_MAX, STEER_PORTS_MAX,
        STEER_SLOTS_FACTOR, WORKLOADS_MAX,
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
static LOCAL_ADDRESSES: HashMap<Address, WorkloadNumber> =
    HashMap::with_max_entries(OWN_ADDRESSES_MAX, BPF_F_NO_PREALLOC);

/// One generation of the pair table.
type Generations =
    btf_maps::HashMap<PairKey, PairValue, { PAIRS_MAX as usize }, { BPF_F_NO_PREALLOC as usize }>;

/// Its one slot holds the generation in force. A program that fetched it uses it to the end, and the daemon, which puts another
/// one there, waits for all such programs.
#[btf_map]
static PAIRS: ArrayOfMaps<Generations, 1> = ArrayOfMaps::new();

#[map]
static DIRECT: HashMap<Tuple, DirectValue> = HashMap::with_max_entries(DIRECT_MAX, BPF_F_NO_PREALLOC);

#[map]
static DIRECT_EVENTS: RingBuf = RingBuf::with_byte_size(DIRECT_EVENTS_BYTES, 0);

#[map]
static DAEMON: SockMap = SockMap::with_max_entries(1, 0);

#[map]
static SHORTCUTS: HashMap<ShortcutKey, ShortcutValue> =
    HashMap::with_max_entries(SHORTCUTS_MAX, BPF_F_NO_PREALLOC);

#[map]
static HOST_INTERFACES: HashMap<WorkloadNumber, u32> =
    HashMap::with_max_entries(WORKLOADS_MAX, BPF_F_NO_PREALLOC);

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
static WORKLOAD: Global<u32> = Global::new(0);

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

/// The enrolment whose namespace this instance of `steer` serves; `NONE` in the host's.
#[inline(always)]
pub(crate) fn steered_workload() -> WorkloadNumber {
    WorkloadNumber(WORKLOAD.load())
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

/// Which pod of this node alone has an address.
#[inline(always)]
pub(crate) fn local_owner(address: &Address) -> Option<WorkloadNumber> {
    // SAFETY: user space replaces the four bytes at once.
    unsafe { LOCAL_ADDRESSES.get(address) }.copied()
}

/// Whether the daemon that keeps the pair table is alive: the slot empties itself with its listener (T-15).
#[inline(always)]
pub(crate) fn is_daemon_there() -> bool {
    let slot = 0_u32;
    // SAFETY: the map is a map of sockets with keys of four bytes; a socket that is found is released at once.
    unsafe {
        let listener =
            bpf_map_lookup_elem(ptr::from_ref(&DAEMON).cast_mut().cast(), (&raw const slot).cast());
        if listener.is_null() {
            return false;
        }
        bpf_sk_release(listener);
    }
    true
}

/// The generation of the pair table that was in force when it was fetched. To be used for one question.
pub(crate) struct InForce {
    generation: Option<&'static Generations>,
}

impl InForce {
    #[inline(always)]
    pub(crate) fn fetch() -> Self {
        Self { generation: PAIRS.get(0) }
    }

    /// Its number, as the entry of a source names it.
    #[inline(always)]
    pub(crate) fn number(&self, source: WorkloadNumber) -> Generation {
        self.value(&PairKey::class_of(source)).map_or(Generation(0), |class| class.generation)
    }

    #[inline(always)]
    fn value(&self, key: &PairKey) -> Option<PairValue> {
        // SAFETY: a generation is written before it is put in force, and never after.
        unsafe { self.generation?.get(key) }.copied()
    }
}

impl PairTable for InForce {
    #[inline(always)]
    fn class(&self, source: WorkloadNumber) -> Option<u32> {
        self.value(&PairKey::class_of(source)).map(|class| class.value)
    }

    #[inline(always)]
    fn pair(&self, class: u32, destination: WorkloadNumber, port: Port) -> Option<PairVerdict> {
        self.value(&PairKey::pair(class, destination, port)).map(|pair| PairVerdict::of(pair.value))
    }
}

/// Publishes a direct connection; false at the limit. What an older socket left under the tuple is replaced.
#[inline(always)]
pub(crate) fn publish_direct(tuple: &Tuple, value: &DirectValue) -> bool {
    DIRECT.insert(tuple, value, 0).is_ok()
}

/// The entry of a direct connection. Fields are read and written one by one: each has one writer, and an aligned load or store
/// of them does not tear.
#[inline(always)]
pub(crate) fn direct(tuple: &Tuple) -> Option<*mut DirectValue> {
    DIRECT.get_ptr_mut(tuple)
}

#[inline(always)]
pub(crate) fn forget_direct(tuple: &Tuple) {
    let _: Result<(), i32> = DIRECT.remove(tuple);
}

/// Notes how the destination received a direct connection.
///
/// # Safety
/// `entry` comes from [`direct`], in this run of the program.
#[inline(always)]
pub(crate) unsafe fn note_arrival(entry: *mut DirectValue, arrival: DirectArrival) {
    // SAFETY: the caller vouches for the entry.
    unsafe { (&raw mut (*entry).arrival).write_volatile(arrival as u32) };
}

/// Tells the daemon what happened to a direct connection; `fill` writes every field. It is called only when a quarter of the ring
/// is filled, and looks by itself now and then. Refusals, which anybody can make in a loop, may fill half of it.
///
/// The event is written where it stays: the stack of a program has 512 bytes.
#[inline(always)]
pub(crate) fn tell(kind: DirectEventKind, fill: impl FnOnce(*mut DirectEvent)) {
    let ring: *mut c_void = ptr::from_ref(&DIRECT_EVENTS).cast_mut().cast();
    // SAFETY: the map is a ring buffer.
    let [filled, size] = unsafe {
        [
            bpf_ringbuf_query(ring, u64::from(BPF_RB_AVAIL_DATA)),
            bpf_ringbuf_query(ring, u64::from(BPF_RB_RING_SIZE)),
        ]
    };
    if kind == DirectEventKind::Refused && filled >= size / 2 {
        return count_drop(DropReason::DirectEventLost);
    }
    let Some(mut event) = DIRECT_EVENTS.reserve::<DirectEvent>(0) else {
        return count_drop(DropReason::DirectEventLost);
    };
    fill(event.as_mut_ptr());
    let wake = if filled >= size / 4 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    event.submit(u64::from(wake));
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

/// Index of the host side of a workload's veth, if its packets may take a shortcut.
#[inline(always)]
pub(crate) fn host_interface(workload: &WorkloadNumber) -> Option<u32> {
    // SAFETY: user space writes the four bytes at once.
    unsafe { HOST_INTERFACES.get(workload) }.copied()
}

/// Where packets of this direction go.
#[inline(always)]
pub(crate) fn shortcut(key: &ShortcutKey) -> Option<u32> {
    // SAFETY: the field is written before the entry is published, and replaced with it as a whole.
    unsafe { SHORTCUTS.get(key) }.map(|value| value.interface)
}

/// Enters one direction of a connection; false at the limit.
#[inline(always)]
pub(crate) fn take_shortcut(key: &ShortcutKey, value: &ShortcutValue) -> bool {
    SHORTCUTS.insert(key, value, 0).is_ok()
}

/// Removes one direction; none is no error.
#[inline(always)]
pub(crate) fn forget_shortcut(key: &ShortcutKey) {
    let _: Result<(), i32> = SHORTCUTS.remove(key);
}

/// Notes when a connection was closed, if it is still the one of this socket.
#[inline(always)]
pub(crate) fn close_shortcut(key: &ShortcutKey, socket_cookie: u64, now_nanos: u64) {
    let Some(value) = SHORTCUTS.get_ptr_mut(key) else { return };
    // SAFETY: the entry is memory of the map; aligned eight-byte loads and stores do not tear.
    unsafe {
        if (*value).socket_cookie == socket_cookie {
            (*value).closed_nanos = now_nanos;
        }
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
