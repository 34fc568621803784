//! What of HTTP/1.1 is read in one way only.
//!
//! hyper, like most parsers, forgives: it takes a bare LF for an end of line, and of a request with both lengths it drops
//! one in silence. The next parser behind may choose otherwise, and then a request hides in another (T-22). [`Framing`]
//! walks over the same bytes beforehand and refuses whatever has two readings. It holds a part of one line at most.

/// Bytes of a request's head, its first line included: what most servers take. At the limit: 431.
pub(in crate::datapath) const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Lines of a request's head, as Envoy's. At the limit: 431.
pub(in crate::datapath) const HEADERS_MAX: usize = 100;

/// Digits of a chunk's size: 15 are a petabyte of bytes, and never overflow.
const CHUNK_DIGITS_MAX: usize = 15;

/// Bytes of the line with a chunk's size: extensions are ignored by everybody, and hold nothing in earnest.
const CHUNK_LINE_BYTES_MAX: usize = 256;

/// Empty lines before a request (RFC 9112, section 2.2): some old clients end a body with one too many.
const EMPTY_LINES_MAX: usize = 1;

/// What is wrong with a request's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("a line does not end with CR LF, or holds a CR or NUL")]
    Line,
    #[error("the request line is not METHOD target HTTP/1.x")]
    RequestLine,
    #[error("a header goes on in the next line")]
    Fold,
    #[error("a header has no name of a token's characters")]
    Name,
    #[error("Content-Length is not one number")]
    Length,
    #[error("Transfer-Encoding is not chunked alone")]
    Coding,
    #[error("both Content-Length and Transfer-Encoding")]
    TwoLengths,
    #[error("not one Host")]
    Host,
    #[error("the size of a chunk")]
    Chunk,
    #[error("the head has more than {HEADERS_MAX} lines or {HEAD_BYTES_MAX} bytes")]
    TooLarge,
}

/// Where in a sequence of requests the next byte belongs.
#[derive(Debug)]
pub(super) struct Framing {
    at: At,
    /// What was seen of a line that has not ended.
    line: Vec<u8>,
    head: Head,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Head,
    Body(u64),
    ChunkSize,
    Chunk(u64),
    /// The CR LF after a chunk.
    ChunkEnd,
    Trailers,
}

/// What a head has said so far.
#[derive(Debug, Default)]
struct Head {
    lines: usize,
    empty: usize,
    bytes: usize,
    is_1_0: bool,
    length: Option<u64>,
    is_chunked: bool,
    hosts: usize,
}

impl Framing {
    pub(super) fn new() -> Self {
        Self { at: At::Head, line: Vec::new(), head: Head::default() }
    }

    /// True between two requests.
    pub(super) fn is_idle(&self) -> bool {
        self.at == At::Head && self.line.is_empty() && self.head.lines == 0
    }

    /// True between two requests and in a head.
    pub(super) fn is_at_head(&self) -> bool {
        self.at == At::Head
    }

    /// True while a head has begun and not ended.
    pub(super) fn is_in_head(&self) -> bool {
        self.at == At::Head && !self.is_idle()
    }

    /// Walks over the next bytes.
    ///
    /// # Errors
    /// The fault, and how many of the bytes stand before the line that has it.
    pub(super) fn walk(&mut self, bytes: &[u8]) -> Result<(), (usize, Fault)> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            match &mut self.at {
                At::Body(left) | At::Chunk(left) => {
                    let step = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
                    *left -= step as u64;
                    done += step;
                    if *left == 0 {
                        let after = if matches!(self.at, At::Body(_)) { At::Head } else { At::ChunkEnd };
                        self.turn(after);
                    }
                }
                At::Head | At::ChunkSize | At::ChunkEnd | At::Trailers => {
                    done += self.line(rest).map_err(|fault| (done, fault))?;
                }
            }
        }
        Ok(())
    }

    /// Takes a line or a part of one; how many bytes that was.
    fn line(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1);
        self.check_size(taken)?;
        if end.is_none() {
            self.line.extend_from_slice(bytes);
            return Ok(taken);
        }
        if self.line.is_empty() {
            self.whole_line(&bytes[..taken])?;
        } else {
            let mut line = std::mem::take(&mut self.line);
            line.extend_from_slice(&bytes[..taken]);
            self.whole_line(&line)?;
            line.clear();
            self.line = line;
        }
        Ok(taken)
    }

    fn check_size(&mut self, more: usize) -> Result<(), Fault> {
        match self.at {
            At::Head | At::Trailers => {
                self.head.bytes += more;
                if self.head.bytes > HEAD_BYTES_MAX { Err(Fault::TooLarge) } else { Ok(()) }
            }
            At::ChunkSize | At::ChunkEnd if self.line.len() + more > CHUNK_LINE_BYTES_MAX => {
                Err(Fault::Chunk)
            }
            At::ChunkSize | At::ChunkEnd | At::Body(_) | At::Chunk(_) => Ok(()),
        }
    }

    fn whole_line(&mut self, line: &[u8]) -> Result<(), Fault> {
        let line = line.strip_suffix(b"\r\n").ok_or(Fault::Line)?;
        if line.iter().any(|byte| matches!(byte, b'\r' | 0)) {
            return Err(Fault::Line);
        }
        match self.at {
            At::Head => self.head_line(line),
            At::ChunkSize => {
                let size = chunk_size(line)?;
                self.at = if size == 0 { At::Trailers } else { At::Chunk(size) };
                Ok(())
            }
            At::ChunkEnd if line.is_empty() => {
                self.at = At::ChunkSize;
                Ok(())
            }
            At::ChunkEnd => Err(Fault::Chunk),
            At::Trailers if line.is_empty() => {
                self.turn(At::Head);
                Ok(())
            }
            At::Trailers => {
                self.count_line()?;
                field(line).map(|_| ())
            }
            At::Body(_) | At::Chunk(_) => Ok(()),
        }
    }

    fn count_line(&mut self) -> Result<(), Fault> {
        self.head.lines += 1;
        if self.head.lines > HEADERS_MAX + 1 { Err(Fault::TooLarge) } else { Ok(()) }
    }

    fn head_line(&mut self, line: &[u8]) -> Result<(), Fault> {
        if line.is_empty() && self.head.lines == 0 {
            self.head.empty += 1;
            return if self.head.empty > EMPTY_LINES_MAX { Err(Fault::RequestLine) } else { Ok(()) };
        }
        if line.is_empty() {
            let after = self.head.body()?;
            self.turn(after);
            return Ok(());
        }
        self.count_line()?;
        if self.head.lines == 1 {
            self.head.is_1_0 = is_1_0(line)?;
            return Ok(());
        }
        let (name, value) = field(line)?;
        self.head.field(name, value)
    }

    /// Goes to another part; a head begins anew.
    fn turn(&mut self, at: At) {
        self.at = at;
        if at != At::ChunkEnd {
            self.head = Head::default();
        }
    }
}

impl Head {
    fn field(&mut self, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        if name.eq_ignore_ascii_case(b"content-length") {
            let digits = std::str::from_utf8(value).ok().filter(|_| value.iter().all(u8::is_ascii_digit));
            let length = digits.and_then(|digits| digits.parse().ok()).ok_or(Fault::Length)?;
            if self.length.replace(length).is_some() {
                return Err(Fault::Length);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.is_chunked || self.is_1_0 || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Fault::Coding);
            }
            self.is_chunked = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            self.hosts += 1;
        }
        Ok(())
    }

    /// What follows the head.
    fn body(&self) -> Result<At, Fault> {
        // RFC 9112, section 3.2
        if self.hosts > 1 || (self.hosts == 0 && !self.is_1_0) {
            return Err(Fault::Host);
        }
        match (self.length, self.is_chunked) {
            (Some(_), true) => Err(Fault::TwoLengths),
            (None, true) => Ok(At::ChunkSize),
            (Some(0) | None, false) => Ok(At::Head),
            (Some(length), false) => Ok(At::Body(length)),
        }
    }
}

/// Whether a request line says HTTP/1.0, and no other than HTTP/1.1.
fn is_1_0(line: &[u8]) -> Result<bool, Fault> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Fault::RequestLine);
    };
    if method.is_empty() || !method.iter().all(is_token) || target.is_empty() {
        return Err(Fault::RequestLine);
    }
    match version {
        b"HTTP/1.1" => Ok(false),
        b"HTTP/1.0" => Ok(true),
        _ => Err(Fault::RequestLine),
    }
}

/// Name and value of a header or trailer.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Fault> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Fault::Fold);
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Fault::Name)?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().all(is_token) {
        return Err(Fault::Name);
    }
    Ok((name, value.trim_ascii()))
}

fn chunk_size(line: &[u8]) -> Result<u64, Fault> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end();
    let is_number =
        !digits.is_empty() && digits.len() <= CHUNK_DIGITS_MAX && digits.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(digits).ok().filter(|_| is_number).ok_or(Fault::Chunk)?;
    u64::from_str_radix(text, 16).map_err(|_| Fault::Chunk)
}

/// RFC 9110, section 5.6.2
fn is_token(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walked over whole, and byte by byte.
    #[track_caller]
    fn check(sent: &str, expected: Result<(), Fault>) {
        let whole = Framing::new().walk(sent.as_bytes()).map_err(|(_, fault)| fault);
        assert_eq!(whole, expected, "{sent:?}");
        let mut framing = Framing::new();
        let bytes = sent.as_bytes().iter();
        let each = bytes.map(|byte| framing.walk(&[*byte])).find_map(Result::err);
        assert_eq!(each.map(|(_, fault)| fault), expected.err(), "{sent:?} byte by byte");
        if expected.is_ok() {
            assert!(framing.is_idle(), "{sent:?} is whole");
        }
    }

    #[test]
    fn what_has_one_reading_passes() {
        for sent in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nhOST:a \r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.0\r\n\r\n",
            "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na\nbGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n1A;x=y\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n0\r\nX: y\r\n\r\n",
        ] {
            check(sent, Ok(()));
        }
    }

    #[test]
    fn what_has_two_readings_is_refused() {
        // T-22
        let with = |line: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{line}\r\n\r\n");
        let chunked = |body: &str| format!("{}{body}", with("Transfer-Encoding: chunked"));
        for (sent, fault) in [
            (with("Content-Length: 3\r\nTransfer-Encoding: chunked"), Fault::TwoLengths),
            (with("Transfer-Encoding: chunked\r\nContent-Length: 3"), Fault::TwoLengths),
            (with("Content-Length: 3\r\nContent-Length: 4"), Fault::Length),
            (with("Content-Length: 3\r\nContent-Length: 3"), Fault::Length),
            (with("Content-Length: 3, 3"), Fault::Length),
            (with("Content-Length: +3"), Fault::Length),
            (with("Content-Length: -3"), Fault::Length),
            (with("Content-Length: 0x3"), Fault::Length),
            (with("Content-Length: 3 3"), Fault::Length),
            (with("Content-Length:"), Fault::Length),
            (with("Content-Length: 99999999999999999999"), Fault::Length),
            (with("Transfer-Encoding: gzip, chunked"), Fault::Coding),
            (with("Transfer-Encoding: chunked, chunked"), Fault::Coding),
            (with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"), Fault::Coding),
            (with("Transfer-Encoding: identity"), Fault::Coding),
            (with("Transfer-Encoding: xchunked"), Fault::Coding),
            (with("Transfer-Encoding: \x0bchunked"), Fault::Coding),
            (with("Transfer-Encoding : chunked"), Fault::Name),
            (with("Content-Length : 3"), Fault::Name),
            (with("X y: 3"), Fault::Name),
            (with(": 3"), Fault::Name),
            (with("X"), Fault::Name),
            (with("X: a\r\n b"), Fault::Fold),
            (with("X: a\r\n\tb"), Fault::Fold),
            (with("X: a\nY: b"), Fault::Line),
            (with("X: a\rY: b"), Fault::Line),
            (with("X: a\0"), Fault::Line),
            (with("Host: b"), Fault::Host),
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), Fault::Host),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n".to_owned(), Fault::Line),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n".to_owned(), Fault::Line),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET /\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("GET / http/1.1\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            (" GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("G\tT / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), Fault::RequestLine),
            ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), Fault::Coding),
            (chunked("3\nabc\r\n"), Fault::Line),
            (chunked("3\r\nabc\n"), Fault::Line),
            (chunked("3\r\nabcd\r\n"), Fault::Chunk),
            (chunked("0x3\r\nabc\r\n"), Fault::Chunk),
            (chunked("-1\r\n"), Fault::Chunk),
            (chunked("+3\r\nabc\r\n"), Fault::Chunk),
            (chunked(" 3\r\nabc\r\n"), Fault::Chunk),
            (chunked("\r\n"), Fault::Chunk),
            (chunked("g\r\n"), Fault::Chunk),
            (chunked("3;a\nb\r\nabc\r\n"), Fault::Line),
            (chunked("1000000000000000\r\n"), Fault::Chunk),
            (chunked("0\r\nX: y\nZ: w\r\n\r\n"), Fault::Line),
            (chunked("0\r\n X: y\r\n\r\n"), Fault::Fold),
            (chunked(&format!("3;{}\r\n", "x".repeat(CHUNK_LINE_BYTES_MAX))), Fault::Chunk),
            (with(&"X: y\r\n".repeat(HEADERS_MAX)), Fault::TooLarge),
            (with(&format!("X: {}", "y".repeat(HEAD_BYTES_MAX))), Fault::TooLarge),
            (chunked(&format!("0\r\n{}", "X: y\r\n".repeat(HEADERS_MAX + 2))), Fault::TooLarge),
        ] {
            check(&sent, Err(fault));
        }
    }

    #[test]
    fn at_the_limit_a_head_still_passes() {
        // `Host` is the first of them.
        check(&format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(HEADERS_MAX - 1)), Ok(()));
        let filled = "GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n".len();
        let value = "y".repeat(HEAD_BYTES_MAX - filled);
        check(&format!("GET / HTTP/1.1\r\nHost: a\r\nX: {value}\r\n\r\n"), Ok(()));
    }
}
