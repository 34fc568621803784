//! Fail-closed stand-in for the compiled form: nothing is understood, everything is denied.

use std::{collections::BTreeMap, sync::Arc};

use super::{ConnectionFacts, Denial, DenialReason, Permit, Verdict};
use crate::{
    decode::{InvalidObject, Object, Source},
    workload::{Mesh, ObjectName, Service, TransportMode, Workload},
};

/// The policy objects of the mesh.
#[derive(Debug, Default)]
pub struct PolicyObjects;

impl PolicyObjects {
    pub fn new() -> Self {
        Self
    }

    pub fn handles(_api_version: &str, _kind: &str) -> bool {
        false
    }

    pub fn insert(&mut self, _object: &Object) -> Result<(), InvalidObject> {
        Ok(())
    }

    pub fn remove(&mut self, _kind: &str, _name: &ObjectName) {}
}

/// What the policy may look at.
#[derive(Debug)]
pub struct Inventory<'a> {
    pub mesh: &'a Mesh,
    pub workloads: &'a BTreeMap<ObjectName, Arc<Workload>>,
    pub services: &'a BTreeMap<ObjectName, Service>,
    pub node: &'a str,
}

/// The compiled form.
#[derive(Debug)]
pub struct Compiled {
    default_mode: TransportMode,
}

pub fn compile(_objects: &PolicyObjects, inventory: &Inventory<'_>) -> Compiled {
    Compiled { default_mode: inventory.mesh.default_mode }
}

impl Compiled {
    pub fn transport_mode(&self, _destination: &Workload, _port: u16) -> TransportMode {
        self.default_mode
    }

    pub fn authorise(&self, _facts: &ConnectionFacts) -> Result<Permit, Denial> {
        Err(Denial { reason: DenialReason::PolicyUnusable, verdict: Verdict::default() })
    }

    pub fn statuses(&self) -> &[ObjectStatus] {
        &[]
    }
}

/// What became of one policy object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStatus {
    pub kind: String,
    pub name: ObjectName,
    pub accepted: bool,
    pub problem: Option<String>,
    pub field: Option<String>,
    /// What it does now, in words.
    pub effect: String,
    pub source: Source,
}
