//! Which connections and requests can a set of rules tell apart? Finitely many: an *atom* for each kind of value of each
//! attribute that the rules look at, and one that they do not know.
//!
//! ```text
//! PortRules --> [clauses] --> which attributes, compared with what --> [candidates] --> atoms
//!                   |                                                                     |
//!                   '-------- what can still be met ---> [walk] <-------------------------'
//!                                                           |
//!                                                        [point] --> the verdict of the enforcing evaluator
//! ```
//!
//! The walk goes through the product of the attributes one after the other and keeps, of each, only values that a condition
//! tells apart which can still be met: so rules for many peers, each with paths of its own, cost their sum and not their
//! product. Decides nothing itself.

mod candidates;
mod change;
mod clauses;
mod point;
mod texts;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
};

pub(crate) use self::point::{Atom, NoKeys, TokenPoint};
use self::{
    candidates::Candidates,
    clauses::{Clauses, Ended, Live},
    point::ClaimPoint,
};
pub use self::{
    change::{CHANGED_ATTRIBUTES_MAX, CHANGES_TRIED_MAX, Change, POINTS_OF_LINE_MAX, Told, Unknown},
    point::{Decision, Point, RequestPoint},
};
use super::{compile::Compiled, origins::Trigger, rules::PortRules, seen::header};
use crate::workload::Protocol;

/// What rules look at. The order is that of the walk: whoever it is settles most.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Attribute {
    Peer,
    Source,
    Destination,
    ServerName,
    Token,
    Subject,
    Audience,
    Presenter,
    Claim(Vec<Box<str>>),
    Method,
    Path,
    Host,
    Header(Box<str>),
}

impl Attribute {
    /// As policies write it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Peer => "source.principal".to_owned(),
            Self::Source => "source.ip".to_owned(),
            Self::Destination => "destination.ip".to_owned(),
            Self::ServerName => "connection.sni".to_owned(),
            Self::Token => "the token".to_owned(),
            Self::Subject => "request.auth.claims[sub]".to_owned(),
            Self::Audience => "request.auth.audiences".to_owned(),
            Self::Presenter => "request.auth.presenter".to_owned(),
            Self::Claim(path) => format!("request.auth.claims[{}]", path.join("][")),
            Self::Method => "request.method".to_owned(),
            Self::Path => "request.path".to_owned(),
            Self::Host => "request.host".to_owned(),
            Self::Header(name) => format!("request.headers[{name}]"),
        }
    }

    fn is_of_requests(&self) -> bool {
        *self >= Self::Token
    }

    fn is_of_token(&self) -> bool {
        matches!(self, Self::Subject | Self::Audience | Self::Presenter | Self::Claim(_))
    }
}

/// Kinds of lists that one claim may be: each is a set of values. Beyond it the walk is given up.
const CLAIM_KINDS_MAX: usize = 512;

/// Candidates of one attribute before they are told apart. Beyond it the walk is given up.
const CANDIDATES_MAX: usize = 20_000;

/// All that one port's rules can tell apart, or those of one port in two sets.
pub(crate) struct Space<'r> {
    rules: Vec<&'r PortRules>,
    compiled: &'r Compiled,
    clauses: Clauses<'r>,
    axes: BTreeMap<Attribute, Vec<Atom>>,
    /// What is not covered, in words.
    holes: BTreeSet<String>,
}

/// Why a walk ended before it had seen everything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfinished {
    #[error("there are more than {CANDIDATES_MAX} values of {0} to try")]
    Candidates(String),
    #[error("there are more than {CLAIM_KINDS_MAX} kinds of lists of {0}")]
    Claims(String),
    #[error("whoever looks at the points has seen enough")]
    Enough,
}

impl<'r> Space<'r> {
    /// For the rules of one port; where there are two, of the same port, whose trust domains are those of `compiled`. Only
    /// the values of attributes that `varies` are looked for.
    pub(crate) fn new(
        compiled: &'r Compiled,
        rules: Vec<&'r PortRules>,
        varies: &dyn Fn(&Attribute) -> bool,
    ) -> Self {
        let clauses = Clauses::new(&rules);
        let mut candidates = Candidates::new(compiled, &rules);
        for condition in clauses.conditions() {
            candidates.add(condition.values());
        }
        let (axes, holes) = candidates.finish(varies);
        Self { rules, compiled, clauses, axes, holes }
    }

    /// What the axes do not cover: where there is something, a walk shows much and proves nothing.
    pub(crate) fn holes(&self) -> impl Iterator<Item = &str> {
        self.holes.iter().map(String::as_str)
    }

    pub(crate) fn attributes(&self) -> impl Iterator<Item = &Attribute> {
        self.axes.keys()
    }

    pub(crate) fn atoms(&self, attribute: &Attribute) -> &[Atom] {
        self.axes.get(attribute).map_or(&[], Vec::as_slice)
    }

    /// Shows `visit` one point for each kind of point that differs from `base` in attributes of which `varies` holds.
    ///
    /// # Errors
    /// The limit, or that `visit` broke off.
    pub(crate) fn walk(
        &self,
        base: &Point,
        varies: &dyn Fn(&Attribute) -> bool,
        visit: &mut dyn FnMut(&Point) -> ControlFlow<()>,
    ) -> Result<(), Unfinished> {
        let axes: Vec<(&Attribute, &[Atom])> = self
            .axes
            .iter()
            .filter(|(attribute, _)| varies(attribute))
            .map(|(attribute, atoms)| (attribute, atoms.as_slice()))
            .collect();
        let mut live = Live::all(&self.clauses);
        for attribute in self.axes.keys().filter(|attribute| !varies(attribute)) {
            live = live.without(&self.clauses, &self.ask(&live, attribute, base).1);
        }
        self.step(&axes, base, &live, visit)
    }

    fn step(
        &self,
        axes: &[(&Attribute, &[Atom])],
        point: &Point,
        live: &Live,
        visit: &mut dyn FnMut(&Point) -> ControlFlow<()>,
    ) -> Result<(), Unfinished> {
        let Some(((attribute, atoms), rest)) = axes.split_first() else {
            return match visit(point) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(Unfinished::Enough),
            };
        };
        for (point, live) in self.kinds(attribute, atoms, point, live)? {
            self.step(rest, &point, &live, visit)?;
        }
        Ok(())
    }

    /// One point for each kind of value.
    fn kinds(
        &self,
        attribute: &Attribute,
        atoms: &[Atom],
        point: &Point,
        live: &Live,
    ) -> Result<Vec<(Point, Live)>, Unfinished> {
        if atoms.len() > CANDIDATES_MAX {
            return Err(Unfinished::Candidates(attribute.name()));
        }
        let has_token =
            point.request.as_ref().is_some_and(|request| matches!(request.token, TokenPoint::Good { .. }));
        let is_fixed = (attribute.is_of_token() && !has_token)
            || (*attribute == Attribute::ServerName && point.peer.is_none());
        if is_fixed {
            let (_, ended) = self.ask(live, attribute, point);
            return Ok(vec![(point.clone(), live.without(&self.clauses, &ended))]);
        }
        let (mut known, mut kinds) = (BTreeSet::new(), Vec::new());
        let mut enter = |atom: &Atom, kinds: &mut Vec<(Point, Live)>| {
            let mut changed = point.clone();
            changed.apply(atom);
            let (answers, ended) = self.ask(live, attribute, &changed);
            let is_new = known.insert(answers);
            if is_new {
                kinds.push((changed, live.without(&self.clauses, &ended)));
            }
            is_new
        };
        for atom in atoms {
            enter(atom, &mut kinds);
        }
        if let Attribute::Claim(path) = attribute {
            let singles: Vec<&String> = atoms.iter().filter_map(single).collect();
            let mut lists: Vec<Vec<String>> = singles.iter().map(|text| vec![(*text).clone()]).collect();
            // Every set of kinds of values, by one value more at a time.
            while let Some(list) = lists.pop() {
                for text in singles.iter().filter(|text| !list.contains(text)) {
                    let longer: Vec<String> = list.iter().chain([*text]).cloned().collect();
                    let atom = Atom::Claim(path.clone(), Some(ClaimPoint::List(longer.clone())));
                    if enter(&atom, &mut kinds) {
                        lists.push(longer);
                    }
                    if kinds.len() > CLAIM_KINDS_MAX {
                        return Err(Unfinished::Claims(attribute.name()));
                    }
                }
            }
        }
        Ok(kinds)
    }

    /// Everything that tells values of `attribute` apart at this point.
    fn ask(&self, live: &Live, attribute: &Attribute, point: &Point) -> (Answers, Ended) {
        let by_token = *attribute >= Attribute::Token;
        let (mut answers, ended) = point.with_seen(by_token, |seen| {
            live.ask(&self.clauses, attribute, &|condition, doubt| condition.holds(seen, doubt))
        });
        self.ask_authentication(attribute, point, &mut answers);
        // Each is a kind of its own: whose it is, where it stands, for whom it was made.
        let is_own_kind = matches!(attribute, Attribute::Token | Attribute::Audience);
        let own = is_own_kind.then(|| format!("{:?}", point.atom(attribute)));
        ((answers, own), ended)
    }

    /// What is asked before the rules are.
    fn ask_authentication(&self, attribute: &Attribute, point: &Point, answers: &mut Vec<bool>) {
        let steps = || self.rules.iter().flat_map(|rules| &rules.authentication.origins);
        let request = point.request.as_ref();
        match attribute {
            Attribute::Peer => {
                answers.push(point.peer.is_some());
                answers.push(self.compiled.is_foreign(&point.facts()));
            }
            Attribute::Path => {
                let path = request.and_then(|request| request.path.as_deref());
                let methods = steps().flat_map(|step| &step.methods);
                answers.extend(methods.map(|method| Trigger::any_fires(&method.triggers, path)));
            }
            // policy A-9.7
            Attribute::Method if steps().next().is_some() => {
                answers.push(request.is_some_and(|request| request.method == "OPTIONS"));
            }
            Attribute::Header(name) if PREFLIGHT_HEADERS.contains(&&**name) && steps().next().is_some() => {
                let value = request.and_then(|request| header(request, name));
                answers.push(value.is_some_and(|value| !value.is_empty()));
            }
            Attribute::Source
            | Attribute::Destination
            | Attribute::ServerName
            | Attribute::Token
            | Attribute::Subject
            | Attribute::Audience
            | Attribute::Presenter
            | Attribute::Claim(_)
            | Attribute::Method
            | Attribute::Host
            | Attribute::Header(_) => {}
        }
    }
}

/// The headers of a CORS preflight (policy A-9.7).
const PREFLIGHT_HEADERS: [&str; 2] = ["origin", "access-control-request-method"];

/// What the conditions say of a value, and the value itself where it is a kind of its own.
type Answers = (Vec<bool>, Option<String>);

fn single(atom: &Atom) -> Option<&String> {
    if let Atom::Claim(_, Some(ClaimPoint::Text(text))) = atom { Some(text) } else { None }
}

/// Whether requests are judged there at all.
fn is_http(rules: &PortRules) -> bool {
    rules.protocol != Protocol::Tcp
}
