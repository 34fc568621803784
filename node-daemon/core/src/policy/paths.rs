//! The path of a request: brought to one form before anything is matched, and forwarded in that form (policy B-5, T-22).

use std::{borrow::Cow, fmt};

use super::matching::{Pattern, Text};

/// A path that no policy can judge: the answer is 400 (policy B-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    #[error("the path does not begin with a slash")]
    Relative,
    #[error("a percent sign without two hexadecimal digits")]
    Escape,
    #[error("a control character, a space, a backslash or a character outside ASCII")]
    Character,
    #[error("the decoded path is not UTF-8")]
    Encoding,
    #[error("a dot segment beside an escaped slash or backslash: servers that decode it go up a folder")]
    Hidden,
}

/// A path in its one form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Path<'a> {
    /// Path and query, as the workload gets it. A fragment is no part of a request and is cut off.
    pub(crate) upstream: Cow<'a, str>,
    /// Length of what rules compare: up to the query (policy G-2).
    end: usize,
}

impl<'a> Path<'a> {
    /// Removes dot segments and decodes escaped letters, digits, `-`, `.`, `_` and `~`. An escaped slash stays escaped,
    /// slashes that follow each other stay, and so do `;` and what comes after it. An escaped slash that makes a dot segment
    /// for whoever decodes it is refused: no form of it would be one for all servers (T-22).
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn normalise(sent: &'a str, method: &str) -> Result<Self, PathFault> {
        let sent = sent.split('#').next().unwrap_or_default();
        let end = sent.find('?').unwrap_or(sent.len());
        let (path, query) = sent.split_at(end);
        check_characters(query)?;
        if path == "*" && method == "OPTIONS" {
            return Ok(Self { upstream: sent.into(), end });
        }
        if !path.starts_with('/') {
            return Err(PathFault::Relative);
        }
        check_characters(path)?;
        let decoded = decode_unreserved(path)?;
        let clean = remove_dot_segments(&decoded);
        if has_hidden_dots(&clean) {
            return Err(PathFault::Hidden);
        }
        if clean == path {
            return Ok(Self { upstream: sent.into(), end });
        }
        Ok(Self { end: clean.len(), upstream: format!("{clean}{query}").into() })
    }

    /// What rules compare.
    pub(crate) fn matched(&self) -> &str {
        &self.upstream[..self.end]
    }

    /// Without the query parameters of these names: tokens that are not forwarded (policy F-2).
    pub(crate) fn without_parameters(&self, is_removed: impl Fn(&str) -> bool) -> String {
        let (path, query) = self.upstream.split_at(self.end);
        let Some(query) = query.strip_prefix('?') else { return path.to_owned() };
        let is_kept = |pair: &&str| !is_removed(pair.split('=').next().unwrap_or_default());
        let kept: Vec<&str> = query.split('&').filter(is_kept).collect();
        if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) }
    }
}

/// `name=value` pairs of the query, as sent.
pub(crate) fn query_pairs(sent: &str) -> impl Iterator<Item = (&str, &str)> {
    let sent = sent.split('#').next().unwrap_or_default();
    let query = sent.split_once('?').map_or("", |(_, query)| query);
    query.split('&').filter_map(|pair| pair.split_once('='))
}

fn check_characters(text: &str) -> Result<(), PathFault> {
    let is_good = |byte: u8| byte.is_ascii_graphic() && byte != b'\\';
    if text.bytes().all(is_good) { Ok(()) } else { Err(PathFault::Character) }
}

/// Decodes what needs no escape, and checks what stays escaped: NUL and what is not UTF-8 are refused.
fn decode_unreserved(path: &str) -> Result<Cow<'_, str>, PathFault> {
    if !path.contains('%') {
        return Ok(path.into());
    }
    let (mut form, mut bytes) = (String::with_capacity(path.len()), Vec::with_capacity(path.len()));
    let mut pieces = path.split('%');
    let first = pieces.next().unwrap_or_default();
    form.push_str(first);
    bytes.extend_from_slice(first.as_bytes());
    for piece in pieces {
        let (digits, rest) = piece.split_at_checked(2).ok_or(PathFault::Escape)?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(PathFault::Escape);
        }
        let byte = u8::from_str_radix(digits, 16).map_err(|_| PathFault::Escape)?;
        if byte == 0 {
            return Err(PathFault::Character);
        }
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            form.push(char::from(byte));
        } else {
            form.push('%');
            form.push_str(digits);
        }
        form.push_str(rest);
        bytes.push(byte);
        bytes.extend_from_slice(rest.as_bytes());
    }
    if std::str::from_utf8(&bytes).is_err() {
        return Err(PathFault::Encoding);
    }
    Ok(form.into())
}

/// Whether a segment is a dot or two once escaped slashes and backslashes are decoded. Expects no other dot segments.
fn has_hidden_dots(path: &str) -> bool {
    path.contains('%')
        && path
            .to_ascii_lowercase()
            .replace("%2f", "/")
            .replace("%5c", "/")
            .split('/')
            .any(|segment| matches!(segment, "." | ".."))
}

/// RFC 3986, section 5.2.4. A step above the root stays at the root.
fn remove_dot_segments(path: &str) -> Cow<'_, str> {
    let is_dots = |segment: &str| matches!(segment, "." | "..");
    if !path.split('/').any(is_dots) {
        return path.into();
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        match segment {
            ".." => {
                kept.pop();
            }
            "." => {}
            segment => kept.push(segment),
        }
        if is_dots(segment) && is_last {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/")).into()
}

/// One written path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PathPattern {
    Plain(Pattern),
    Template(Template),
}

impl PathPattern {
    /// As 2018 has it: braces are ordinary characters.
    pub(super) fn of_2018(written: &str) -> Self {
        Self::Plain(Pattern::of_2018(written))
    }

    /// As the current API has it (policy F-3). `None` for a template that cannot be used.
    pub(super) fn new(written: &str) -> Option<Self> {
        if written.contains("{*}") || written.contains("{**}") {
            return Template::new(written).map(Self::Template);
        }
        Some(Self::Plain(Pattern::new(written)))
    }

    pub(super) fn matches(&self, path: Option<&str>) -> bool {
        match self {
            Self::Plain(pattern) => pattern.matches(path.map(Text::plain)),
            Self::Template(template) => path.is_some_and(|path| template.matches(path)),
        }
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(pattern) => pattern.fmt(formatter),
            Self::Template(template) => formatter.write_str(&template.written),
        }
    }
}

/// A path in which `{*}` is one segment, and `{**}` any text to the end or to the literal that follows (policy F-3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    written: Box<str>,
    /// Segments before `{**}`, or all of them; `None` is `{*}`.
    head: Vec<Option<Box<str>>>,
    /// What follows `{**}`, if that is there.
    tail: Option<Box<str>>,
}

impl Template {
    /// Operators stand for whole segments, no other star is used, and nothing but text follows `{**}`.
    fn new(written: &str) -> Option<Self> {
        let rest = written.strip_prefix('/')?;
        let (head, tail) = match rest.split_once("{**}") {
            None => (rest, None),
            Some((head, tail)) => (head, Some(tail)),
        };
        let is_text = |text: &str| !text.contains(['*', '{', '}']);
        let tail_fits = tail.is_none_or(|tail| is_text(tail) && (tail.is_empty() || tail.starts_with('/')));
        let head_ends = tail.is_none() || head.is_empty() || head.ends_with('/');
        let segments = head.split('/').map(|segment| match segment {
            "{*}" => Some(None),
            text if is_text(text) => Some(Some(text.into())),
            _ => None,
        });
        let mut head: Vec<Option<Box<str>>> = segments.collect::<Option<_>>()?;
        if tail.is_some() {
            head.pop();
        }
        (tail_fits && head_ends).then(|| Self { written: written.into(), head, tail: tail.map(Into::into) })
    }

    fn matches(&self, path: &str) -> bool {
        let Some(mut rest) = path.strip_prefix('/') else { return false };
        for (index, wanted) in self.head.iter().enumerate() {
            let is_last = self.tail.is_none() && index + 1 == self.head.len();
            let (segment, after) = match rest.split_once('/') {
                Some((_, _)) if is_last => return false,
                Some((segment, after)) => (segment, after),
                None if is_last => (rest, ""),
                None => return false,
            };
            let fits = match wanted {
                Some(text) => **text == *segment,
                None => !segment.is_empty(),
            };
            if !fits {
                return false;
            }
            rest = after;
        }
        self.tail.as_deref().is_none_or(|tail| rest.ends_with(tail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn form(sent: &str, expected: Result<&str, PathFault>) {
        let found = Path::normalise(sent, "GET");
        let found = found.as_ref().map(|path| &*path.upstream).map_err(|fault| *fault);
        assert_eq!(found, expected, "{sent}");
    }

    #[test]
    fn a_path_is_brought_to_one_form() {
        // policy B-5
        for (sent, expected) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/./b", "/a/b"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/../../a", "/a"),
            ("/a/%2e%2E/b", "/b"),
            ("/a/.%2e/b", "/b"),
            ("/%61dmin", "/admin"),
            ("/%7Euser%2D%5F", "/~user-_"),
            ("/a%2Fb", "/a%2Fb"),
            ("/a%2fb", "/a%2fb"),
            ("/a%252e", "/a%252e"),
            ("//a//b", "//a//b"),
            ("/a//../b", "/a/b"),
            ("/a;v=1/b", "/a;v=1/b"),
            ("/a/..;/b", "/a/..;/b"),
            ("/a?b=/../c", "/a?b=/../c"),
            ("/a/../b?c", "/b?c"),
            ("/a#b", "/a"),
            ("/a?b#c", "/a?b"),
            ("/%C3%A9", "/%C3%A9"),
            ("/...", "/..."),
            ("/a%5Cb", "/a%5Cb"),
            ("/..a%2Fb..", "/..a%2Fb.."),
            ("/a%2F...%2Fb", "/a%2F...%2Fb"),
            ("/a%252f..%252fb", "/a%252f..%252fb"),
            ("/a/..%3Bb", "/a/..%3Bb"),
            ("/a%2Fb/..", "/"),
        ] {
            form(sent, Ok(expected));
        }
    }

    #[test]
    fn a_path_that_nobody_can_judge_is_refused() {
        // T-22
        for (sent, expected) in [
            ("", PathFault::Relative),
            ("a", PathFault::Relative),
            ("*", PathFault::Relative),
            ("http://x/", PathFault::Relative),
            ("?a", PathFault::Relative),
            ("/a%", PathFault::Escape),
            ("/a%2", PathFault::Escape),
            ("/a%zz", PathFault::Escape),
            ("/a%+1", PathFault::Escape),
            ("/%é", PathFault::Character),
            ("/a%00", PathFault::Character),
            ("/a\0", PathFault::Character),
            ("/a b", PathFault::Character),
            ("/a\\..\\b", PathFault::Character),
            ("/a\r\nb", PathFault::Character),
            ("/é", PathFault::Character),
            ("/a?b c", PathFault::Character),
            ("/%ff", PathFault::Encoding),
            ("/%c0%ae", PathFault::Encoding),
            ("/%C3", PathFault::Encoding),
            ("/a/..%2fb", PathFault::Hidden),
            ("/a/%2e%2e%2Fb", PathFault::Hidden),
            ("/a%2f..%2fb", PathFault::Hidden),
            ("/a%2f../b", PathFault::Hidden),
            ("/a%2F..", PathFault::Hidden),
            ("/.%2Fa", PathFault::Hidden),
            ("/a%20%2f%2e/b", PathFault::Hidden),
            ("/a/..%5cb", PathFault::Hidden),
            ("/a%5C..%2fb?c", PathFault::Hidden),
        ] {
            form(sent, Err(expected));
        }
        assert!(Path::normalise("*", "OPTIONS").is_ok_and(|path| path.matched() == "*"));
    }

    #[test]
    fn rules_see_no_query() {
        // policy G-2
        let path = Path::normalise("/a/./b?x=1&access_token=t&y", "GET").unwrap();
        assert_eq!(path.matched(), "/a/b");
        assert_eq!(path.without_parameters(|name| name == "access_token"), "/a/b?x=1&y");
        assert_eq!(path.without_parameters(|name| name != "z"), "/a/b");
        assert_eq!(query_pairs("/a?x=1&y&z=2=3#w=4").collect::<Vec<_>>(), [("x", "1"), ("z", "2=3")]);
    }

    #[test]
    fn a_form_is_stable() {
        for sent in ["/a/%2e./b", "/%2e%2e/", "/a//..//b", "/./..", "/%2E"] {
            let once = Path::normalise(sent, "GET").unwrap().upstream.into_owned();
            assert_eq!(Path::normalise(&once, "GET").unwrap().upstream, once, "{sent}");
        }
    }

    #[track_caller]
    fn template(written: &str, path: &str, expected: bool) {
        let pattern = PathPattern::new(written).expect("a usable path");
        assert_eq!(pattern.matches(Some(path)), expected, "{written} against {path}");
    }

    #[test]
    fn templates_stand_for_segments() {
        // policy F-3
        template("/foo/{*}", "/foo/bar", true);
        template("/foo/{*}", "/foo/bar/baz", false);
        template("/foo/{*}", "/foo/", false);
        template("/foo/{*}", "/foo", false);
        template("/{*}/bar", "/x/bar", true);
        template("/{*}/bar", "//bar", false);
        template("/{*}/bar", "/x/y/bar", false);
        template("/foo/{**}", "/foo/", true);
        template("/foo/{**}", "/foo/a/b", true);
        template("/foo/{**}", "/foo", false);
        template("/foo/{**}", "/foobar", false);
        template("/{**}", "/", true);
        template("/{**}", "/a/b", true);
        template("/foo/{**}/", "/foo/bar/", true);
        template("/foo/{**}/", "/foo/bar", false);
        template("/foo/{**}/x.txt", "/foo/a/b/x.txt", true);
        template("/foo/{**}/x.txt", "/foo/a/b/y.txt", false);
        template("/foo/{*}/bar/{**}", "/foo/buzz/bar/", true);
        template("/foo/{*}/bar/{**}", "/foo/buzz/bar/baz/c", true);
        template("/foo/{*}/bar/{**}", "/foo/buzz/baz/", false);
        for written in ["/a{*}", "/{*}b", "/{**}/{*}", "/{**}/{**}", "/{*}/b*", "*{*}", "/a{**}", "/{*}/{a}"]
        {
            assert_eq!(PathPattern::new(written), None, "{written}");
        }
        assert!(!PathPattern::new("/{*}").expect("a template").matches(None));
        assert!(PathPattern::of_2018("/{*}").matches(Some("/{*}")));
    }
}
