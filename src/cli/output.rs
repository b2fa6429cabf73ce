//! What commands print: data on the standard output, everything else on the standard error.

use std::io::{self, IsTerminal as _, Write as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};

use super::failure::Failure;
use crate::client::StoredMessage;

/// How listings are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(super) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs: one JSON document
    Json,
}

/// `--format`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct FormatArg {
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(super) format: Format,
}

/// Writes to the standard output.
pub(super) fn data(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// Writes a line to the standard output.
pub(super) fn line(text: impl std::fmt::Display) -> Result<(), Failure> {
    data(format!("{text}\n").as_bytes())
}

/// Begins the screen anew, if there is one: what is printed again and again stays in its place.
pub(super) fn clear_screen() -> Result<(), Failure> {
    if io::stdout().is_terminal() {
        data(b"\x1b[H\x1b[2J")
    } else {
        line("")
    }
}

/// Writes a JSON document to the standard output.
pub(super) fn json(value: &Value) -> Result<(), Failure> {
    line(serde_json::to_string_pretty(value).expect("a value of JSON can be written"))
}

/// Tells the user something that is not data.
pub(super) fn status(text: impl std::fmt::Display) {
    // Nothing can be done if the standard error is gone.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A table with these columns; those that begin with `>` are aligned to the right.
pub(super) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if !io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    table.set_header(columns.iter().map(|c| Cell::new(c.trim_start_matches('>'))));
    for (i, column) in columns.iter().enumerate() {
        if let Some(c) = table.column_mut(i).filter(|_| column.starts_with('>')) {
            c.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Names and values, one pair a line, aligned.
pub(super) fn pairs(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in pairs {
        let value = value.replace('\n', &format!("\n{:width$}  ", ""));
        text.push_str(&format!("{name:width$}  {value}\n"));
    }
    text
}

/// Puts bytes under `name` if they are text, or else under `name_base64`.
pub(super) fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), text.into()),
        Err(_) => object.insert(format!("{name}_base64"), BASE64.encode(bytes).into()),
    };
}

/// A message as JSON: what `mainstem pub --jsonl` reads, and where it is stored.
pub(super) fn message_json(m: &StoredMessage) -> Value {
    let mut object = Map::new();
    object.insert("shard".into(), m.shard.into());
    object.insert("sequence".into(), m.sequence.into());
    object.insert("time_us".into(), m.append_time_us.into());
    object.insert("subject".into(), m.subject.as_str().into());
    put_bytes(&mut object, "payload", &m.payload);
    if let Some(key) = &m.key {
        put_bytes(&mut object, "key", key);
    }
    if let Some(id) = &m.message_id {
        object.insert("message_id".into(), id.as_str().into());
    }
    if let Some(time) = m.event_time_us {
        object.insert("event_time_us".into(), time.into());
    }
    if !m.headers.is_empty() {
        let headers = m.headers.iter().map(|(name, value)| {
            let mut header = Map::new();
            header.insert("name".into(), name.as_str().into());
            put_bytes(&mut header, "value", value);
            Value::Object(header)
        });
        object.insert("headers".into(), json!(headers.collect::<Vec<_>>()));
    }
    Value::Object(object)
}

/// Bytes for people: text as it is, control characters and what is no text escaped, cut at `max` characters.
pub(super) fn printable(bytes: &[u8], max: usize) -> String {
    let mut shown = String::new();
    let mut count = 0;
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if count == max {
                shown.push('…');
                return shown;
            }
            count += 1;
            if c.is_control() {
                shown.extend(c.escape_default());
            } else {
                shown.push(c);
            }
        }
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
            count += 1;
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_without_harm() {
        assert_eq!(printable("a\x1b[31m\né".as_bytes(), 100), "a\\u{1b}[31m\\né");
        assert_eq!(printable(b"\xff\x00a", 100), "\\xff\\u{0}a");
        assert_eq!(printable(b"abcdef", 3), "abc…");
    }

    #[test]
    fn pairs_are_aligned() {
        assert_eq!(
            pairs(&[("a", "1".into()), ("long", "2\n3".into())]),
            "a     1\nlong  2\n      3\n"
        );
    }
}
