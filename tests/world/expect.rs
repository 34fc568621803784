//! What a daemon tells of a connection: its line in the access log and its counter, from a moment on.

use std::time::Duration;

use serde_json::Value;

use crate::metrics::Metrics;
use crate::node::Node;

/// A line of the access log comes when its connection has ended; this is for one that has.
pub const LINE_TIME_MAX: Duration = Duration::from_secs(15);

/// The moment from which on something is expected of a node's daemon.
#[derive(Debug)]
pub struct Watch<'a> {
    node: &'a Node,
    position: usize,
    before: Metrics,
}

impl Node {
    /// From here on.
    #[track_caller]
    pub fn watch(&self) -> Watch<'_> {
        Watch { node: self, position: self.log().position(), before: self.metrics() }
    }
}

/// Looks up a field by its path, such as `source.identity`.
pub fn field<'a>(line: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(line, |value, name| value.get(name).unwrap_or(&Value::Null))
}

/// Whether a field is a text.
pub fn is(line: &Value, path: &str, text: &str) -> bool {
    field(line, path).as_str() == Some(text)
}

impl Watch<'_> {
    /// Waits for a line of the access log whose fields have these values.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    pub fn line(&self, fields: &[(&str, &str)]) -> Value {
        let what = format!("a connection with {fields:?}");
        self.node.log().wait_from(self.position, &what, LINE_TIME_MAX, |line| {
            is(line, "target", "access") && fields.iter().all(|(path, text)| is(line, path, text))
        })
    }

    /// Lines of the access log so far whose fields have these values.
    pub fn lines(&self, fields: &[(&str, &str)]) -> Vec<Value> {
        let all = self.node.log().since(self.position);
        all.into_iter()
            .filter(|line| {
                is(line, "target", "access") && fields.iter().all(|(path, text)| is(line, path, text))
            })
            .collect()
    }

    /// Waits for an event by its message and fields.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    pub fn event(&self, message: &str, fields: &[(&str, &str)]) -> Value {
        let what = format!("{message:?} with {fields:?}");
        self.node.log().wait_from(self.position, &what, LINE_TIME_MAX, |line| {
            is(line, "message", message) && fields.iter().all(|(path, text)| is(line, path, text))
        })
    }

    /// By how much a counter grew.
    #[track_caller]
    pub fn grew(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.node.metrics().sum(name, labels) - self.before.sum(name, labels)
    }

    /// A connection was refused: the line says why, and its counter grew.
    ///
    /// # Panics
    /// If one of the two is not so.
    #[track_caller]
    pub fn refused(&self, direction: &str, reason: &str, fields: &[(&str, &str)]) -> Value {
        let mut wanted = vec![("direction", direction), ("reason", reason)];
        wanted.extend_from_slice(fields);
        let line = self.line(&wanted);
        assert!(!is(&line, "verdict", "allowed"), "refused and allowed at once: {line}");
        let counted = self.grew("culvert_denials_total", &[("direction", direction), ("reason", reason)]);
        assert!(counted >= 1.0, "{reason} is logged and not counted: {:#?}", self.denials());
        line
    }

    /// A connection was served and has ended: the line says so, and the counters of its beginning and end grew.
    ///
    /// # Panics
    /// If one of them is not so.
    #[track_caller]
    pub fn served(&self, direction: &str, fields: &[(&str, &str)]) -> Value {
        let mut wanted = vec![("direction", direction), ("verdict", "allowed")];
        wanted.extend_from_slice(fields);
        let line = self.line(&wanted);
        let reporter = if direction == "inbound" { "destination" } else { "source" };
        for counter in ["istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total"] {
            let counted = self.grew(counter, &[("reporter", reporter)]);
            assert!(counted >= 1.0, "{counter} does not grow with reporter {reporter}");
        }
        line
    }

    fn denials(&self) -> Vec<String> {
        let all = self.node.metrics().names();
        all.into_iter().filter(|name| name.contains("denials")).collect()
    }
}
