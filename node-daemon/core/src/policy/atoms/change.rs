//! What a verdict hangs on: the fewest attributes that would turn it over, and those without which it cannot be told.

use std::ops::ControlFlow;

use super::{
    super::{compile::Compiled, tokens::Signatures},
    Attribute, Decision, NoKeys, Point, Space, Unfinished,
    clauses::Live,
};

/// Verdicts that are asked for one explanation: some hundred milliseconds. At the limit no change is named.
pub const CHANGES_TRIED_MAX: usize = 100_000;

/// Attributes that one change may take. Who has to change more is better told which rule is the nearest.
pub const CHANGED_ATTRIBUTES_MAX: usize = 3;

/// Changes of the same size that are told.
const CHANGES_TOLD_MAX: usize = 3;

/// Verdicts that are asked for one line of a log. At the limit it counts as one that cannot be told.
pub const POINTS_OF_LINE_MAX: usize = 4_096;

/// One attribute that would be otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// As policies write it, such as `request.method`.
    pub attribute: String,
    pub from: String,
    /// One value of those that would do.
    pub to: String,
}

/// A verdict as far as it can be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Whatever the unknown attributes are.
    Surely(Decision),
    /// It hangs on these attributes.
    Needs(Vec<String>),
}

impl Compiled {
    /// Each of the smallest sets of changes that would turn the verdict at this point over. Empty: none of up to
    /// [`CHANGED_ATTRIBUTES_MAX`] attributes does, or [`CHANGES_TRIED_MAX`] verdicts did not suffice to find one.
    pub fn smallest_changes(&self, point: &Point, now: u64, signatures: &dyn Signatures) -> Vec<Vec<Change>> {
        let Some(rules) = self.port_rules(&point.destination, point.port) else { return Vec::new() };
        let space = Space::new(self, vec![rules], &|_| true);
        let was_allowed = self.decide(point, now, signatures).allowed;
        let attributes: Vec<&Attribute> = space.attributes().collect();
        let mut search = Search {
            space: &space,
            turns: &|point| self.decide(point, now, signatures).allowed != was_allowed,
            tries: 0,
            found: Vec::new(),
        };
        for size in 1..=CHANGED_ATTRIBUTES_MAX {
            search.choose(&attributes, size, point, &mut Vec::new());
            if !search.found.is_empty() || search.tries >= CHANGES_TRIED_MAX {
                break;
            }
        }
        let told = |changed: &(Vec<Attribute>, Point)| {
            changed.0.iter().map(|attribute| change(attribute, point, &changed.1)).collect()
        };
        search.found.iter().map(told).collect()
    }

    /// The verdict at a point of which the named headers, the token, the host or the server name are not known.
    pub fn tell(&self, point: &Point, unknown: &Unknown) -> Told {
        let Some(rules) = self.port_rules(&point.destination, point.port) else {
            return Told::Surely(self.decide(point, 0, &NoKeys));
        };
        let varies = |attribute: &Attribute| unknown.includes(attribute);
        let space = Space::new(self, vec![rules], &varies);
        let hidden: Vec<&Attribute> = space.attributes().filter(|attribute| varies(attribute)).collect();
        if hidden.is_empty() || (point.request.is_none() && hidden.iter().all(|a| a.is_of_requests())) {
            return Told::Surely(self.decide(point, 0, &NoKeys));
        }
        match self.same(&space, point, &varies) {
            Some(decision) => Told::Surely(decision),
            None => {
                let alone = |attribute: &&&Attribute| {
                    let together = |other: &Attribute| {
                        other == **attribute || (attribute.is_of_token() && *other == Attribute::Token)
                    };
                    self.same(&space, point, &together).is_none()
                };
                let mut needed: Vec<&Attribute> = hidden.iter().filter(alone).copied().collect();
                if needed.is_empty() {
                    needed = hidden;
                }
                let shown = |attribute: &Attribute| {
                    if attribute.is_of_token() { Attribute::Token.name() } else { attribute.name() }
                };
                let mut names: Vec<String> = needed.into_iter().map(shown).collect();
                names.dedup();
                Told::Needs(names)
            }
        }
    }

    /// The one verdict of all points that differ in some attributes, if it is one.
    fn same(
        &self,
        space: &Space<'_>,
        point: &Point,
        varies: &dyn Fn(&Attribute) -> bool,
    ) -> Option<Decision> {
        let (mut first, mut count): (Option<Decision>, usize) = (None, 0);
        let walked = space.walk(point, varies, &mut |point| {
            count += 1;
            let decision = self.decide(point, 0, &NoKeys);
            let differs = first.as_ref().is_some_and(|first| first.allowed != decision.allowed);
            first.get_or_insert(decision);
            if differs || count > POINTS_OF_LINE_MAX {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        match walked {
            Ok(()) => first,
            Err(Unfinished::Enough | Unfinished::Candidates(_) | Unfinished::Claims(_)) => None,
        }
    }
}

/// Attributes that a record of a connection or request may lack. Its headers and its token always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unknown {
    pub host: bool,
    pub server_name: bool,
    /// Method, path and host of a request that some connection carried.
    pub request: bool,
}

impl Unknown {
    fn includes(self, attribute: &Attribute) -> bool {
        match attribute {
            Attribute::Header(_) | Attribute::Token => true,
            Attribute::Host => self.host || self.request,
            Attribute::Method | Attribute::Path => self.request,
            Attribute::ServerName => self.server_name,
            Attribute::Subject | Attribute::Audience | Attribute::Presenter | Attribute::Claim(_) => true,
            Attribute::Peer | Attribute::Source | Attribute::Destination => false,
        }
    }
}

struct Search<'s, 'r> {
    space: &'s Space<'r>,
    turns: &'s dyn Fn(&Point) -> bool,
    tries: usize,
    found: Vec<(Vec<Attribute>, Point)>,
}

impl Search<'_, '_> {
    /// Changes `size` of the attributes, in their order.
    fn choose(
        &mut self,
        attributes: &[&Attribute],
        size: usize,
        point: &Point,
        changed: &mut Vec<Attribute>,
    ) {
        for (index, attribute) in attributes.iter().enumerate() {
            let own = point.atom(attribute);
            // Too many values to try are none.
            let kinds = self.space.values(attribute, point).unwrap_or_default();
            changed.push((*attribute).clone());
            for other in kinds.iter().filter(|other| other.atom(attribute) != own) {
                if self.tries >= CHANGES_TRIED_MAX || self.found.len() >= CHANGES_TOLD_MAX {
                    break;
                }
                if size > 1 {
                    self.choose(&attributes[index + 1..], size - 1, other, changed);
                    continue;
                }
                self.tries += 1;
                if (self.turns)(other) {
                    self.found.push((changed.clone(), other.clone()));
                    break;
                }
            }
            changed.pop();
        }
    }
}

impl Space<'_> {
    /// The point with each kind of value of one attribute.
    fn values(&self, attribute: &Attribute, point: &Point) -> Result<Vec<Point>, Unfinished> {
        let kinds = self.kinds(attribute, self.atoms(attribute), point, &Live::all(&self.clauses))?;
        Ok(kinds.into_iter().map(|(point, _)| point).collect())
    }
}

fn change(attribute: &Attribute, before: &Point, after: &Point) -> Change {
    let shown = |point: &Point| point.atom(attribute).map_or_else(|| "unset".to_owned(), |atom| atom.shown());
    Change { attribute: attribute.name(), from: shown(before), to: shown(after) }
}
