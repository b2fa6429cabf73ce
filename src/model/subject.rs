//! Subjects and subject filters. Matching is on the path of every record, so nothing here allocates once a filter has
//! been parsed.

use std::fmt;

use super::limits::SUBJECT_BYTES_MAX;

/// Why a text is not a subject, or not a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubjectError {
    /// Nothing is there.
    #[error("the subject is empty; it must have 1-255 bytes")]
    Empty,
    /// Longer than 255 bytes.
    #[error("the subject has {bytes} bytes; at most 255 are allowed")]
    TooLong { bytes: usize },
    /// Two dots in a row, or one at an end.
    #[error("the subject has an empty token at byte {at}; tokens separated by '.' must not be empty")]
    EmptyToken { at: usize },
    /// A character that no subject may have.
    #[error("the subject has {character:?} at byte {at}; spaces and control characters are not allowed")]
    Character { at: usize, character: char },
    /// A wildcard in a subject that names one place.
    #[error("the subject has the wildcard '{wildcard}' at byte {at}; wildcards are only allowed in filters")]
    Wildcard { at: usize, wildcard: char },
    /// A wildcard that is not a whole token.
    #[error("the filter has '{wildcard}' at byte {at} inside a token; a wildcard must be a whole token")]
    PartialWildcard { at: usize, wildcard: char },
    /// `>` with something after it.
    #[error("the filter has '>' at byte {at} before its last token; '>' must be the last token")]
    RestNotLast { at: usize },
    /// Not UTF-8.
    #[error("the subject is not UTF-8")]
    NotUtf8,
}

const PLAIN: u8 = 0;
const DOT: u8 = 1;
const WILD: u8 = 2;
const BAD: u8 = 3;
const HIGH: u8 = 4;

const CLASS: [u8; 256] = {
    let mut class = [PLAIN; 256];
    let mut i = 0;
    while i < 256 {
        class[i] = match i as u8 {
            b'.' => DOT,
            b'*' | b'>' => WILD,
            0..=b' ' | 0x7f => BAD,
            0x80..=0xff => HIGH,
            _ => PLAIN,
        };
        i += 1;
    }
    class
};

/// Checks that a text may be the subject of a message: 1–255 bytes, non-empty tokens separated by `.`, no wildcards,
/// spaces or control characters.
pub fn validate_subject(subject: &str) -> Result<(), SubjectError> {
    let saw_wildcard = check_text(subject)?;
    if saw_wildcard {
        let at = subject.find(['*', '>']).expect("a wildcard was seen");
        let wildcard = char::from(subject.as_bytes()[at]);
        return Err(SubjectError::Wildcard { at, wildcard });
    }
    Ok(())
}

/// What subjects and filters have in common. Answers whether there is a wildcard character.
fn check_text(text: &str) -> Result<bool, SubjectError> {
    let bytes = text.as_bytes();
    if bytes.is_empty() {
        return Err(SubjectError::Empty);
    }
    if bytes.len() > SUBJECT_BYTES_MAX {
        return Err(SubjectError::TooLong { bytes: bytes.len() });
    }
    let mut token_is_empty = true;
    let mut seen = 0u8;
    for (at, &byte) in bytes.iter().enumerate() {
        let class = CLASS[usize::from(byte)];
        if class == DOT {
            if token_is_empty {
                return Err(SubjectError::EmptyToken { at });
            }
            token_is_empty = true;
        } else {
            token_is_empty = false;
            seen |= 1 << class;
        }
    }
    if seen & (1 << BAD | 1 << HIGH) != 0 {
        check_characters(text)?;
    }
    if token_is_empty {
        return Err(SubjectError::EmptyToken { at: bytes.len() });
    }
    Ok(seen & (1 << WILD) != 0)
}

#[cold]
fn check_characters(text: &str) -> Result<(), SubjectError> {
    for (at, character) in text.char_indices() {
        if character.is_whitespace() || character.is_control() {
            return Err(SubjectError::Character { at, character });
        }
    }
    Ok(())
}

/// A subject that was checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(Box<str>);

impl Subject {
    /// Checks and keeps a copy.
    pub fn parse(text: &str) -> Result<Self, SubjectError> {
        validate_subject(text)?;
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a filter is matched: the common shapes have short cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Shape {
    /// No wildcard.
    Literal,
    /// `>` alone.
    All,
    /// Literal tokens, then `>`. Up to and including the dot before `>`.
    Prefix(usize),
    /// Anything with `*`.
    General,
}

/// A subject filter: `*` stands for one token, `>` (only at the end) for one or more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Filter {
    text: Box<str>,
    shape: Shape,
}

impl Filter {
    /// Checks and keeps a copy.
    pub fn parse(text: &str) -> Result<Self, SubjectError> {
        let mut stars = false;
        let mut rest = false;
        if check_text(text)? {
            let mut at = 0;
            for token in text.split('.') {
                match token {
                    "*" => stars = true,
                    ">" => {
                        if at + 1 != text.len() {
                            return Err(SubjectError::RestNotLast { at });
                        }
                        rest = true;
                    }
                    other => {
                        if let Some(inside) = other.find(['*', '>']) {
                            return Err(SubjectError::PartialWildcard {
                                at: at + inside,
                                wildcard: char::from(other.as_bytes()[inside]),
                            });
                        }
                    }
                }
                at += token.len() + 1;
            }
        }
        let shape = match (stars, rest) {
            (false, false) => Shape::Literal,
            (false, true) if text == ">" => Shape::All,
            (false, true) => Shape::Prefix(text.len() - 1),
            (true, _) => Shape::General,
        };
        Ok(Self {
            text: text.into(),
            shape,
        })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it has no wildcard, so that it matches exactly the subject it spells.
    pub fn is_literal(&self) -> bool {
        self.shape == Shape::Literal
    }

    /// Whether it matches every subject.
    pub fn is_all(&self) -> bool {
        self.shape == Shape::All
    }

    /// Whether a (valid) subject matches.
    pub fn matches(&self, subject: &str) -> bool {
        match self.shape {
            Shape::Literal => *self.text == *subject,
            Shape::All => true,
            // A valid subject does not end in a dot, so something follows the prefix.
            Shape::Prefix(length) => {
                subject.len() > length && subject.as_bytes()[..length] == self.text.as_bytes()[..length]
            }
            Shape::General => matches_general(self.text.as_bytes(), subject.as_bytes()),
        }
    }

    /// Whether there is a subject that both match.
    pub fn overlaps(&self, other: &Filter) -> bool {
        overlaps(self, other)
    }

    /// The leading tokens without a wildcard, joined by dots: `orders.eu` of `orders.eu.*.x`; empty if the first is one.
    pub fn literal_prefix(&self) -> &str {
        let mut end = 0;
        for token in self.tokens() {
            if token == "*" || token == ">" {
                break;
            }
            end += token.len() + usize::from(end > 0);
        }
        &self.text[..end]
    }

    /// Its tokens, wildcards as they are written.
    pub fn tokens(&self) -> impl Iterator<Item = &str> {
        self.text.split('.')
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Cuts the first token off.
fn cut(text: &[u8]) -> (&[u8], Option<&[u8]>) {
    match text.iter().position(|&byte| byte == b'.') {
        Some(dot) => (&text[..dot], Some(&text[dot + 1..])),
        None => (text, None),
    }
}

fn matches_general(filter: &[u8], subject: &[u8]) -> bool {
    let mut filter = Some(filter);
    let mut subject = Some(subject);
    loop {
        match (filter, subject) {
            (None, None) => return true,
            (None, Some(_)) | (Some(_), None) => return false,
            (Some(f), Some(s)) => {
                let (filter_token, filter_rest) = cut(f);
                if filter_token == b">" {
                    return true;
                }
                let (subject_token, subject_rest) = cut(s);
                if filter_token != b"*" && filter_token != subject_token {
                    return false;
                }
                filter = filter_rest;
                subject = subject_rest;
            }
        }
    }
}

/// Whether there is a subject that both filters match.
pub fn overlaps(a: &Filter, b: &Filter) -> bool {
    let mut left = Some(a.text.as_bytes());
    let mut right = Some(b.text.as_bytes());
    loop {
        match (left, right) {
            (None, None) => return true,
            (None, Some(_)) | (Some(_), None) => return false,
            (Some(l), Some(r)) => {
                let (left_token, left_rest) = cut(l);
                let (right_token, right_rest) = cut(r);
                // The other side has at least one token left, which is what '>' needs.
                if left_token == b">" || right_token == b">" {
                    return true;
                }
                if left_token != b"*" && right_token != b"*" && left_token != right_token {
                    return false;
                }
                left = left_rest;
                right = right_rest;
            }
        }
    }
}

/// Several filters; a subject matches if any of them does. The empty set matches everything, as "no filter" does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilterSet {
    filters: Vec<Filter>,
    all: bool,
}

impl FilterSet {
    /// Matches everything.
    pub fn all() -> Self {
        Self {
            filters: Vec::new(),
            all: true,
        }
    }

    /// Parses each.
    pub fn parse<S: AsRef<str>>(texts: impl IntoIterator<Item = S>) -> Result<Self, SubjectError> {
        let filters = texts
            .into_iter()
            .map(|text| Filter::parse(text.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self::new(filters))
    }

    /// Of parsed filters.
    pub fn new(filters: Vec<Filter>) -> Self {
        let all = filters.is_empty() || filters.iter().any(Filter::is_all);
        Self { filters, all }
    }

    /// Whether a (valid) subject matches.
    pub fn matches(&self, subject: &str) -> bool {
        self.all || self.filters.iter().any(|filter| filter.matches(subject))
    }

    /// Whether every subject matches.
    pub fn is_all(&self) -> bool {
        self.all
    }

    /// The filters; empty for [`FilterSet::all`].
    pub fn filters(&self) -> &[Filter] {
        &self.filters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> Filter {
        Filter::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn subjects_say_what_is_wrong() {
        for good in ["a", "a.b", "orders.eu.17", "héllo.wörld", "$x.-_/", &"x".repeat(255)] {
            assert_eq!(validate_subject(good), Ok(()), "{good}");
        }
        let long = "x".repeat(256);
        for (bad, error) in [
            ("", SubjectError::Empty),
            (long.as_str(), SubjectError::TooLong { bytes: 256 }),
            (".a", SubjectError::EmptyToken { at: 0 }),
            ("a..b", SubjectError::EmptyToken { at: 2 }),
            ("a.", SubjectError::EmptyToken { at: 2 }),
            ("a b", SubjectError::Character { at: 1, character: ' ' }),
            (
                "a\u{85}b",
                SubjectError::Character {
                    at: 1,
                    character: '\u{85}',
                },
            ),
            (
                "a.\u{3000}",
                SubjectError::Character {
                    at: 2,
                    character: '\u{3000}',
                },
            ),
            ("a\0", SubjectError::Character { at: 1, character: '\0' }),
            ("a.*", SubjectError::Wildcard { at: 2, wildcard: '*' }),
            ("a.b>c", SubjectError::Wildcard { at: 3, wildcard: '>' }),
        ] {
            assert_eq!(validate_subject(bad), Err(error), "{bad}");
        }
    }

    #[test]
    fn filters_say_what_is_wrong() {
        for (bad, error) in [
            ("a.>.b", SubjectError::RestNotLast { at: 2 }),
            (">.>", SubjectError::RestNotLast { at: 0 }),
            ("a.b*", SubjectError::PartialWildcard { at: 3, wildcard: '*' }),
            ("a.>>", SubjectError::PartialWildcard { at: 2, wildcard: '>' }),
            ("a..>", SubjectError::EmptyToken { at: 2 }),
            ("* .a", SubjectError::Character { at: 1, character: ' ' }),
        ] {
            assert_eq!(Filter::parse(bad), Err(error), "{bad}");
        }
    }

    #[test]
    fn matching() {
        for (pattern, subject, expected) in [
            ("a", "a", true),
            ("a", "a.b", false),
            (">", "a", true),
            (">", "a.b.c", true),
            ("a.>", "a", false),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "ab.c", false),
            ("*", "a", true),
            ("*", "a.b", false),
            ("a.*.c", "a.b.c", true),
            ("a.*.c", "a.b.d", false),
            ("a.*.c", "a.b", false),
            ("a.*.c", "a.b.c.d", false),
            ("*.b.>", "a.b", false),
            ("*.b.>", "a.b.c.d", true),
        ] {
            assert_eq!(filter(pattern).matches(subject), expected, "{pattern} {subject}");
        }
    }

    #[test]
    fn overlapping() {
        for (a, b, expected) in [
            ("a", "a", true),
            ("a", "b", false),
            ("a.*", "*.b", true),
            ("a.*", "a.b.c", false),
            ("a.>", "a", false),
            ("a.>", "a.b.c", true),
            ("a.>", "*.b", true),
            (">", "x", true),
            ("a.*.c", "a.b.*", true),
            ("a.*.c", "*.b.d", false),
            ("a.*.>", "a.b", false),
            ("a.*.>", "a.>", true),
        ] {
            assert_eq!(filter(a).overlaps(&filter(b)), expected, "{a} {b}");
            assert_eq!(filter(b).overlaps(&filter(a)), expected, "{b} {a}");
        }
    }

    /// Overlap and matching must agree with trying every short subject.
    #[test]
    fn overlap_agrees_with_enumeration() {
        let tokens = ["a", "b", "*", ">"];
        let mut filters = Vec::new();
        let mut subjects = Vec::new();
        for x in tokens {
            filters.push(x.to_string());
            for y in tokens {
                filters.push(format!("{x}.{y}"));
                for z in tokens {
                    filters.push(format!("{x}.{y}.{z}"));
                }
            }
        }
        // A third letter stands for every token that no filter names, a fourth token for every longer subject.
        let letters = ["a", "b", "q"];
        for x in letters {
            subjects.push(x.to_string());
            for y in letters {
                subjects.push(format!("{x}.{y}"));
                for z in letters {
                    subjects.push(format!("{x}.{y}.{z}"));
                    subjects.push(format!("{x}.{y}.{z}.q"));
                }
            }
        }
        let filters: Vec<_> = filters.iter().filter_map(|text| Filter::parse(text).ok()).collect();
        for a in &filters {
            for b in &filters {
                let both = subjects.iter().any(|subject| a.matches(subject) && b.matches(subject));
                assert_eq!(a.overlaps(b), both, "{a} {b}");
            }
        }
    }

    #[test]
    fn prefixes() {
        for (pattern, prefix) in [("a.b", "a.b"), ("a.b.>", "a.b"), ("a.*.b", "a"), ("*.a", ""), (">", "")] {
            assert_eq!(filter(pattern).literal_prefix(), prefix);
        }
    }

    #[test]
    fn sets() {
        let set = FilterSet::parse(["a.*", "b.>"]).expect("valid");
        assert!(set.matches("a.x") && set.matches("b.x.y") && !set.matches("c") && !set.is_all());
        assert!(FilterSet::parse::<&str>([]).expect("valid").matches("anything"));
        assert!(FilterSet::parse(["a", ">"]).expect("valid").is_all());
        assert!(FilterSet::parse(["a", "b..c"]).is_err());
    }
}
