//! What policy costs by itself, without a socket: 10,000 policies of both ages, their compilation, the change of one, and
//! the decision on one connection. One thread, through the public API of `node-core`.
//!
//! The kinds of a figure's runs are interleaved: each round takes one of each, so that what disturbs the machine for a
//! while disturbs all alike.

use std::{
    fmt::Write as _,
    fs,
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use node_core::{
    policy::{ConnectionFacts, Presented},
    snapshot::Snapshot,
    store::{Store, Update},
    workload::ObjectName,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::machine;

/// Policies of the measured mesh.
pub const POLICIES: usize = 10_000;

/// Policies of one file.
const POLICIES_OF_FILE: usize = 100;

/// Namespaces of the measured mesh.
const NAMESPACES: usize = 50;

/// Enrolled workloads, all of the node that is compiled for: three times the pods that a node of Kubernetes has at most
/// unless it is told otherwise.
const WORKLOADS: usize = 300;

/// Pods of one namespace.
const PODS: usize = WORKLOADS / NAMESPACES;

/// Decisions that are timed together in each sample of one round. A clock's own reading takes some 20 ns, of the order of
/// what is measured: one sample is many decisions, and the median of samples is one decision's mean.
const DECISIONS_OF_SAMPLE: usize = 64;

/// Samples of one round.
const SAMPLES_OF_ROUND: usize = 4_000;

/// The node that is compiled for.
const NODE: &str = "node-a";

/// One figure over all rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was timed, from where to where.
    pub name: String,
    /// `ns` or `ms`.
    pub unit: String,
    /// Over all rounds.
    pub median: f64,
    /// Over all rounds.
    pub min: f64,
    /// Over all rounds.
    pub max: f64,
    /// What it shall not exceed, in the same unit.
    pub target: Option<f64>,
}

/// All figures, and where they were taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Name and notable features of the processor.
    pub cpu: String,
    /// Of the mesh.
    pub policies: usize,
    /// Of the mesh.
    pub workloads: usize,
    /// Interleaved rounds.
    pub rounds: u32,
    /// In the order of the table.
    pub figures: Vec<Figure>,
}

/// Measures in this many rounds.
///
/// # Errors
/// If the documents are not what the store accepts, or a decision is not what its policies say.
pub fn measure(rounds: u32) -> Result<Figures> {
    ensure!(rounds > 0, "at least one round");
    let files = files();
    let mut measured = Measured::default();
    for round in 1..=rounds {
        eprintln!("bench: policy: round {round} of {rounds}");
        measured.round(&files, round)?;
    }
    Ok(Figures {
        cpu: machine::processor(),
        policies: POLICIES,
        workloads: WORKLOADS,
        rounds,
        figures: measured.figures(),
    })
}

/// Writes policy.json and policy.md into a folder.
///
/// # Errors
/// If they cannot be written.
pub fn write(figures: &Figures, folder: &Path) -> Result<Vec<PathBuf>> {
    let files =
        [("policy.json", serde_json::to_string_pretty(figures)? + "\n"), ("policy.md", figures.markdown())];
    let mut written = Vec::new();
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        written.push(path);
    }
    Ok(written)
}

impl Figures {
    /// As a table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "{}; {} policies in {NAMESPACES} namespaces, {} workloads, all of them of the node; one thread; {} interleaved \
             rounds.\n\n| | median (least to most) | target |\n|---|---|---|\n",
            self.cpu, self.policies, self.workloads, self.rounds
        );
        for Figure { name, unit, median, min, max, target } in &self.figures {
            let target = target.map_or_else(|| "-".to_owned(), |target| format!("at most {target} {unit}"));
            // Writing to a String does not fail.
            let _ = writeln!(text, "| {name} | {median:.4} {unit} ({min:.4} to {max:.4}) | {target} |");
        }
        text
    }
}

/// Each figure by round.
#[derive(Default)]
struct Measured {
    parse: Vec<f64>,
    decode: Vec<f64>,
    whole: Vec<f64>,
    compile: Vec<f64>,
    change: Vec<f64>,
    decision_p50: Vec<f64>,
    decision_p99: Vec<f64>,
}

impl Measured {
    fn round(&mut self, files: &[(String, String)], round: u32) -> Result<()> {
        let (documents, taken) = timed(|| documents(files));
        self.parse.push(taken);
        let documents = documents?;
        let (updates, taken) = timed(|| -> Vec<Update> {
            documents.into_iter().map(|(name, documents)| Update::replace(&name, documents)).collect()
        });
        self.decode.push(taken);
        let mut store = Store::new(NODE, "cluster.local".parse()?);
        let (snapshot, taken) = timed(|| {
            for update in updates {
                store.apply(update);
            }
            store.snapshot()
        });
        self.whole.push(taken);
        check(&snapshot)?;
        // What changes is no policy: the whole snapshot is made again, of objects that were read before.
        store.bar([format!("spiffe://cluster.local/ns/none/sa/{round}").parse()?].into());
        let (snapshot, taken) = timed(|| store.snapshot());
        self.compile.push(taken);
        let (name, text) = &files[files.len() / 2];
        let changed = changed(text)?;
        let update = Update::replace(name, yaml(&changed)?);
        let number = snapshot.number();
        let (snapshot, taken) = timed(|| {
            store.apply(update);
            store.snapshot()
        });
        self.change.push(taken);
        ensure!(snapshot.number() == number + 1, "the changed policy made no new snapshot");
        check(&snapshot)?;
        let mut samples = decisions(&snapshot)?;
        samples.sort_by(f64::total_cmp);
        self.decision_p50.push(samples[samples.len() / 2]);
        self.decision_p99.push(samples[samples.len() * 99 / 100]);
        Ok(())
    }

    fn figures(&mut self) -> Vec<Figure> {
        let figures: [(&str, &str, &mut Vec<f64>, Option<f64>); 7] = [
            (
                "layer-4 decision (`Snapshot::admit`), median of means of 64",
                "ns",
                &mut self.decision_p50,
                Some(1000.0),
            ),
            ("the same, 99th percentile of means of 64", "ns", &mut self.decision_p99, None),
            (
                "all compiled: decoded documents into an empty store, to the snapshot",
                "ms",
                &mut self.whole,
                Some(100.0),
            ),
            ("of it, the snapshot of objects that the store has", "ms", &mut self.compile, None),
            ("one policy changed: its decoded file, to the new snapshot", "ms", &mut self.change, Some(5.0)),
            ("beforehand: YAML to values", "ms", &mut self.parse, None),
            ("beforehand: values to decoded documents", "ms", &mut self.decode, None),
        ];
        figures
            .into_iter()
            .map(|(name, unit, runs, target)| {
                runs.sort_by(f64::total_cmp);
                Figure {
                    name: name.to_owned(),
                    unit: unit.to_owned(),
                    median: runs[runs.len() / 2],
                    min: runs[0],
                    max: runs[runs.len() - 1],
                    target,
                }
            })
            .collect()
    }
}

/// What it gives, and the milliseconds that it took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed().as_secs_f64() * 1e3)
}

/// That nothing of what shall be measured was refused.
fn check(snapshot: &Snapshot) -> Result<()> {
    if let Some(problem) = snapshot.problems().first() {
        anyhow::bail!("{problem}");
    }
    let statuses = snapshot.statuses();
    ensure!(statuses.len() == POLICIES, "{} policies instead of {POLICIES}", statuses.len());
    let refused = statuses.iter().find(|status| !status.accepted);
    ensure!(refused.is_none(), "{refused:?}");
    ensure!(snapshot.local().count() == WORKLOADS, "not all workloads are enrolled");
    Ok(())
}

/// Nanoseconds of one decision, by sample: each workload in turn is asked for by a neighbour that some rule allows, and by
/// one that none does.
fn decisions(snapshot: &Snapshot) -> Result<Vec<f64>> {
    let mut asked = Vec::new();
    for number in 0..WORKLOADS {
        for (account, is_allowed) in [("a0", true), ("stranger", false)] {
            let facts = facts(snapshot, number, account)?;
            ensure!(snapshot.admit(&facts).is_ok() == is_allowed, "{account} at {}", facts.destination.name);
            asked.push(facts);
        }
    }
    let mut at = asked.iter().cycle();
    let mut samples = Vec::with_capacity(SAMPLES_OF_ROUND);
    for _ in 0..SAMPLES_OF_ROUND {
        let batch: Vec<&ConnectionFacts> = at.by_ref().take(DECISIONS_OF_SAMPLE).collect();
        let began = Instant::now();
        for facts in batch {
            // The verdict's end is part of its cost.
            drop(black_box(snapshot.admit(black_box(facts))));
        }
        samples.push(began.elapsed().as_secs_f64() * 1e9 / DECISIONS_OF_SAMPLE as f64);
    }
    Ok(samples)
}

fn facts(snapshot: &Snapshot, number: usize, account: &str) -> Result<ConnectionFacts> {
    let (namespace, pod) = (number / PODS, number % PODS);
    let name = ObjectName::new(&format!("n{namespace}"), &format!("w{pod}"));
    let destination = snapshot.workload(&name).with_context(|| format!("{name} is unknown"))?;
    Ok(ConnectionFacts {
        presented: Presented::Tunnel(format!("spiffe://cluster.local/ns/n{namespace}/sa/{account}").parse()?),
        source_address: IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)),
        destination_address: address(namespace, pod).parse()?,
        destination_port: 8080,
        destination: Arc::clone(destination),
    })
}

fn documents(files: &[(String, String)]) -> Result<Vec<(String, Vec<Value>)>> {
    files.iter().map(|(name, text)| Ok((name.clone(), yaml(text)?))).collect()
}

/// As the daemon reads it: a bare `ON` is a word.
fn yaml(text: &str) -> Result<Vec<Value>> {
    Ok(serde_saphyr::from_multiple_with_options(text, serde_saphyr::options! { strict_booleans: true })?)
}

/// The file with one client more in its first policy that names one.
fn changed(text: &str) -> Result<String> {
    let new = text.replacen("/sa/a0\"", "/sa/changed\", \"cluster.local/ns/other/sa/a0\"", 1);
    ensure!(new != text, "no policy to change");
    Ok(new)
}

fn address(namespace: usize, pod: usize) -> String {
    format!("10.8.{namespace}.{}", pod + 1)
}

/// Name and text of each file: the mesh, then the policies in their order.
fn files() -> Vec<(String, String)> {
    let mut mesh = Vec::new();
    for namespace in 0..NAMESPACES {
        for pod in 0..PODS {
            mesh.push(workload(namespace, pod));
            mesh.push(service(namespace, pod));
        }
    }
    let mut files = vec![("mesh.yaml".to_owned(), mesh.join("---\n"))];
    let policies: Vec<String> = (0..POLICIES).map(policy).collect();
    for (number, some) in policies.chunks(POLICIES_OF_FILE).enumerate() {
        files.push((format!("policies-{number:03}.yaml"), some.join("---\n")));
    }
    files
}

fn workload(namespace: usize, pod: usize) -> String {
    format!(
        "apiVersion: culvert.io/v1alpha1\nkind: Workload\n\
         metadata: {{name: w{pod}, namespace: n{namespace}, labels: {{app: w{pod}}}}}\n\
         spec:\n  serviceAccount: a{pod}\n  node: {NODE}\n  addresses: [\"{}\"]\n  \
         networkNamespace: /run/netns/n{namespace}-w{pod}\n",
        address(namespace, pod)
    )
}

fn service(namespace: usize, pod: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: w{pod}, namespace: n{namespace}}}\n\
         spec:\n  clusterIP: 10.96.{namespace}.{}\n  selector: {{app: w{pod}}}\n  \
         ports: [{{name: tcp, port: 80, targetPort: 8080}}]\n",
        pod + 1
    )
}

/// Of hundred: forty-eight that allow, sixteen that deny, six of transport, and fifteen roles with their bindings. The
/// first one decides where the roles count. Two pods of each namespace have roles alone, the others policies.
fn policy(number: usize) -> String {
    if number == 0 {
        return "apiVersion: rbac.istio.io/v1alpha1\nkind: ClusterRbacConfig\nmetadata: {name: default}\n\
                spec: {mode: \"ON\"}\n"
            .to_owned();
    }
    // Files go round the namespaces: each namespace has two.
    let (namespace, place) = (number / POLICIES_OF_FILE % NAMESPACES, number % POLICIES_OF_FILE);
    let head = |group: &str, kind: &str, name: String| {
        format!("apiVersion: {group}\nkind: {kind}\nmetadata: {{name: {name}, namespace: n{namespace}}}\n")
    };
    let app = place % (PODS - 2);
    let selector = format!("selector: {{matchLabels: {{app: w{app}}}}}");
    match place {
        0..48 => {
            // One in twelve lets the neighbour in, the others clients from elsewhere.
            let client = if place / (PODS - 2) == 11 {
                format!("n{namespace}/sa/a0")
            } else {
                format!("c{place}/sa/a0")
            };
            format!(
                "{}spec:\n  {selector}\n  action: ALLOW\n  \
                 rules: [{{from: [{{source: {{principals: [\"cluster.local/ns/{client}\"]}}}}], \
                 to: [{{operation: {{ports: [\"8080\"]}}}}]}}]\n",
                head("security.istio.io/v1", "AuthorizationPolicy", format!("allow{number}")),
            )
        }
        48..64 => format!(
            "{}spec:\n  {selector}\n  action: DENY\n  rules: [{{from: [{{source: {{namespaces: [bad{place}]}}}}]}}]\n",
            head("security.istio.io/v1", "AuthorizationPolicy", format!("deny{number}")),
        ),
        64..70 => format!(
            "{}spec:\n  selector: {{matchLabels: {{app: w{}}}}}\n  mtls: {{mode: STRICT}}\n",
            head("security.istio.io/v1", "PeerAuthentication", format!("peer{number}")),
            place - 64,
        ),
        _ => {
            let role = number / 2 * 2;
            let pod = PODS - 2 + role / 2 % 2;
            // One in fifteen lets the neighbour in.
            let account = if place < 74 { "a0".to_owned() } else { format!("x{role}") };
            if number.is_multiple_of(2) {
                format!(
                    "{}spec:\n  rules: [{{services: [\"w{pod}.n{namespace}.svc.cluster.local\"]}}]\n",
                    head("rbac.istio.io/v1alpha1", "ServiceRole", format!("role{role}")),
                )
            } else {
                format!(
                    "{}spec:\n  subjects: [{{user: \"cluster.local/ns/n{namespace}/sa/{account}\"}}]\n  \
                     roleRef: {{kind: ServiceRole, name: role{role}}}\n",
                    head("rbac.istio.io/v1alpha1", "ServiceRoleBinding", format!("binding{number}")),
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_round_measures_everything_and_says_nothing_of_how_fast_it_must_be() {
        let figures = measure(1).expect("the measured mesh is good");
        assert_eq!(figures.figures.len(), 7);
        for figure in &figures.figures {
            assert!(
                figure.min > 0.0 && figure.median >= figure.min && figure.max >= figure.median,
                "{figure:?}"
            );
        }
        let table = figures.markdown();
        assert!(table.contains("10000 policies") && table.matches("\n| ").count() == 8, "{table}");
    }

    #[test]
    fn a_changed_file_differs_in_one_policy() {
        let files = files();
        let (_, text) = &files[files.len() / 2];
        let new = changed(text).expect("a policy that names a client");
        let documents = [text, &new].map(|text| yaml(text).expect("YAML"));
        assert_eq!(documents[0].iter().zip(&documents[1]).filter(|(old, new)| old != new).count(), 1);
    }
}
