//! Messages from files and pipes: cut at separators, or one JSON object a line.

use std::io::{self, BufRead, Read as _};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;

use crate::client::Message;

/// Where one record ends and the next begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Separator {
    /// After these bytes, which belong to no record.
    Bytes(Vec<u8>),
    /// At empty lines, any number of them.
    BlankLine,
}

/// No record may be longer: far more than a message may have, so that the server's own limit is what users meet.
const RECORD_BYTES_MAX: u64 = 32 << 20;

/// Records of an input, one at a time in one buffer.
#[derive(Debug)]
pub(super) struct Records<R> {
    reader: R,
    separator: Separator,
    buffer: Vec<u8>,
}

impl<R: BufRead> Records<R> {
    pub(super) fn new(reader: R, separator: Separator) -> Self {
        Records {
            reader,
            separator,
            buffer: Vec::new(),
        }
    }

    /// The next record without its separator. What follows the last separator is a record if it is not empty.
    pub(super) fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.buffer.clear();
        match &self.separator {
            Separator::Bytes(separator) => {
                let separator = separator.clone();
                match separator.last() {
                    Some(&last) => self.until(last, &separator),
                    None => self.whole(),
                }
            }
            Separator::BlankLine => self.paragraph(),
        }
    }

    fn read_until(&mut self, last: u8) -> io::Result<usize> {
        let left = RECORD_BYTES_MAX.saturating_sub(self.buffer.len() as u64);
        if left == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("there is no separator within {RECORD_BYTES_MAX} bytes"),
            ));
        }
        (&mut self.reader).take(left).read_until(last, &mut self.buffer)
    }

    fn until(&mut self, last: u8, separator: &[u8]) -> io::Result<Option<&[u8]>> {
        loop {
            let read = self.read_until(last)?;
            if self.buffer.ends_with(separator) {
                let end = self.buffer.len() - separator.len();
                return Ok(Some(&self.buffer[..end]));
            }
            if read == 0 {
                return Ok(Some(&self.buffer[..]).filter(|b| !b.is_empty()));
            }
        }
    }

    fn whole(&mut self) -> io::Result<Option<&[u8]>> {
        (&mut self.reader)
            .take(RECORD_BYTES_MAX)
            .read_to_end(&mut self.buffer)?;
        Ok(Some(&self.buffer[..]).filter(|b| !b.is_empty()))
    }

    fn paragraph(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            let begin = self.buffer.len();
            let read = self.read_until(b'\n')?;
            let line = &self.buffer[begin..];
            let blank = matches!(line, b"\n" | b"\r\n");
            if blank && begin == 0 {
                self.buffer.clear();
                continue;
            }
            if blank || read == 0 {
                self.buffer.truncate(begin);
                let end = match &self.buffer[..] {
                    [.., b'\r', b'\n'] => begin - 2,
                    [.., b'\n'] => begin - 1,
                    _ => begin,
                };
                return Ok(Some(&self.buffer[..end]).filter(|_| begin > 0));
            }
        }
    }
}

/// A line of `--jsonl`: what `mainstem sub --jsonl` prints; where it was stored is ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    subject: Option<String>,
    payload: Option<Value>,
    payload_base64: Option<String>,
    key: Option<String>,
    key_base64: Option<String>,
    message_id: Option<String>,
    event_time_us: Option<u64>,
    headers: Headers,
    #[serde(rename = "shard")]
    _shard: Option<u32>,
    #[serde(rename = "sequence")]
    _sequence: Option<u64>,
    #[serde(rename = "time_us")]
    _time_us: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Headers {
    List(Vec<Header>),
    Map(std::collections::BTreeMap<String, String>),
}

impl Default for Headers {
    fn default() -> Self {
        Headers::List(Vec::new())
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    name: String,
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    value_base64: Option<String>,
}

fn bytes(what: &str, text: Option<String>, base64: Option<String>) -> Result<Option<Bytes>, String> {
    match (text, base64) {
        (Some(_), Some(_)) => Err(format!("both `{what}` and `{what}_base64` are given")),
        (Some(text), None) => Ok(Some(text.into())),
        (None, Some(base64)) => BASE64
            .decode(base64)
            .map(|b| Some(b.into()))
            .map_err(|e| format!("`{what}_base64` is not base64: {e}")),
        (None, None) => Ok(None),
    }
}

/// Reads a line of `--jsonl`; without a subject of its own, the message gets `subject`.
pub(super) fn parse_json(line: &[u8], subject: &str) -> Result<Message, String> {
    let line: Line = serde_json::from_slice(line).map_err(|e| format!("not a message as JSON: {e}"))?;
    let payload = line.payload.map(|p| match p {
        Value::String(text) => text,
        // A document of its own.
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            other.to_string()
        }
    });
    let headers = match line.headers {
        Headers::List(list) => list
            .into_iter()
            .map(|h| Ok((h.name, bytes("value", h.value, h.value_base64)?.unwrap_or_default())))
            .collect::<Result<_, String>>()?,
        Headers::Map(map) => map.into_iter().map(|(name, value)| (name, value.into())).collect(),
    };
    Ok(Message {
        subject: line.subject.unwrap_or_else(|| subject.to_owned()),
        payload: bytes("payload", payload, line.payload_base64)?.unwrap_or_default(),
        key: bytes("key", line.key, line.key_base64)?,
        message_id: line.message_id,
        event_time_us: line.event_time_us,
        headers,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::output::message_json;
    use crate::client::StoredMessage;

    fn cut(input: &str, separator: Separator) -> Vec<String> {
        // A tiny buffer, so that separators fall on its border.
        let reader = io::BufReader::with_capacity(3, input.as_bytes());
        let mut records = Records::new(reader, separator);
        let mut all = Vec::new();
        while let Some(r) = records.next().unwrap() {
            all.push(String::from_utf8(r.to_vec()).unwrap());
        }
        all
    }

    #[test]
    fn lines_are_kept_as_they_are() {
        let lines = || Separator::Bytes(b"\n".to_vec());
        assert_eq!(cut("a\n\nb\r\nc", lines()), ["a", "", "b\r", "c"]);
        assert_eq!(cut("a\n", lines()), ["a"]);
        assert!(cut("", lines()).is_empty());
    }

    #[test]
    fn long_separators() {
        let separator = || Separator::Bytes(b"--\n".to_vec());
        assert_eq!(cut("a\nb--\nc--\n", separator()), ["a\nb", "c"]);
        assert_eq!(cut("--\n-\n--\n", separator()), ["", "-\n"]);
        assert_eq!(cut("a\nb", Separator::Bytes(vec![])), ["a\nb"]);
    }

    #[test]
    fn paragraphs() {
        let cut = |input| cut(input, Separator::BlankLine);
        assert_eq!(cut("\n\na\nb\n\n\n\nc\n\n"), ["a\nb", "c"]);
        assert_eq!(cut("a\r\nb\r\n\r\nc"), ["a\r\nb", "c"]);
        assert_eq!(cut("a\n"), ["a"]);
        assert!(cut("\n\n\n").is_empty());
    }

    #[test]
    fn what_is_printed_can_be_published_again() {
        let stored = StoredMessage {
            shard: 1,
            sequence: 7,
            append_time_us: 9,
            subject: "a.b".into(),
            payload: Bytes::from_static(b"\xff\x00"),
            key: Some(Bytes::from_static(b"k")),
            message_id: Some("id".into()),
            event_time_us: Some(5),
            headers: vec![
                ("h".into(), Bytes::from_static(b"\xfe")),
                ("h".into(), Bytes::from_static(b"x")),
            ],
        };
        let message = parse_json(message_json(&stored).to_string().as_bytes(), "other").unwrap();
        assert_eq!(message.subject, stored.subject);
        assert_eq!(message.payload, stored.payload);
        assert_eq!(message.key, stored.key);
        assert_eq!(message.message_id, stored.message_id);
        assert_eq!(message.event_time_us, stored.event_time_us);
        assert_eq!(message.headers, stored.headers);
    }

    #[test]
    fn json_of_all_kinds() {
        let m = parse_json(br#"{"payload": {"a": 1}, "headers": {"h": "v"}}"#, "s").unwrap();
        assert_eq!(
            (m.subject.as_str(), &m.payload[..], m.headers.len()),
            ("s", &b"{\"a\":1}"[..], 1)
        );
        for bad in [
            "",
            "1",
            r#"{"paylod": "x"}"#,
            r#"{"payload": "x", "payload_base64": "eA=="}"#,
            r#"{"key_base64": "!"}"#,
        ] {
            assert!(parse_json(bad.as_bytes(), "s").is_err(), "{bad}");
        }
    }
}
