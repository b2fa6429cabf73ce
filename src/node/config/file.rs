//! The configuration file: TOML, read against the table of settings, each complaint with its line.

use toml::de::{DeTable, DeValue};

use super::human::Kind;
use super::table::{SECTIONS, SETTINGS, Setting, find};

/// A value of the file, as text.
#[derive(Debug)]
pub struct Found {
    pub setting: &'static Setting,
    pub text: String,
    /// From 1.
    pub line: usize,
}

/// What is wrong, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Complaint {
    /// From 1; none: nobody knows.
    pub line: Option<usize>,
    pub message: String,
}

/// Reads a file; everything that is wrong with it is told at once.
pub fn read(input: &str) -> Result<Vec<Found>, Vec<Complaint>> {
    let line = |at: usize| input[..at.min(input.len())].matches('\n').count() + 1;
    let root = match DeTable::parse(input) {
        Ok(root) => root,
        Err(error) => {
            let line = error.span().map(|span| line(span.start));
            return Err(vec![Complaint {
                line,
                message: format!("not TOML: {}", error.message()),
            }]);
        }
    };
    let mut found = Vec::new();
    let mut complaints = Vec::new();
    let mut complain = |at: usize, message: String| {
        complaints.push(Complaint {
            line: Some(line(at)),
            message,
        })
    };
    for (section, content) in root.get_ref() {
        let at = section.span().start;
        let section = section.get_ref().as_ref();
        let known = SECTIONS.iter().any(|(name, _)| *name == section);
        let DeValue::Table(fields) = content.get_ref() else {
            complain(at, unknown_key("", section));
            continue;
        };
        if !known {
            complain(at, unknown_section(section));
            continue;
        }
        for (field, value) in fields {
            let at = field.span().start;
            let field = field.get_ref().as_ref();
            let Some(setting) = find(section, field) else {
                complain(at, unknown_key(section, field));
                continue;
            };
            match text_of(setting.kind, value.get_ref()) {
                Some(text) => found.push(Found {
                    setting,
                    text,
                    line: line(at),
                }),
                None => complain(
                    at,
                    format!(
                        "{section}.{field} has a value of the wrong type; allowed: {}",
                        form_of(setting.kind)
                    ),
                ),
            }
        }
    }
    // The parser gives the keys sorted; people look from top to bottom.
    complaints.sort_by_key(|complaint| complaint.line);
    if complaints.is_empty() {
        Ok(found)
    } else {
        Err(complaints)
    }
}

/// The value as the text that a flag would have; none if TOML has it as another type.
fn text_of(kind: Kind, value: &DeValue<'_>) -> Option<String> {
    match (kind, value) {
        (
            Kind::Text
            | Kind::Path
            | Kind::Address
            | Kind::Hosts
            | Kind::Pairs
            | Kind::Size
            | Kind::Duration
            | Kind::Choice(_),
            DeValue::String(text),
        ) => Some(text.to_string()),
        (Kind::Size | Kind::Count | Kind::Ratio, DeValue::Integer(number)) => {
            Some(i64::from_str_radix(number.as_str(), number.radix()).ok()?.to_string())
        }
        (Kind::Ratio, DeValue::Float(number)) => Some(number.as_str().to_owned()),
        (Kind::Switch, DeValue::Boolean(value)) => Some(value.to_string()),
        (
            Kind::Text
            | Kind::Path
            | Kind::Address
            | Kind::Hosts
            | Kind::Pairs
            | Kind::Size
            | Kind::Duration
            | Kind::Count
            | Kind::Ratio
            | Kind::Switch
            | Kind::Choice(_),
            _,
        ) => None,
    }
}

fn form_of(kind: Kind) -> String {
    let quotes = if kind.is_quoted() {
        ", in quotes"
    } else {
        ", without quotes"
    };
    kind.allowed() + quotes
}

fn unknown_section(section: &str) -> String {
    let names = SECTIONS.iter().map(|(name, _)| *name);
    match nearest(section, names.clone()) {
        Some(name) => format!("unknown section [{section}]; did you mean [{name}]?"),
        None => format!(
            "unknown section [{section}]; there are {}",
            names.collect::<Vec<_>>().join(", ")
        ),
    }
}

fn unknown_key(section: &str, field: &str) -> String {
    let place = if section.is_empty() {
        "outside of any section".to_owned()
    } else {
        format!("in [{section}]")
    };
    if let Some(elsewhere) = SETTINGS.iter().find(|setting| setting.field == field) {
        return format!("unknown key \"{field}\" {place}; it belongs in [{}]", elsewhere.section);
    }
    let here: Vec<_> = SETTINGS
        .iter()
        .filter(|s| s.section == section)
        .map(|s| s.field)
        .collect();
    let flag = SETTINGS
        .iter()
        .find(|setting| setting.flag == field || setting.flag.replace('-', "_") == field);
    match (
        nearest(field, here.iter().copied()),
        flag,
        nearest(field, SETTINGS.iter().map(|s| s.field)),
    ) {
        (Some(name), _, _) => format!("unknown key \"{field}\" {place}; did you mean \"{name}\"?"),
        (None, Some(setting), _) => {
            format!(
                "unknown key \"{field}\" {place}; did you mean \"{}\" in [{}]?",
                setting.field, setting.section
            )
        }
        (None, None, Some(name)) => {
            let section = SETTINGS.iter().find(|s| s.field == name).map_or("", |s| s.section);
            format!("unknown key \"{field}\" {place}; did you mean \"{name}\" in [{section}]?")
        }
        (None, None, None) if here.is_empty() => format!("unknown key \"{field}\" {place}"),
        (None, None, None) => format!("unknown key \"{field}\" {place}; there are {}", here.join(", ")),
    }
}

/// The candidate that differs by the fewest slips of the keyboard, if by few.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (slips(word, candidate), candidate))
        .filter(|(slips, candidate)| *slips <= candidate.len().max(word.len()).div_ceil(4).max(1))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Letters to add, drop, change or swap with their neighbour to get from one word to the other.
fn slips(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut rows = vec![vec![0; other.len() + 1]; one.len() + 1];
    for i in 0..=one.len() {
        for j in 0..=other.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let change = usize::from(one[i - 1] != other[j - 1]);
                let mut best = (rows[i - 1][j] + 1)
                    .min(rows[i][j - 1] + 1)
                    .min(rows[i - 1][j - 1] + change);
                if i > 1 && j > 1 && one[i - 1] == other[j - 2] && one[i - 2] == other[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_counted() {
        for (one, other, count) in [
            ("", "", 0),
            ("", "abc", 3),
            ("listen", "listen", 0),
            ("lisetn", "listen", 1),
            ("data_dirr", "data_dir", 1),
        ] {
            assert_eq!(slips(one, other), count, "{one} {other}");
            assert_eq!(slips(other, one), count, "{other} {one}");
        }
    }

    #[track_caller]
    fn complaint(input: &str) -> String {
        let complaints = read(input).expect_err("something is wrong");
        let [
            Complaint {
                line: Some(line),
                message,
            },
        ] = &complaints[..]
        else {
            panic!("{complaints:?}")
        };
        format!("{line}: {message}")
    }

    #[test]
    fn unknown_keys_are_refused_with_a_suggestion_and_their_line() {
        let cases = [
            (
                "[node]\n\ndata_dirr = \"x\"",
                "3: unknown key \"data_dirr\" in [node]; did you mean \"data_dir\"?",
            ),
            (
                "[lisetn]\nclient = \"x\"",
                "1: unknown section [lisetn]; did you mean [listen]?",
            ),
            (
                "[listen]\nclient_ca = \"x\"",
                "2: unknown key \"client_ca\" in [listen]; it belongs in [tls]",
            ),
            (
                "data_dir = \"x\"",
                "1: unknown key \"data_dir\" outside of any section; it belongs in [node]",
            ),
            (
                "[listen]\nprometheus_listen_on = \"x\"",
                "2: unknown key \"prometheus_listen_on\" in [listen]; did you mean \"prometheus\" in [listen]?",
            ),
            (
                "[raft]\nzzz = 1",
                "2: unknown key \"zzz\" in [raft]; there are pool_groups, heartbeat, election_min, election_max, snapshot_rate",
            ),
            (
                "node.data_dri = \"x\"",
                "1: unknown key \"data_dri\" in [node]; did you mean \"data_dir\"?",
            ),
        ];
        for (input, expected) in cases {
            assert_eq!(complaint(input), expected);
        }
    }

    #[test]
    fn wrong_types_and_syntax_are_told_with_their_line() {
        assert!(
            complaint("[listen]\ninsecure = \"yes\"").starts_with("2: listen.insecure has a value of the wrong type")
        );
        assert!(complaint("[limits]\nsessions_max = 1.5").contains("a whole number, without quotes"));
        assert!(complaint("[log]\nlevel = 3").contains("in quotes"));
        assert!(complaint("[node]\nname = \"a\"\nname = \"b\"").starts_with("3: not TOML: duplicate key"));
        assert!(complaint("[node\n").starts_with("1: not TOML"));
    }

    #[test]
    fn everything_wrong_is_told_at_once_in_the_order_of_the_file() {
        let complaints = read("[node]\nzzzz = 1\n[log]\nlevle = \"info\"\n[cluster]\nnmae = \"x\"").expect_err("wrong");
        let lines: Vec<_> = complaints.iter().filter_map(|complaint| complaint.line).collect();
        assert_eq!(lines, [2, 4, 6]);
    }

    #[test]
    fn sizes_may_be_numbers() {
        let found = read("[limits]\npublish_memory = 0x4000000\nread_memory = \"64MiB\"").expect("fine");
        let mut texts: Vec<_> = found.iter().map(|found| found.text.as_str()).collect();
        texts.sort_unstable();
        assert_eq!(texts, ["64MiB", "67108864"]);
    }
}
