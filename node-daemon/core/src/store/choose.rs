//! Which version of each object is in force: gather the candidates, find the contradictions, commit.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Content, Held, Key, KeyKind, Problem, Store, Version,
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
        let title = format!("{} {}", key.kind.label(), key.name);
        for other in others {
            let reason =
                format!("the same object stands in {owner}, which is in force: remove one of the two");
            proposal.problems.push(Problem::of_document(other, title.clone(), "metadata.name", reason));
        }
        let versions: Vec<&Version> = own.iter().filter_map(|source| self.version(source)).collect();
        let chosen = match (versions.as_slice(), held) {
            ([version], _) => Some(*version),
            (several, Some(held)) => several.iter().find(|version| version.says_the_same(held)).copied(),
            (several, None) => several.first().copied(),
        };
        for version in
            versions.iter().filter(|version| chosen.is_none_or(|chosen| !std::ptr::eq(chosen, **version)))
        {
            let reason =
                "the same object stands twice in this file, and only one is in force: remove one of the two";
            let source = &version.object.source;
            proposal.problems.push(Problem::of_document(
                source,
                title.clone(),
                "metadata.name",
                reason.to_owned(),
            ));
        }
        match chosen.map(|version| (version, &version.content)) {
            None => {}
            Some((version, Ok(content))) => {
                let claims = content.claims();
                let (object, content) = (Arc::clone(&version.object), Arc::clone(content));
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

    fn version(&self, source: &Source) -> Option<&Version> {
        let document = self.files.get(&source.file)?.documents.get(&source.index)?;
        Some(&document.version)
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
                    self.held.get(&key).filter(|held| !Arc::ptr_eq(&held.object, &loser.object)).cloned();
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

    /// Of two claimants of a part of an address: the one that owned it before, else the one whose document comes first.
    fn goes_before(
        &self,
        rival: &Key,
        own: &Key,
        (address, contested): (IpAddr, &Share),
        proposals: &Proposals,
    ) -> bool {
        let owned = |key: &Key| {
            let mut owners = self.holders.at(&address).iter();
            owners.any(|(holder, before)| holder == key && contested.overlap(before).is_some())
        };
        let source = |key: &Key| {
            let held = proposals.get(key).and_then(|proposal| proposal.held.as_ref());
            held.map(|held| held.object.source.clone())
        };
        match (owned(rival), owned(own)) {
            (true, false) => true,
            (false, true) => false,
            (true, true) | (false, false) => (source(rival), rival) < (source(own), own),
        }
    }

    fn commit(&mut self, proposals: Proposals) {
        // All addresses are given back before any is taken.
        for key in proposals.keys() {
            if let Some(held) = self.held.get(key) {
                self.holders.remove(key, &held.claims);
            }
        }
        for (key, proposal) in proposals {
            let Proposal { held, mut problems, is_waiting } = proposal;
            if let KeyKind::Policy(kind) = &key.kind {
                problems.extend(self.commit_policy(kind.clone(), &key, held.as_ref()));
            }
            match held {
                Some(held) => {
                    self.holders.add(&key, &held.claims);
                    self.held.insert(key.clone(), held);
                }
                None => {
                    self.held.remove(&key);
                }
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
    if held.is_some_and(|held| !matches!(&*held.content, Content::Ignored)) {
        problem.reason.push_str("; the version before stays in force");
    }
    problem
}
