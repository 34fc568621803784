//! `culvert policy convert`: objects of 2018 as objects of the current API, written only together with a proof.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use node_core::{
    decode::{Object, Source, object},
    policy::{
        PolicyObjects,
        convert::{self, Documents, Proof, Proven},
    },
};
use spiffe_id::TrustDomain;

use super::library::{self, OfFile};
use crate::control::file;

/// What came of a folder. Displays as the summary.
#[derive(Debug)]
pub enum Converted {
    /// There is nothing of 2018 in it.
    Nothing,
    /// The current API cannot say it: sentences by object and field.
    Refused(Vec<String>),
    /// It was written, and what was written does not say the same.
    Differs {
        proof: Proof,
    },
    Written {
        yaml: String,
        objects: usize,
        proof: Proof,
    },
}

/// Why nothing was converted.
#[derive(Debug, thiserror::Error)]
pub enum NoConversion {
    #[error("{0}")]
    Documents(String),
    /// Must not be: what is written here is read here.
    #[error("what was written cannot be read back: {0}")]
    Written(String),
}

/// Converts the documents of a folder, or of one file.
///
/// # Errors
/// Documents that cannot be read, or contradict each other.
pub fn convert(documents: &Path, trust_domain: &TrustDomain) -> Result<Converted, NoConversion> {
    let files = library::load(documents).map_err(NoConversion::Documents)?;
    let objects = objects(&files)?;
    if !objects.iter().any(convert::is_of_2018) {
        return Ok(Converted::Nothing);
    }
    let snapshot = library::snapshot(&files, "", trust_domain);
    let workloads: BTreeMap<_, _> =
        snapshot.workloads().map(|workload| (workload.name.clone(), Arc::clone(workload))).collect();
    let services: BTreeMap<_, _> =
        snapshot.services().map(|service| (service.name.clone(), service.clone())).collect();
    let documents =
        Documents { objects: &objects, mesh: snapshot.mesh(), workloads: &workloads, services: &services };
    let conversion = convert::convert(&documents);
    if !conversion.refusals.is_empty() {
        return Ok(Converted::Refused(conversion.refusals.iter().map(ToString::to_string).collect()));
    }
    let yaml = conversion.yaml();
    let proof = convert::prove(&documents, &reread(&yaml)?);
    Ok(match proof.proven {
        Proven::Differs(_) => Converted::Differs { proof },
        Proven::Equivalent | Proven::Unknown(_) => {
            Converted::Written { yaml, objects: conversion.count(), proof }
        }
    })
}

/// The objects of policy; each may stand once.
fn objects(files: &[OfFile]) -> Result<Vec<Object>, NoConversion> {
    let (mut objects, mut known) = (Vec::new(), BTreeMap::new());
    for (file, documents) in files {
        for (index, document) in documents.iter().enumerate().filter(|(_, document)| !document.is_null()) {
            let read = object(document.clone(), Source::new(file, index));
            let read = read.map_err(|invalid| NoConversion::Documents(invalid.to_string()))?;
            if !PolicyObjects::handles(&read.api_version, &read.kind) {
                continue;
            }
            let key = (read.kind.clone(), read.name.clone());
            if let Some(first) = known.insert(key, read.source.clone()) {
                let twice = format!("{}: it stands in {first} too: keep one of the two", read.title());
                return Err(NoConversion::Documents(format!("{}: {twice}", read.source)));
            }
            objects.push(read);
        }
    }
    Ok(objects)
}

/// What was written, as the daemon would read it.
fn reread(yaml: &str) -> Result<Vec<Object>, NoConversion> {
    let documents = file::parse(yaml).map_err(NoConversion::Written)?;
    let (mut accepted, mut objects) = (PolicyObjects::new(), Vec::new());
    for (index, document) in documents.into_iter().filter(|document| !document.is_null()).enumerate() {
        let read = object(document, Source::new("converted", index));
        let read = read.map_err(|invalid| NoConversion::Written(invalid.to_string()))?;
        accepted.insert(&read).map_err(|invalid| NoConversion::Written(invalid.to_string()))?;
        objects.push(read);
    }
    Ok(objects)
}

impl Converted {
    /// Whether it says the same for certain.
    pub fn is_proven(&self) -> bool {
        matches!(self, Self::Written { proof: Proof { proven: Proven::Equivalent, .. }, .. })
    }

    /// The summary, a line for each thing to say.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Self::Nothing => vec!["there are no objects of 2018".to_owned()],
            Self::Refused(refusals) => {
                let told = refusals.iter().map(|refusal| format!("cannot be converted: {refusal}"));
                told.chain([format!("{} parts cannot be converted, and nothing was written", refusals.len())])
                    .collect()
            }
            Self::Differs { proof } => {
                let examples = match &proof.proven {
                    Proven::Differs(examples) => examples.as_slice(),
                    Proven::Equivalent | Proven::Unknown(_) => &[],
                };
                let told = examples.iter().map(|example| format!("counter-example: {example}"));
                told.chain(["the two do not say the same, and nothing was written".to_owned()]).collect()
            }
            Self::Written { objects, proof, .. } => written(*objects, proof),
        }
    }
}

fn written(objects: usize, proof: &Proof) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(example) = &proof.bad_token {
        lines.push(format!("stricter, for tokens that are not valid: {example}"));
    }
    if let Some(example) = &proof.answer {
        lines.push(format!("another answer to who is refused: {example}"));
    }
    let Proof { points, places, .. } = proof;
    lines.push(match &proof.proven {
        Proven::Unknown(why) => {
            format!("{objects} objects, NOT PROVEN: {why}; the same at {points} points of {places} ports")
        }
        Proven::Equivalent | Proven::Differs(_) => {
            format!("{objects} objects, proven the same at {points} points of {places} ports")
        }
    });
    lines
}
