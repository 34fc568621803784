//! Who leaves, who changes, who enters: the difference between what is enrolled and what a snapshot declares.

use std::{collections::BTreeMap, sync::Arc};

use node_core::{
    kernel_plan::KernelWorkload,
    workload::{ObjectName, Workload},
};

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Ends the enrolment; `cause` is a bounded label.
    Leave {
        name: ObjectName,
        cause: &'static str,
    },
    /// The same enrolment with other addresses or ports.
    Change(Arc<Workload>),
    Enter(Arc<Workload>),
}

/// Lists the steps, leaving first: a workload that lost an address has lost it before another gains it (T-17).
pub(super) fn plan(
    enrolled: &BTreeMap<ObjectName, Arc<Workload>>,
    declared: &BTreeMap<ObjectName, Arc<Workload>>,
) -> Vec<Step> {
    let mut leaving = Vec::new();
    let mut changing = Vec::new();
    let mut entering = Vec::new();
    for (name, old) in enrolled {
        let Some(new) = declared.get(name) else {
            leaving.push(Step::Leave { name: name.clone(), cause: "removed" });
            continue;
        };
        let cause = if new.placement != old.placement {
            "moved"
        } else if new.identity != old.identity {
            "identity_changed"
        } else {
            if KernelWorkload::of(new) != KernelWorkload::of(old) {
                changing.push(Step::Change(Arc::clone(new)));
            }
            continue;
        };
        leaving.push(Step::Leave { name: name.clone(), cause });
        entering.push(Step::Enter(Arc::clone(new)));
    }
    let new = declared.iter().filter(|(name, _)| !enrolled.contains_key(*name));
    entering.extend(new.map(|(_, workload)| Step::Enter(Arc::clone(workload))));
    leaving.into_iter().chain(changing).chain(entering).collect()
}

/// How the kernel's half calls a workload: the same after a restart.
pub(super) fn key(name: &ObjectName) -> String {
    format!("{}_{}", name.namespace, name.name)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use node_core::workload::Placement;
    use spiffe_id::SpiffeId;

    use super::*;

    fn workload(name: &str, change: impl FnOnce(&mut Workload)) -> Arc<Workload> {
        let mut workload = Workload {
            name: ObjectName::new("shop", name),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            service_account: "cart".to_owned(),
            identity: "spiffe://cluster.local/ns/shop/sa/cart".parse::<SpiffeId>().expect("a name"),
            node: "node-a".to_owned(),
            addresses: vec!["10.0.0.1".parse().expect("an address")],
            placement: Placement::NetworkNamespace(PathBuf::from(format!("/run/netns/{name}"))),
            ports: Vec::new(),
            exempt_inbound_ports: Vec::new(),
            enrolled: true,
        };
        change(&mut workload);
        Arc::new(workload)
    }

    fn table(workloads: &[Arc<Workload>]) -> BTreeMap<ObjectName, Arc<Workload>> {
        workloads.iter().map(|workload| (workload.name.clone(), Arc::clone(workload))).collect()
    }

    /// Steps as words: `leave a removed`, `change a`, `enter a`.
    #[track_caller]
    fn check(enrolled: &[Arc<Workload>], declared: &[Arc<Workload>], expected: &[&str]) {
        let words: Vec<String> = plan(&table(enrolled), &table(declared))
            .iter()
            .map(|step| match step {
                Step::Leave { name, cause } => format!("leave {} {cause}", name.name),
                Step::Change(workload) => format!("change {}", workload.name.name),
                Step::Enter(workload) => format!("enter {}", workload.name.name),
            })
            .collect();
        assert_eq!(words, expected);
    }

    #[test]
    fn what_is_declared_as_it_is_enrolled_is_left_alone() {
        check(&[workload("a", |_| {})], &[workload("a", |_| {})], &[]);
    }

    #[test]
    fn labels_are_no_reason_to_touch_the_kernel() {
        let labelled = workload("a", |a| {
            a.labels.insert("tier".to_owned(), "web".to_owned());
        });
        check(&[workload("a", |_| {})], &[labelled], &[]);
    }

    #[test]
    fn leaving_comes_before_changing_before_entering() {
        check(
            &[workload("a", |_| {}), workload("b", |_| {})],
            &[workload("0", |_| {}), workload("a", |a| a.exempt_inbound_ports.push(9100))],
            &["leave b removed", "change a", "enter 0"],
        );
    }

    #[test]
    fn another_address_changes_the_enrolment() {
        let other = workload("a", |a| a.addresses = vec!["10.0.0.2".parse().expect("an address")]);
        check(&[workload("a", |_| {})], &[other], &["change a"]);
    }

    #[test]
    fn another_namespace_is_another_enrolment() {
        let moved = workload("a", |a| a.placement = Placement::NetworkNamespace("/run/netns/other".into()));
        check(&[workload("a", |_| {})], &[moved], &["leave a moved", "enter a"]);
    }

    #[test]
    fn a_pod_that_became_a_host_service_is_another_enrolment() {
        let moved = workload("a", |a| a.placement = Placement::SystemdUnit("a.service".to_owned()));
        check(&[workload("a", |_| {})], &[moved], &["leave a moved", "enter a"]);
    }

    #[test]
    fn another_identity_keeps_no_connection_of_the_old_one() {
        let other = workload("a", |a| {
            a.identity = "spiffe://cluster.local/ns/shop/sa/pay".parse().expect("a name");
        });
        check(&[workload("a", |_| {})], &[other], &["leave a identity_changed", "enter a"]);
    }
}
