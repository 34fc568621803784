//! base64url without padding (RFC 7515, section 2).

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Bits of one character.
const SEXTET: u32 = 6;

/// `None` for anything that [`encode`] does not write: padding, blanks, a last character with bits too many.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut buffer, mut bits) = (0_u32, 0_u32);
    for character in text.bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        buffer = (buffer << SEXTET) | u32::from(value);
        bits += SEXTET;
        if bits >= u8::BITS {
            bits -= u8::BITS;
            bytes.push(u8::try_from((buffer >> bits) & 0xff).ok()?);
            buffer &= (1 << bits) - 1;
        }
    }
    (bits < SEXTET && buffer == 0).then_some(bytes)
}

pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    let (mut buffer, mut bits) = (0_u32, 0_u32);
    let character = |value: u32| char::from(ALPHABET[usize::try_from(value & 0x3f).unwrap_or_default()]);
    for byte in bytes {
        buffer = (buffer << u8::BITS) | u32::from(*byte);
        bits += u8::BITS;
        while bits >= SEXTET {
            bits -= SEXTET;
            text.push(character(buffer >> bits));
        }
        buffer &= (1 << bits) - 1;
    }
    if bits > 0 {
        text.push(character(buffer << (SEXTET - bits)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        for (bytes, text) in [
            (&b""[..], ""),
            (b"f", "Zg"),
            (b"fo", "Zm8"),
            (b"foo", "Zm9v"),
            (b"\xff\xfe\xfd", "__79"),
            (b"\xfb", "-w"),
        ] {
            assert_eq!(encode(bytes), text);
            assert_eq!(decode(text).as_deref(), Some(bytes), "{text}");
        }
    }

    #[test]
    fn nothing_else_is_decoded() {
        for text in ["Z", "Zg==", "Zm9v\n", " Zm9v", "Zm+v", "Zm/v", "Zh", "Zm9", "é"] {
            assert_eq!(decode(text), None, "{text}");
        }
    }
}
