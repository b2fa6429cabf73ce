//! One record's content, decoded without copying.

use std::str;

use super::{
    FLAG_EVENT_TIME, FLAG_HEADERS, FLAG_KEY, FLAG_MESSAGE_ID, FLAGS_KNOWN, HEADERS_MAX, KEY_BYTES_MAX, RecordError,
};
use crate::model::TimeUs;

/// A record of a batch, borrowed from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordView<'a> {
    /// Place in the batch, from 0.
    pub position: u32,
    /// Where the message belongs.
    pub subject: &'a str,
    /// The partition key.
    pub key: Option<&'a [u8]>,
    /// For de-duplication.
    pub message_id: Option<&'a str>,
    /// The client's own time.
    pub event_time: Option<TimeUs>,
    /// Name and value pairs, in order; names may repeat.
    pub headers: Headers<'a>,
    /// The message itself.
    pub payload: &'a [u8],
    /// The content with its length and CRC before it: what a batch made of chosen records copies.
    pub raw: &'a [u8],
    /// The message size that limits count: bytes of the content.
    pub size: u32,
}

/// What an apply needs to know of a record; cheaper than all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordBrief<'a> {
    /// Place in the batch, from 0.
    pub position: u32,
    /// The message size that limits count.
    pub size: u32,
    /// Not checked again.
    pub subject: &'a [u8],
    /// Not checked again.
    pub message_id: Option<&'a [u8]>,
}

/// The headers of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Headers<'a> {
    count: u16,
    bytes: &'a [u8],
}

impl<'a> Headers<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The value of the first header with this name.
    pub fn get(self, name: &str) -> Option<&'a [u8]> {
        self.into_iter()
            .find(|(found, _)| *found == name)
            .map(|(_, value)| value)
    }
}

impl<'a> IntoIterator for Headers<'a> {
    type Item = (&'a str, &'a [u8]);
    type IntoIter = HeadersIter<'a>;

    fn into_iter(self) -> HeadersIter<'a> {
        HeadersIter { rest: self.bytes }
    }
}

/// Name and value of each header.
#[derive(Debug, Clone)]
pub struct HeadersIter<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for HeadersIter<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        // The section was walked when the record was decoded, so neither can fail before it ends.
        let name = take_short(&mut self.rest, "header").ok()?;
        let name = str::from_utf8(name).ok()?;
        let value = take_header_value(&mut self.rest).ok()?;
        Some((name, value))
    }
}

/// What the content says, in the order of the format.
pub(super) struct Content<'a> {
    pub subject: &'a [u8],
    pub key: Option<&'a [u8]>,
    pub message_id: Option<&'a [u8]>,
    pub event_time: Option<TimeUs>,
    pub headers: Headers<'a>,
    pub payload: &'a [u8],
}

fn take<'a>(rest: &mut &'a [u8], count: usize, field: &'static str) -> Result<&'a [u8], RecordError> {
    let (taken, after) = rest.split_at_checked(count).ok_or(RecordError::PastEnd { field })?;
    *rest = after;
    Ok(taken)
}

fn take_array<'a, const N: usize>(rest: &mut &'a [u8], field: &'static str) -> Result<&'a [u8; N], RecordError> {
    let (taken, after) = rest.split_first_chunk::<N>().ok_or(RecordError::PastEnd { field })?;
    *rest = after;
    Ok(taken)
}

/// Something with its length in one byte before it.
fn take_short<'a>(rest: &mut &'a [u8], field: &'static str) -> Result<&'a [u8], RecordError> {
    let [length] = *take_array::<1>(rest, field)?;
    take(rest, usize::from(length), field)
}

fn take_header_value<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], RecordError> {
    let length = u32::from_le_bytes(*take_array::<4>(rest, "header value")?);
    take(rest, length as usize, "header value")
}

/// Flags and subject, and what comes after them.
#[inline]
fn begin(content: &[u8]) -> Result<(u8, &[u8], &[u8]), RecordError> {
    let mut rest = content;
    let [flags] = *take_array::<1>(&mut rest, "flags")?;
    if flags & !FLAGS_KNOWN != 0 {
        return Err(RecordError::Flags { found: flags });
    }
    let subject = take_short(&mut rest, "subject")?;
    Ok((flags, subject, rest))
}

fn take_key<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], RecordError> {
    let length = usize::from(u16::from_le_bytes(*take_array::<2>(rest, "key")?));
    if length == 0 || length > KEY_BYTES_MAX {
        return Err(RecordError::Key { bytes: length });
    }
    take(rest, length, "key")
}

fn take_message_id<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], RecordError> {
    let id = take_short(rest, "message id")?;
    if id.is_empty() {
        return Err(RecordError::MessageId { bytes: 0 });
    }
    Ok(id)
}

/// Subject and message id of a content: all that an apply looks at.
#[inline]
pub(super) fn decode_brief(content: &[u8]) -> Result<(&[u8], Option<&[u8]>), RecordError> {
    let (flags, subject, mut rest) = begin(content)?;
    if flags & FLAG_MESSAGE_ID == 0 {
        return Ok((subject, None));
    }
    if flags & FLAG_KEY != 0 {
        take_key(&mut rest)?;
    }
    Ok((subject, Some(take_message_id(&mut rest)?)))
}

/// All fields of a content. Lengths are checked, and that header names are UTF-8; subject and id are left as bytes.
#[inline]
pub(super) fn decode(content: &[u8]) -> Result<Content<'_>, RecordError> {
    let (flags, subject, mut rest) = begin(content)?;
    let key = match flags & FLAG_KEY {
        0 => None,
        _ => Some(take_key(&mut rest)?),
    };
    let message_id = match flags & FLAG_MESSAGE_ID {
        0 => None,
        _ => Some(take_message_id(&mut rest)?),
    };
    let event_time = match flags & FLAG_EVENT_TIME {
        0 => None,
        _ => Some(TimeUs::new(u64::from_le_bytes(*take_array::<8>(
            &mut rest,
            "event time",
        )?))),
    };
    let headers = match flags & FLAG_HEADERS {
        0 => Headers::default(),
        _ => take_headers(&mut rest)?,
    };
    Ok(Content {
        subject,
        key,
        message_id,
        event_time,
        headers,
        payload: rest,
    })
}

fn take_headers<'a>(rest: &mut &'a [u8]) -> Result<Headers<'a>, RecordError> {
    let count = u16::from_le_bytes(*take_array::<2>(rest, "headers")?);
    if count == 0 || usize::from(count) > HEADERS_MAX {
        return Err(RecordError::HeaderCount {
            count: usize::from(count),
        });
    }
    let begin = *rest;
    for _ in 0..count {
        let name = take_short(rest, "header name")?;
        if name.is_empty() {
            return Err(RecordError::HeaderName { bytes: 0 });
        }
        str::from_utf8(name).map_err(|_| RecordError::NotUtf8 { field: "header name" })?;
        take_header_value(rest)?;
    }
    let bytes = &begin[..begin.len() - rest.len()];
    Ok(Headers { count, bytes })
}

/// As [`decode`], with the texts as texts.
#[inline]
pub(super) fn view<'a>(position: u32, raw: &'a [u8], content: &'a [u8]) -> Result<RecordView<'a>, RecordError> {
    let fields = decode(content)?;
    let text = |bytes, field| str::from_utf8(bytes).map_err(|_| RecordError::NotUtf8 { field });
    Ok(RecordView {
        position,
        subject: text(fields.subject, "subject")?,
        key: fields.key,
        message_id: fields.message_id.map(|id| text(id, "message id")).transpose()?,
        event_time: fields.event_time,
        headers: fields.headers,
        payload: fields.payload,
        raw,
        size: content.len() as u32,
    })
}
