//! The rule and the routes that bring marked packets to `lo` inside a namespace (capture.md 2.2), for both families:
//! ```text
//! ip rule  add priority 90 fwmark M/M lookup 91
//! ip route add local default dev lo    src <own address> metric 10            table 91
//! ip route add local default dev <each real device> src … metric 20 + index   table 91
//! ```
//! The routes of real devices keep a socket that is bound to one (SO_BINDTODEVICE) under capture.
//!
//! Observe -> [`plan`] -> [`steps`] -> apply; the two in the middle are pure.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel's attributes are many and grow; those not named here say nothing about our rules and routes"
)]

use std::{collections::BTreeSet, io, net::IpAddr};

use ebpf_abi::LOOPBACK_IFINDEX;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::LinkFlags,
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::IpVersion;

use super::netlink::{Failed, Netlink, collect};
use crate::sys::Namespace;

/// Table of our routes. Below 100, where the `sbr` plug-in of CNI begins, and none of the kernel's (253 to 255).
pub const TABLE: u8 = 91;

/// Priority of our rule: after `local` (0), before all that administrators and plug-ins add by default (32,765 and down, or 100
/// and up).
pub const RULE_PRIORITY: u32 = 90;

/// `rtm_protocol` of our routes: says who made them. Not one of those in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 191;

/// Metric of the route by way of `lo`: it wins where a socket is bound to no device.
const LOOPBACK_METRIC: u32 = 10;

/// Metric of a real device's route, to which its index is added: no two routes may be equal.
const DEVICE_METRIC: u32 = 20;

/// Real devices with a route of their own. Pods have one or two, a host a handful beside the veths of its pods. At the limit the
/// devices with the highest numbers get none: a socket bound to one of those is dropped by the guard, that is closed.
pub const DEVICES_MAX: usize = 256;

/// Why rules or routes could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The kernel refused.
    #[error("{call} failed: {source}")]
    Kernel { call: &'static str, source: io::Error },
    /// `lo` is down: nothing can be delivered in this namespace.
    #[error("the interface lo is down; set it up in the namespace, then the workload is enrolled")]
    LoopbackDown,
}

impl From<Failed> for RouteError {
    fn from(failed: Failed) -> Self {
        Self::Kernel { call: failed.call, source: failed.source }
    }
}

/// What is wanted in one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Our bits of the mark.
    pub mark: u32,
    /// Addresses of the workloads in this namespace; the first of a family that the namespace holds is the source of captured
    /// connections that are not bound to an address.
    pub sources: Vec<IpAddr>,
}

/// What one pass changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    pub rules: usize,
    pub routes: usize,
}

/// Brings rules and routes of `namespace` to what is wanted, and returns what had to change and which addresses are there.
pub async fn ensure(namespace: &Namespace, want: &Want) -> Result<(Changed, BTreeSet<IpAddr>), RouteError> {
    let netlink = Netlink::open(namespace)?;
    let observed = netlink.observe().await?;
    if !observed.loopback_up {
        return Err(RouteError::LoopbackDown);
    }
    let steps = steps(&observed, &plan(&observed, want));
    let mut changed = Changed::default();
    for step in &steps {
        match step {
            Step::AddRule(_) | Step::RemoveRule(_) => changed.rules += 1,
            Step::SetRoute(_) | Step::RemoveRoute(_) => changed.routes += 1,
        }
        netlink.take(step).await?;
    }
    Ok((changed, observed.own_addresses()))
}

/// Removes everything of ours from `namespace`: the rule first, so that nothing looks up a half-empty table.
pub async fn remove(namespace: &Namespace) -> Result<Changed, RouteError> {
    let netlink = Netlink::open(namespace)?;
    let observed = netlink.observe().await?;
    let mut changed = Changed::default();
    for step in steps(&observed, &Plan::default()) {
        match &step {
            Step::AddRule(_) | Step::RemoveRule(_) => changed.rules += 1,
            Step::SetRoute(_) | Step::RemoveRoute(_) => changed.routes += 1,
        }
        netlink.take(&step).await?;
    }
    Ok(changed)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V4,
    V6,
}

impl Family {
    const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn number(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }
}

/// A rule that looks up our table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    family: Family,
    priority: u32,
    mark: u32,
    mask: u32,
}

/// A default route of type `local` in our table; or, where `foreign`, anything else there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Route {
    family: Family,
    device: u32,
    metric: u32,
    source: Option<IpAddr>,
    foreign: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct OwnAddress {
    address: IpAddr,
    device: u32,
    /// False while IPv6 still asks whether another machine has it.
    usable: bool,
}

/// What stands in a namespace.
#[derive(Clone, Debug, Default)]
struct Observed {
    loopback_up: bool,
    /// Indices of devices that are up, `lo` left out.
    devices: BTreeSet<u32>,
    addresses: Vec<OwnAddress>,
    rules: Vec<Rule>,
    routes: Vec<(Route, RouteMessage)>,
}

impl Observed {
    /// Addresses that a peer could have, link-local ones included.
    fn own_addresses(&self) -> BTreeSet<IpAddr> {
        self.addresses.iter().map(|own| own.address).filter(|address| !address.is_loopback()).collect()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Plan {
    rules: BTreeSet<Rule>,
    routes: BTreeSet<Route>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    AddRule(Rule),
    RemoveRule(Rule),
    SetRoute(Route),
    RemoveRoute(RouteMessage),
}

/// What should stand there. A family in which the namespace has no address of its own, or only link-local ones, is left alone:
/// there the kernel says at once that the network cannot be reached, and what is marked leaves by no way but `lo`.
fn plan(observed: &Observed, want: &Want) -> Plan {
    let mut plan = Plan::default();
    for family in Family::ALL {
        let Some(source) = source(observed, want, family) else { continue };
        plan.rules.insert(Rule { family, priority: RULE_PRIORITY, mark: want.mark, mask: want.mark });
        let route = |device, metric| Route { family, device, metric, source, foreign: false };
        plan.routes.insert(route(LOOPBACK_IFINDEX, LOOPBACK_METRIC));
        let takes_part = |device: &u32| {
            // A device on which IPv6 is off takes no IPv6 route, and carries no IPv6 either.
            family == Family::V4
                || observed.addresses.iter().any(|own| own.device == *device && own.address.is_ipv6())
        };
        let devices = observed.devices.iter().copied().filter(takes_part).take(DEVICES_MAX);
        plan.routes.extend(devices.map(|device| route(device, DEVICE_METRIC.saturating_add(device))));
    }
    plan
}

/// The source of captured connections in a family; the inner `None` leaves the choice to the kernel, which it makes well for
/// IPv6 only. The outer one: this family does not take part.
fn source(observed: &Observed, want: &Want, family: Family) -> Option<Option<IpAddr>> {
    let global = |own: &&OwnAddress| Family::of(own.address) == family && is_global(own.address);
    observed.addresses.iter().find(global)?;
    let held = |address: &IpAddr| {
        Family::of(*address) == family
            && observed.addresses.iter().any(|own| own.address == *address && own.usable)
    };
    let declared = want.sources.iter().copied().find(held);
    match family {
        Family::V4 => Some(declared.or_else(|| {
            observed.addresses.iter().find(|own| global(own) && own.usable).map(|own| own.address)
        })),
        Family::V6 => Some(declared),
    }
}

fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unspecified() && !v6.is_unicast_link_local(),
    }
}

/// The steps from what stands to what should: routes before the rule that leads to them, removals of rules before those of
/// routes, so that at no moment a marked packet meets a rule without routes.
fn steps(observed: &Observed, plan: &Plan) -> Vec<Step> {
    let standing: BTreeSet<&Route> = observed.routes.iter().map(|(route, _)| route).collect();
    let rules: BTreeSet<Rule> = observed.rules.iter().copied().collect();
    let mut steps = Vec::new();
    steps.extend(rules.difference(&plan.rules).map(|rule| Step::RemoveRule(*rule)));
    steps.extend(
        plan.routes
            .iter()
            .filter(|route| !standing.contains(route))
            .map(|route| Step::SetRoute(route.clone())),
    );
    // A route whose place (family and metric) is taken by a new one was replaced by it.
    let replaced = |route: &Route| {
        !route.foreign
            && plan.routes.iter().any(|new| {
                new.family == route.family && new.metric == route.metric && new.device == route.device
            })
    };
    steps.extend(
        observed
            .routes
            .iter()
            .filter(|(route, _)| !plan.routes.contains(route) && !replaced(route))
            .map(|(_, message)| Step::RemoveRoute(message.clone())),
    );
    steps.extend(plan.rules.difference(&rules).map(|rule| Step::AddRule(*rule)));
    steps
}

impl Netlink {
    async fn observe(&self) -> Result<Observed, RouteError> {
        let mut observed = Observed::default();
        for link in collect("listing interfaces", self.handle.link().get().execute()).await? {
            let up = link.header.flags.contains(LinkFlags::Up);
            if link.header.index == LOOPBACK_IFINDEX {
                observed.loopback_up = up;
            } else if up && !link.header.flags.contains(LinkFlags::Loopback) {
                observed.devices.insert(link.header.index);
            }
        }
        let addresses = collect("listing addresses", self.handle.address().get().execute()).await?;
        observed.addresses = addresses.iter().filter_map(own_address).collect();
        for (family, version) in [(Family::V4, IpVersion::V4), (Family::V6, IpVersion::V6)] {
            let rules = collect("listing rules", self.handle.rule().get(version).execute()).await?;
            observed.rules.extend(rules.iter().filter_map(|message| rule(family, message)));
            let mut all = RouteMessage::default();
            all.header.address_family = family.number();
            all.header.table = TABLE;
            let routes = collect("listing routes", self.handle.route().get(all).execute()).await?;
            observed.routes.extend(
                routes
                    .into_iter()
                    .filter(|message| table_of(message) == u32::from(TABLE))
                    .map(|message| (route(family, &message), message)),
            );
        }
        Ok(observed)
    }

    async fn take(&self, step: &Step) -> Result<(), RouteError> {
        match step {
            Step::AddRule(rule) => {
                let mut request = self.handle.rule().add();
                *request.message_mut() = rule_message(rule);
                settle("adding a rule", request.execute().await, &[nix::libc::EEXIST])
            }
            Step::RemoveRule(rule) => settle(
                "removing a rule",
                self.handle.rule().del(rule_message(rule)).execute().await,
                &[nix::libc::ENOENT],
            ),
            Step::SetRoute(route) => {
                let request = self.handle.route().add(route_message(route)).replace();
                // The device went away, or down, in between: its leaving is noticed, and there is nothing to route.
                let gone: &[i32] = if route.device == LOOPBACK_IFINDEX {
                    &[]
                } else {
                    &[nix::libc::ENODEV, nix::libc::ENETDOWN]
                };
                settle("adding a route", request.execute().await, gone)
            }
            Step::RemoveRoute(message) => settle(
                "removing a route",
                self.handle.route().del(message.clone()).execute().await,
                &[nix::libc::ESRCH],
            ),
        }
    }
}

fn settle(
    call: &'static str,
    result: Result<(), rtnetlink::Error>,
    harmless: &[i32],
) -> Result<(), RouteError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(error))
            if error.to_io().raw_os_error().is_some_and(|code| harmless.contains(&code)) =>
        {
            Ok(())
        }
        Err(error) => Err(Failed::of(call, error).into()),
        Ok(()) => Ok(()),
    }
}

fn own_address(message: &AddressMessage) -> Option<OwnAddress> {
    let mut address = None;
    let mut usable = true;
    for attribute in &message.attributes {
        match attribute {
            // Of a point-to-point interface the own address; elsewhere both are the same.
            AddressAttribute::Local(own) => address = Some(*own),
            AddressAttribute::Address(own) if address.is_none() => address = Some(*own),
            AddressAttribute::Flags(flags) => {
                usable = !flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed);
            }
            _ => {}
        }
    }
    Some(OwnAddress { address: address?, device: message.header.index, usable })
}

/// A rule of the kernel, if it looks up our table.
fn rule(family: Family, message: &RuleMessage) -> Option<Rule> {
    let mut rule = Rule { family, priority: 0, mark: 0, mask: u32::MAX };
    let mut table = u32::from(message.header.table);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            _ => {}
        }
    }
    (table == u32::from(TABLE)).then_some(rule)
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = rule.family.number();
    message.header.table = TABLE;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(rule.mark),
        RuleAttribute::FwMask(rule.mask),
    ];
    message
}

fn table_of(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(number) => Some(*number),
            _ => None,
        })
        .unwrap_or_else(|| u32::from(message.header.table))
}

fn route(family: Family, message: &RouteMessage) -> Route {
    let mut route = Route { family, device: 0, metric: 0, source: None, foreign: false };
    route.foreign = message.header.kind != RouteType::Local
        || message.header.destination_prefix_length != 0
        || message.header.source_prefix_length != 0
        || message.header.tos != 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.device = *index,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::PrefSource(source) => route.source = to_ip(source),
            RouteAttribute::Gateway(_) | RouteAttribute::MultiPath(_) | RouteAttribute::Via(_) => {
                route.foreign = true;
            }
            _ => {}
        }
    }
    route
}

fn to_ip(address: &netlink_packet_route::route::RouteAddress) -> Option<IpAddr> {
    use netlink_packet_route::route::RouteAddress;
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: route.family.number(),
        table: TABLE,
        protocol: RouteProtocol::Other(PROTOCOL),
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Oif(route.device), RouteAttribute::Priority(route.metric)];
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: u32 = 0x8_0000;

    fn observed(addresses: &[(&str, u32)], devices: &[u32]) -> Observed {
        Observed {
            loopback_up: true,
            devices: devices.iter().copied().collect(),
            addresses: addresses
                .iter()
                .map(|(address, device)| OwnAddress {
                    address: address.parse().expect("an address"),
                    device: *device,
                    usable: true,
                })
                .collect(),
            ..Observed::default()
        }
    }

    fn want(sources: &[&str]) -> Want {
        Want {
            mark: MARK,
            sources: sources.iter().map(|source| source.parse().expect("an address")).collect(),
        }
    }

    /// Lists a plan as `ip` would: `4 rule`, `4 dev 1 metric 10 src 10.0.0.1`.
    fn lines(plan: &Plan) -> Vec<String> {
        let digit = |family| if family == Family::V4 { 4 } else { 6 };
        let rules = plan.rules.iter().map(|rule| format!("{} rule", digit(rule.family)));
        let routes = plan.routes.iter().map(|route| {
            let source = route.source.map_or_else(|| "kernel".to_owned(), |source| source.to_string());
            format!("{} dev {} metric {} src {source}", digit(route.family), route.device, route.metric)
        });
        rules.chain(routes).collect()
    }

    #[track_caller]
    fn check(observed: &Observed, want: &Want, expected: &[&str]) {
        assert_eq!(lines(&plan(observed, want)), expected);
    }

    const POD: &[(&str, u32)] =
        &[("127.0.0.1", 1), ("::1", 1), ("10.0.0.1", 2), ("fd00::1", 2), ("fe80::1", 2)];

    #[test]
    fn a_pod_of_both_families_gets_a_rule_and_two_routes_in_each() {
        check(
            &observed(POD, &[2]),
            &want(&["10.0.0.1", "fd00::1"]),
            &[
                "4 rule",
                "6 rule",
                "4 dev 1 metric 10 src 10.0.0.1",
                "4 dev 2 metric 22 src 10.0.0.1",
                "6 dev 1 metric 10 src fd00::1",
                "6 dev 2 metric 22 src fd00::1",
            ],
        );
    }

    #[test]
    fn a_family_without_an_address_beyond_the_link_is_left_alone() {
        check(
            &observed(&[("127.0.0.1", 1), ("::1", 1), ("10.0.0.1", 2), ("fe80::1", 2)], &[2]),
            &want(&["10.0.0.1"]),
            &["4 rule", "4 dev 1 metric 10 src 10.0.0.1", "4 dev 2 metric 22 src 10.0.0.1"],
        );
        check(&observed(&[("127.0.0.1", 1), ("::1", 1)], &[2]), &want(&["10.0.0.1"]), &[]);
    }

    #[test]
    fn an_address_that_ipv6_still_asks_about_is_not_yet_a_source() {
        let mut seen = observed(&[("::1", 1), ("fd00::1", 2)], &[2]);
        seen.addresses[1].usable = false;
        let wanted = want(&["fd00::1"]);
        check(&seen, &wanted, &["6 rule", "6 dev 1 metric 10 src kernel", "6 dev 2 metric 22 src kernel"]);
        seen.addresses[1].usable = true;
        check(&seen, &wanted, &["6 rule", "6 dev 1 metric 10 src fd00::1", "6 dev 2 metric 22 src fd00::1"]);
    }

    #[test]
    fn without_a_declared_source_ipv4_takes_the_namespaces_own_since_the_kernel_would_take_the_target() {
        check(
            &observed(&[("127.0.0.1", 1), ("10.0.0.7", 2)], &[]),
            &want(&["fd00::9"]),
            &["4 rule", "4 dev 1 metric 10 src 10.0.0.7"],
        );
    }

    #[test]
    fn a_device_without_ipv6_gets_no_ipv6_route() {
        check(
            &observed(&[("10.0.0.1", 2), ("fd00::1", 2), ("10.1.0.1", 3)], &[2, 3]),
            &want(&["10.0.0.1", "fd00::1"]),
            &[
                "4 rule",
                "6 rule",
                "4 dev 1 metric 10 src 10.0.0.1",
                "4 dev 2 metric 22 src 10.0.0.1",
                "4 dev 3 metric 23 src 10.0.0.1",
                "6 dev 1 metric 10 src fd00::1",
                "6 dev 2 metric 22 src fd00::1",
            ],
        );
    }

    #[test]
    fn no_more_devices_than_the_limit_get_a_route() {
        let limit = u32::try_from(DEVICES_MAX).expect("small");
        for (count, routed) in [(limit - 1, limit - 1), (limit, limit), (limit + 1, limit), (2_000, limit)] {
            let devices: Vec<u32> = (2..2 + count).collect();
            let plan = plan(&observed(&[("10.0.0.1", 2)], &devices), &want(&["10.0.0.1"]));
            let with_route: Vec<u32> = plan.routes.iter().map(|route| route.device).collect();
            let expected: Vec<u32> = (LOOPBACK_IFINDEX..2 + routed).collect();
            assert_eq!(with_route, expected, "{count} devices: lo, and those with the lowest numbers");
        }
    }

    /// `observed` after `plan` was applied.
    fn applied(mut observed: Observed, plan: &Plan) -> Observed {
        observed.rules = plan.rules.iter().copied().collect();
        observed.routes = plan.routes.iter().map(|new| (new.clone(), route_message(new))).collect();
        observed
    }

    #[test]
    fn what_stands_is_left_alone() {
        let wanted = want(&["10.0.0.1", "fd00::1"]);
        let plan = plan(&observed(POD, &[2]), &wanted);
        assert_eq!(steps(&applied(observed(POD, &[2]), &plan), &plan), []);
    }

    #[test]
    fn a_rule_that_was_deleted_comes_back_and_nothing_else_changes() {
        // T-5
        let plan = plan(&observed(POD, &[2]), &want(&["10.0.0.1", "fd00::1"]));
        let mut seen = applied(observed(POD, &[2]), &plan);
        seen.rules.retain(|rule| rule.family == Family::V6);
        let rule = Rule { family: Family::V4, priority: RULE_PRIORITY, mark: MARK, mask: MARK };
        assert_eq!(steps(&seen, &plan), [Step::AddRule(rule)]);
    }

    #[test]
    fn a_rule_with_another_mask_is_replaced() {
        // T-5: `fwmark 0/0 lookup 91` would bring all traffic of the namespace to lo.
        let plan = plan(&observed(&[("10.0.0.1", 2)], &[2]), &want(&["10.0.0.1"]));
        let mut seen = applied(observed(&[("10.0.0.1", 2)], &[2]), &plan);
        let bent = Rule { mask: 0, mark: 0, ..seen.rules[0] };
        seen.rules.push(bent);
        assert_eq!(steps(&seen, &plan), [Step::RemoveRule(bent)]);
    }

    #[test]
    fn a_foreign_route_in_our_table_goes() {
        // T-5: `ip route add 1.2.3.4 via … table 91` would lead captured packets out again; the guard drops them meanwhile.
        let plan = plan(&observed(&[("10.0.0.1", 2)], &[2]), &want(&["10.0.0.1"]));
        let mut seen = applied(observed(&[("10.0.0.1", 2)], &[2]), &plan);
        let mut message = route_message(&seen.routes[0].0);
        message.header.kind = RouteType::Unicast;
        message.header.destination_prefix_length = 32;
        let bent = route(Family::V4, &message);
        assert!(bent.foreign);
        seen.routes.push((bent, message.clone()));
        assert_eq!(steps(&seen, &plan), [Step::RemoveRoute(message)]);
    }

    #[test]
    fn a_changed_source_replaces_the_route_in_its_place() {
        let old = plan(&observed(POD, &[2]), &want(&["10.0.0.1", "fd00::1"]));
        let seen = applied(observed(&[("10.0.0.2", 2), ("fd00::1", 2)], &[2]), &old);
        let new = plan(&seen, &want(&["10.0.0.2", "fd00::1"]));
        let steps = steps(&seen, &new);
        assert_eq!(steps.len(), 2, "{steps:?}");
        assert!(steps.iter().all(|step| matches!(step, Step::SetRoute(route) if route.family == Family::V4)));
    }

    #[test]
    fn removal_takes_the_rules_before_the_routes() {
        let plan = plan(&observed(POD, &[2]), &want(&["10.0.0.1", "fd00::1"]));
        let steps = steps(&applied(observed(POD, &[2]), &plan), &Plan::default());
        let kinds: Vec<bool> = steps.iter().map(|step| matches!(step, Step::RemoveRule(_))).collect();
        assert_eq!(kinds, [true, true, false, false, false, false]);
    }

    #[test]
    fn what_is_written_is_what_is_read_back() {
        let plan = plan(&observed(POD, &[2]), &want(&["10.0.0.1", "fd00::1"]));
        for expected in &plan.routes {
            assert_eq!(&route(expected.family, &route_message(expected)), expected);
        }
        for expected in &plan.rules {
            assert_eq!(rule(expected.family, &rule_message(expected)).as_ref(), Some(expected));
        }
    }
}
