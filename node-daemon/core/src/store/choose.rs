//! Which version of each object is in force: gather the candidates, find the contradictions, commit.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Held, Key, KeyKind, Problem, Store, Version,
    claims::{Holders, Share},
};
use crate::decode::{InvalidObject, Source};

/// What may come into force for one object.
struct Proposal {
    /// `None`: the object is gone, or was never good.
    held: Option<Held>,
    problems: Vec<Problem>,
    /// It lost an address to another object, and gets it when that one leaves.
    is_waiting: bool,
}

type Proposals = BTreeMap<Key, Proposal>;

impl Store {
    /// Decides anew about these objects, and about those that wait for an address.
    pub(super) fn settle(&mut self, mut touched: BTreeSet<Key>) {
        touched.extend(self.waiting.iter().cloned());
        let mut proposals: Proposals =
            touched.into_iter().map(|key| (key.clone(), self.propose(&key))).collect();
        self.resolve_addresses(&mut proposals);
        self.commit(proposals);
    }

    fn propose(&self, key: &Key) -> Proposal {
        let held = self.held.get(key);
        let none = BTreeSet::new();
        let speakers = self.speakers.get(key).unwrap_or(&none);
        let mut proposal = Proposal { held: held.cloned(), problems: Vec::new(), is_waiting: false };
        let Some(owner) = self.owner(held, speakers) else {
            // Gone, unless a document of its file may be its newest version.
            if !held.is_some_and(|held| self.may_stand_unread(key, held)) {
                proposal.held = None;
            }
            return proposal;
        };
        let (own, others): (Vec<&Source>, Vec<&Source>) =
            speakers.iter().partition(|source| source.file == owner.file);
        let elsewhere = |other: &&Source| {
            key.problem(
                other,
                format!("the same object stands in {owner}, which is in force: remove one of the two"),
            )
        };
        proposal.problems.extend(others.iter().map(elsewhere));
        let versions: Vec<&Version> = own.iter().filter_map(|source| self.spoken(source)).collect();
        let chosen = choose(&versions, held);
        let not_chosen =
            versions.iter().filter(|version| chosen.is_none_or(|chosen| !std::ptr::eq(chosen, **version)));
        proposal.problems.extend(not_chosen.map(|version| {
            let reason =
                "the same object stands twice in this file, and only one is in force: remove one of the two";
            key.problem(&version.object.source, reason.to_owned())
        }));
        match chosen.map(|version| (version, &version.content)) {
            None => {}
            Some((version, Ok(content))) => {
                // What says the same is the same: its workload is shared with the snapshots before.
                let same = held.filter(|held| version.says_the_same(held));
                let content = same.map_or_else(|| Arc::clone(content), |held| Arc::clone(&held.content));
                let (object, claims) = (Arc::clone(&version.object), content.claims());
                proposal.held = Some(Held { object, content, claims });
            }
            Some((_, Err(refused))) => proposal.problems.push(refused_version(refused, held)),
        }
        proposal
    }

    /// The document that speaks for an object: of the file that did so before, else the first.
    fn owner(&self, held: Option<&Held>, speakers: &BTreeSet<Source>) -> Option<Source> {
        let before = held.map(|held| &held.object.source);
        let same_file = |source: &&Source| before.is_some_and(|before| before.file == source.file);
        speakers.iter().find(same_file).or_else(|| speakers.first()).cloned()
    }

    fn spoken(&self, source: &Source) -> Option<&Version> {
        self.files.get(&source.file)?.versions.get(&source.index)
    }

    /// Is there a document without a readable head that may be the newest version of this object?
    fn may_stand_unread(&self, key: &Key, held: &Held) -> bool {
        let Some(file) = self.files.get(&held.object.source.file) else { return false };
        file.invalid.iter().any(|refused| {
            let same_kind = refused.kind_name.is_empty()
                || refused.kind_name == "List"
                || key.is_named(&refused.kind_name);
            same_kind && refused.name.as_ref().is_none_or(|name| *name == key.name)
        })
    }

    /// Takes back newest versions that claim what another object owns, until nothing contradicts.
    fn resolve_addresses(&self, proposals: &mut Proposals) {
        loop {
            let lost = self.lost_addresses(proposals);
            if lost.is_empty() {
                return;
            }
            for (key, reason) in lost {
                let Some(proposal) = proposals.get_mut(&key) else { continue };
                let Some(loser) = proposal.held.take() else { continue };
                let field = if key.kind.label() == "Service" { "spec.clusterIP" } else { "spec.addresses" };
                proposal.problems.push(Problem::of_document(
                    &loser.object.source,
                    loser.object.title(),
                    field,
                    reason,
                ));
                proposal.is_waiting = true;
                // The version before stays, unless it is the one that lost.
                proposal.held =
                    self.held.get(&key).filter(|held| !Arc::ptr_eq(&held.content, &loser.content)).cloned();
            }
        }
    }

    /// Who claims an address that another owns already, or that an earlier document claims too.
    fn lost_addresses(&self, proposals: &Proposals) -> BTreeMap<Key, String> {
        let mut lost = BTreeMap::new();
        let mut claimed = Holders::default();
        let claimants = proposals.iter().filter_map(|(key, proposal)| Some((key, proposal.held.as_ref()?)));
        for (key, held) in claimants.clone() {
            claimed.add(key, &held.claims);
        }
        for (key, held) in claimants {
            for (address, share) in &held.claims {
                let settled =
                    self.holders.at(address).iter().filter(|(rival, _)| !proposals.contains_key(rival));
                let settled = settled.filter(|(_, rival_share)| share.overlap(rival_share).is_some());
                let proposed = claimed.at(address).iter().filter(|(rival, rival_share)| {
                    rival != key
                        && share.overlap(rival_share).is_some_and(|contested| {
                            self.goes_before(rival, key, (*address, &contested), proposals)
                        })
                });
                let Some((rival, rival_share)) = settled.chain(proposed).next() else { continue };
                let part = share.overlap(rival_share).map(|contested| contested.words()).unwrap_or_default();
                let rival = format!("{} {}", rival.kind.label(), rival.name);
                lost.insert(
                    key.clone(),
                    format!("{address}{part} belongs to {rival}: give each its own address"),
                );
                break;
            }
        }
        lost
    }

    /// Of two claimants of a part of an address: the one that does not change, else the one that owned it before, else
    /// the one whose document comes first.
    fn goes_before(
        &self,
        rival: &Key,
        own: &Key,
        (address, contested): (IpAddr, &Share),
        proposals: &Proposals,
    ) -> bool {
        let proposed = |key: &Key| proposals.get(key).and_then(|proposal| proposal.held.as_ref());
        let is_unchanged = |key: &Key| match (proposed(key), self.held.get(key)) {
            (Some(proposed), Some(held)) => Arc::ptr_eq(&proposed.content, &held.content),
            (Some(_) | None, None) | (None, Some(_)) => false,
        };
        let owned = |key: &Key| {
            let mut owners = self.holders.at(&address).iter();
            owners.any(|(holder, before)| holder == key && contested.overlap(before).is_some())
        };
        let rank = |key: &Key| {
            let source = proposed(key).map(|held| held.object.source.clone());
            (!is_unchanged(key), !owned(key), source, key.clone())
        };
        rank(rival) < rank(own)
    }

    fn commit(&mut self, proposals: Proposals) {
        // All addresses are given back before any is taken.
        for key in proposals.keys() {
            if let Some(held) = self.held.remove(key) {
                self.holders.remove(key, &held.claims);
                let file = &held.object.source.file;
                if let Some(of_file) = self.held_by_file.get_mut(file) {
                    of_file.remove(key);
                    if of_file.is_empty() {
                        self.held_by_file.remove(file);
                    }
                }
            }
        }
        for (key, proposal) in proposals {
            let Proposal { held, mut problems, is_waiting } = proposal;
            if let KeyKind::Policy(kind) = &key.kind {
                problems.extend(self.commit_policy(Arc::clone(kind), &key, held.as_ref()));
            }
            if let Some(held) = held {
                self.holders.add(&key, &held.claims);
                let of_file = self.held_by_file.entry(Arc::clone(&held.object.source.file));
                of_file.or_default().insert(key.clone());
                self.held.insert(key.clone(), held);
            }
            if is_waiting {
                self.waiting.insert(key.clone());
            } else {
                self.waiting.remove(&key);
            }
            if problems.is_empty() {
                self.troubles.remove(&key);
            } else {
                self.troubles.insert(key, problems);
            }
        }
    }

    /// The policy room keeps the last good version of its objects itself.
    fn commit_policy(&mut self, kind: Arc<str>, key: &Key, held: Option<&Held>) -> Option<Problem> {
        match held {
            Some(held) => self.policies.insert(&held.object).err().map(|refused| Problem::from(&refused)),
            None => {
                self.policies.remove(&kind, &key.name);
                None
            }
        }
    }
}

/// One document speaks for itself; of several in one file, the one that says what is in force, or the first one.
fn choose<'a>(versions: &[&'a Version], held: Option<&Held>) -> Option<&'a Version> {
    match (versions, held) {
        ([version], _) => Some(version),
        (several, Some(held)) => several.iter().find(|version| version.says_the_same(held)).copied(),
        (several, None) => several.first().copied(),
    }
}

impl Key {
    /// A problem with the object as a whole.
    fn problem(&self, source: &Source, reason: String) -> Problem {
        Problem::of_document(source, format!("{} {}", self.kind.label(), self.name), "metadata.name", reason)
    }
}

impl Version {
    fn says_the_same(&self, held: &Held) -> bool {
        let (own, other) = (&self.object, &held.object);
        own.spec == other.spec
            && own.labels == other.labels
            && own.annotations == other.annotations
            && own.created == other.created
            && own.api_version == other.api_version
            && own.extra == other.extra
    }
}

fn refused_version(refused: &InvalidObject, held: Option<&Held>) -> Problem {
    let mut problem = Problem::from(refused);
    if held.is_some() {
        problem.reason.push_str("; the version before stays in force");
    }
    problem
}
