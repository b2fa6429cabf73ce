//! The batch format (docs/reference/batch.md), written a second time and with nothing of the product in it.

use bytes::Bytes;

pub const HEADER: usize = 24;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    None = 0,
    Lz4 = 1,
    Zstd = 2,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    pub subject: String,
    pub key: Option<Vec<u8>>,
    pub message_id: Option<String>,
    pub event_time_us: Option<u64>,
    pub headers: Vec<(String, Vec<u8>)>,
    pub payload: Vec<u8>,
}

impl Record {
    pub fn new(subject: &str, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            subject: subject.into(),
            payload: payload.into(),
            ..Self::default()
        }
    }

    pub fn id(mut self, id: &str) -> Self {
        self.message_id = Some(id.into());
        self
    }

    /// The content as it lies in a batch.
    pub fn content(&self) -> Vec<u8> {
        let mut out = vec![0u8];
        out.push(self.subject.len() as u8);
        out.extend(self.subject.as_bytes());
        if let Some(key) = &self.key {
            out[0] |= 1;
            out.extend((key.len() as u16).to_le_bytes());
            out.extend(key);
        }
        if let Some(id) = &self.message_id {
            out[0] |= 2;
            out.push(id.len() as u8);
            out.extend(id.as_bytes());
        }
        if let Some(time) = self.event_time_us {
            out[0] |= 4;
            out.extend(time.to_le_bytes());
        }
        if !self.headers.is_empty() {
            out[0] |= 8;
            out.extend((self.headers.len() as u16).to_le_bytes());
            for (name, value) in &self.headers {
                out.push(name.len() as u8);
                out.extend(name.as_bytes());
                out.extend((value.len() as u32).to_le_bytes());
                out.extend(value);
            }
        }
        out.extend(&self.payload);
        out
    }
}

/// The records' part of a batch, from contents that may be anything.
pub fn body(contents: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    for content in contents {
        out.extend((content.len() as u32).to_le_bytes());
        out.extend(crc32fast::hash(content).to_le_bytes());
        out.extend(content);
    }
    out
}

/// A header and a body, with a correct CRC, whatever the header claims.
pub fn seal(codec: u8, count: u32, stored: &[u8], plain_len: u32, flags: u32) -> Vec<u8> {
    let mut out = vec![0x4d, 0x42, 1, codec];
    out.extend(count.to_le_bytes());
    out.extend((stored.len() as u32).to_le_bytes());
    out.extend(plain_len.to_le_bytes());
    out.extend(flags.to_le_bytes());
    reseal(out, stored)
}

fn reseal(mut head: Vec<u8>, stored: &[u8]) -> Vec<u8> {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head[..20]);
    crc.update(stored);
    head.truncate(20);
    head.extend(crc.finalize().to_le_bytes());
    head.extend(stored);
    head
}

/// Puts the CRC right after a header byte was changed.
pub fn fix_crc(batch: &[u8]) -> Vec<u8> {
    reseal(batch[..20].to_vec(), &batch[HEADER..])
}

pub fn encode(records: &[Record], codec: Codec) -> Bytes {
    let plain = body(&records.iter().map(Record::content).collect::<Vec<_>>());
    let stored = match codec {
        Codec::None => plain.clone(),
        Codec::Lz4 => lz4_flex::block::compress(&plain),
        Codec::Zstd => zstd::bulk::compress(&plain, 1).unwrap(),
    };
    seal(codec as u8, records.len() as u32, &stored, plain.len() as u32, 0).into()
}

fn take<'a>(from: &mut &'a [u8], n: usize) -> Result<&'a [u8], String> {
    if from.len() < n {
        return Err(format!("{n} bytes wanted, {} left", from.len()));
    }
    let (head, rest) = from.split_at(n);
    *from = rest;
    Ok(head)
}

fn number(from: &mut &[u8], n: usize) -> Result<u64, String> {
    let mut bytes = [0; 8];
    bytes[..n].copy_from_slice(take(from, n)?);
    Ok(u64::from_le_bytes(bytes))
}

/// Decodes a batch and checks everything that can be checked.
pub fn decode(batch: &[u8]) -> Result<Vec<Record>, String> {
    let mut rest = batch;
    let head = take(&mut rest, 20)?;
    let crc = number(&mut rest, 4)? as u32;
    let word = |i: usize| u32::from_le_bytes(head[i..i + 4].try_into().unwrap());
    let mut sum = crc32fast::Hasher::new();
    sum.update(head);
    sum.update(rest);
    if head[..3] != [0x4d, 0x42, 1] || word(16) != 0 {
        return Err("not a batch of version 1".into());
    }
    if sum.finalize() != crc || rest.len() != word(8) as usize {
        return Err("the batch's CRC or length does not match".into());
    }
    let plain_len = word(12) as usize;
    let plain = match head[3] {
        0 => rest.to_vec(),
        1 => lz4_flex::block::decompress(rest, plain_len).map_err(|e| e.to_string())?,
        2 => zstd::bulk::decompress(rest, plain_len).map_err(|e| e.to_string())?,
        other => return Err(format!("codec {other}")),
    };
    if plain.len() != plain_len {
        return Err("the body's length does not match".into());
    }
    let mut rest = plain.as_slice();
    let mut records = Vec::new();
    for _ in 0..word(4) {
        let n = number(&mut rest, 4)? as usize;
        let crc = number(&mut rest, 4)? as u32;
        let content = take(&mut rest, n)?;
        if crc32fast::hash(content) != crc {
            return Err("a record's CRC does not match".into());
        }
        records.push(record(content)?);
    }
    if rest.is_empty() {
        Ok(records)
    } else {
        Err("bytes are left over".into())
    }
}

fn record(mut c: &[u8]) -> Result<Record, String> {
    let c = &mut c;
    let text = |b: &[u8]| String::from_utf8(b.to_vec()).map_err(|e| e.to_string());
    let flags = number(c, 1)?;
    let n = number(c, 1)? as usize;
    let mut r = Record {
        subject: text(take(c, n)?)?,
        ..Record::default()
    };
    if flags & 1 != 0 {
        let n = number(c, 2)? as usize;
        r.key = Some(take(c, n)?.to_vec());
    }
    if flags & 2 != 0 {
        let n = number(c, 1)? as usize;
        r.message_id = Some(text(take(c, n)?)?);
    }
    if flags & 4 != 0 {
        r.event_time_us = Some(number(c, 8)?);
    }
    if flags & 8 != 0 {
        for _ in 0..number(c, 2)? {
            let n = number(c, 1)? as usize;
            let name = text(take(c, n)?)?;
            let n = number(c, 4)? as usize;
            r.headers.push((name, take(c, n)?.to_vec()));
        }
    }
    r.payload = c.to_vec();
    Ok(r)
}
