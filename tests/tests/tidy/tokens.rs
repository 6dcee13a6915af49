//! Splits a Rust source into its tokens: names, `::`, literals, and single characters.
//!
//! Comments are dropped and a string is one token, so their content is never taken for code.

/// A token and the line that it starts on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Token<'a> {
    pub(crate) text: &'a str,
    pub(crate) line: usize,
}

/// Returns all tokens of a source file that rustc accepts.
pub(crate) fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let mut rest = source;
    let mut line = 1;
    while let Some(first) = rest.chars().next() {
        let length = length(rest, first);
        let text = &rest[..length];
        let is_comment = text.starts_with("//") || text.starts_with("/*");
        if !first.is_whitespace() && !is_comment {
            let text = text.strip_prefix("r#").unwrap_or(text);
            found.push(Token { text, line });
        }
        line += text.matches('\n').count();
        rest = &rest[length..];
    }
    found
}

/// Returns the length in bytes of the comment or token at the start of `rest`.
fn length(rest: &str, first: char) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return comment(rest);
    }
    if let Some(length) = string(rest) {
        return length;
    }
    if first == '\'' {
        return quote(rest);
    }
    if rest.starts_with("::") {
        return 2;
    }
    if is_of_word(first) {
        let start = if rest.starts_with("r#") { 2 } else { 0 };
        let end = rest[start..].find(|c: char| !is_of_word(c));
        return end.map_or(rest.len(), |end| start + end);
    }
    first.len_utf8()
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Returns the length of a block comment; block comments nest.
fn comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// Returns the length of a string, raw or not, if `rest` starts with one.
fn string(rest: &str) -> Option<usize> {
    let prefix = rest
        .find(|c: char| !matches!(c, 'b' | 'c' | 'r'))
        .filter(|length| *length <= 2)?;
    let body = &rest[prefix..];
    if rest[..prefix].ends_with('r') {
        let hashes = body.find(|c: char| c != '#')?;
        let content = body[hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(hashes));
        let length = content.find(&end).unwrap_or(content.len());
        return Some((prefix + hashes + 1 + length + end.len()).min(rest.len()));
    }
    let content = body.strip_prefix('"')?;
    Some(prefix + 1 + closing(content, '"'))
}

/// Returns the length up to and including the closing quote; a backslash escapes it.
fn closing(content: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in content.char_indices() {
        if c == quote && !is_escaped {
            return at + 1;
        }
        is_escaped = c == '\\' && !is_escaped;
    }
    content.len()
}

/// Returns the length of a character literal or lifetime.
fn quote(rest: &str) -> usize {
    let content = &rest[1..];
    let mut chars = content.chars();
    let first = chars.next();
    if first == Some('\\') || chars.next() == Some('\'') {
        return 1 + closing(content, '\'');
    }
    let end = content.find(|c: char| !is_of_word(c));
    1 + end.unwrap_or(content.len())
}
