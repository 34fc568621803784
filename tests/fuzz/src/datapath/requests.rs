//! The framing of HTTP/1.1, read from its own file.

#[path = "../../../../node-daemon/src/datapath/requests/framing.rs"]
mod framing;

use self::framing::{Framing, HEAD_BYTES_MAX, HEADERS_MAX};

/// What the framing makes of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Walked {
    /// Where each complete request ends.
    pub(crate) ends: Vec<usize>,
    /// Where each complete head ends.
    pub(crate) heads: Vec<usize>,
    /// Bytes before the line with the fault, and the fault.
    pub(crate) fault: Option<(usize, String)>,
}

/// Byte by byte.
pub(crate) fn walk(bytes: &[u8]) -> Walked {
    let (mut framing, mut walked) = (Framing::new(), Walked::default());
    let (mut line_start, mut request_start) = (0, 0);
    for (at, byte) in bytes.iter().enumerate() {
        let (was_idle, was_in_head) = (framing.is_idle(), framing.is_in_head());
        if let Err((before, fault)) = framing.walk(std::slice::from_ref(byte)) {
            assert_eq!(before, 0, "one byte has none before it");
            walked.fault = Some((line_start, fault.to_string()));
            break;
        }
        if *byte == b'\n' {
            line_start = at + 1;
        }
        // An empty line before a request is none of it.
        if framing.is_idle() && bytes[request_start..=at] == *b"\r\n" {
            request_start = at + 1;
            continue;
        }
        if was_in_head && !framing.is_in_head() {
            walked.heads.push(at + 1);
        }
        if framing.is_idle() && (!was_idle || was_in_head) {
            assert!(framing.is_at_head());
            walked.ends.push(at + 1);
            request_start = at + 1;
        }
    }
    let head = walked.heads.first().copied().unwrap_or_default();
    assert!(head <= HEAD_BYTES_MAX + HEADERS_MAX, "a head of {head} bytes passed");
    same_in_pieces(bytes, &walked);
    walked
}

/// However the bytes arrive, the answer is the same.
fn same_in_pieces(bytes: &[u8], walked: &Walked) {
    let whole = Framing::new().walk(bytes).map_err(|(_, fault)| fault.to_string());
    assert_eq!(whole.err(), walked.fault.as_ref().map(|(_, fault)| fault.clone()), "in one piece");
    let mut framing = Framing::new();
    let size = bytes.first().map_or(1, |byte| usize::from(*byte) % 7 + 2);
    let pieces = bytes.chunks(size).find_map(|piece| framing.walk(piece).err());
    let fault = pieces.map(|(_, fault)| fault.to_string());
    assert_eq!(fault, walked.fault.as_ref().map(|(_, fault)| fault.clone()), "in pieces of {size}");
}
