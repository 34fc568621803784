//! The one form of a path (policy B-5, T-22), by the letter of RFC 3986, section 5.2.4.

/// Nobody can judge it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unusable;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normal {
    /// With the query.
    pub upstream: String,
    /// Without it (policy G-2).
    pub matched: String,
}

/// # Errors
/// For what T-22 lists: relative, broken escapes, NUL, what is no printable ASCII, a backslash, text that is not UTF-8, dot
/// segments behind escaped slashes.
pub fn normalise(sent: &str, method: &str) -> Result<Normal, Unusable> {
    let sent = sent.split_once('#').map_or(sent, |(before, _)| before);
    let (path, query) = match sent.split_once('?') {
        Some((path, query)) => (path, format!("?{query}")),
        None => (sent, String::new()),
    };
    if !sent.chars().all(|c| ('!'..='~').contains(&c) && c != '\\') {
        return Err(Unusable);
    }
    if path == "*" && method == "OPTIONS" {
        return Ok(Normal { upstream: sent.to_owned(), matched: path.to_owned() });
    }
    if !path.starts_with('/') {
        return Err(Unusable);
    }
    let matched = without_dots(&decoded(path)?);
    // A dot segment for whoever decodes the slash, or the backslash, beside it.
    let bared = matched.to_ascii_lowercase().replace("%2f", "/").replace("%5c", "/");
    if bared.split('/').any(|segment| segment == "." || segment == "..") {
        return Err(Unusable);
    }
    Ok(Normal { upstream: format!("{matched}{query}"), matched })
}

/// Escapes of unreserved characters are decoded, others kept as they are.
fn decoded(path: &str) -> Result<String, Unusable> {
    let characters: Vec<char> = path.chars().collect();
    let (mut shown, mut meant) = (String::new(), Vec::new());
    let mut at = 0;
    while at < characters.len() {
        let character = characters[at];
        if character != '%' {
            shown.push(character);
            meant.push(u8::try_from(character).map_err(|_| Unusable)?);
            at += 1;
            continue;
        }
        let digit = |offset: usize| characters.get(at + offset).and_then(|c| c.to_digit(16)).ok_or(Unusable);
        let byte = u8::try_from(digit(1)? * 16 + digit(2)?).map_err(|_| Unusable)?;
        if byte == 0 {
            return Err(Unusable);
        }
        let is_unreserved = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        if is_unreserved {
            shown.push(char::from(byte));
        } else {
            shown.extend(&characters[at..at + 3]);
        }
        meant.push(byte);
        at += 3;
    }
    if String::from_utf8(meant).is_err() {
        return Err(Unusable);
    }
    Ok(shown)
}

fn without_dots(path: &str) -> String {
    let (mut input, mut output) = (path.to_owned(), String::new());
    while !input.is_empty() {
        if input.starts_with("/./") {
            input = input[2..].to_owned();
        } else if input == "/." {
            input = "/".to_owned();
        } else if input.starts_with("/../") {
            input = input[3..].to_owned();
            output.truncate(output.rfind('/').unwrap_or(0));
        } else if input == "/.." {
            input = "/".to_owned();
            output.truncate(output.rfind('/').unwrap_or(0));
        } else {
            let end = input[1..].find('/').map_or(input.len(), |end| end + 1);
            output.push_str(&input[..end]);
            input = input[end..].to_owned();
        }
    }
    output
}
