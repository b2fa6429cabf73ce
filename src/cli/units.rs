//! Durations, sizes, counts and times as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::client::Start;

/// `10m`, `1h30m`, `250ms`; `0`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|e| format!("{e}; write for instance 250ms, 10m, 1h30m or 7days"))
}

/// A number with thousands separators, a suffix of `units`, or none.
fn scaled(text: &str, units: &[(&str, u64)], example: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits_end = text
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '_' | ',')))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let number: f64 = number
        .replace(['_', ','], "")
        .parse()
        .map_err(|_| format!("`{text}` is not a number; write for instance {example}"))?;
    let unit = unit.trim();
    let factor = if unit.is_empty() {
        1
    } else {
        let known = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        known
            .map(|&(_, f)| f)
            .ok_or_else(|| format!("`{unit}` is not a known unit; write for instance {example}"))?
    };
    let value = number * factor as f64;
    if value > 2f64.powi(53) {
        return Err(format!("`{text}` is too large"));
    }
    Ok(value.round() as u64)
}

/// `512`, `64KiB`, `1GiB`, `10MB`; `K`, `M`, `G`, `T` alone are powers of 1,024. In bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u64)] = &[
        ("b", 1),
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("tib", 1 << 40),
        ("k", 1 << 10),
        ("m", 1 << 20),
        ("g", 1 << 30),
        ("t", 1 << 40),
        ("kb", 1_000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("tb", 1_000_000_000_000),
    ];
    scaled(text, UNITS, "512, 64KiB, 10MB or 1GiB")
}

/// `1000`, `1,000`, `1_000`, `10k`, `1M`.
pub(super) fn count(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u64)] = &[("k", 1_000), ("m", 1_000_000), ("g", 1_000_000_000)];
    scaled(text, UNITS, "1000, 1_000, 10k or 1M")
}

/// A point in time, in microseconds since the Unix epoch: `2026-01-31`, `2026-01-31T12:00:00Z`, or so long ago.
pub(super) fn time_us(text: &str) -> Result<u64, String> {
    let us = |t: SystemTime| t.duration_since(UNIX_EPOCH).map(|d| d.as_micros() as u64).unwrap_or(0);
    if let Ok(ago) = humantime::parse_duration(text.trim_start_matches('-').trim_end_matches(" ago")) {
        return Ok(us(SystemTime::now().checked_sub(ago).unwrap_or(UNIX_EPOCH)));
    }
    humantime::parse_rfc3339_weak(text)
        .or_else(|_| humantime::parse_rfc3339_weak(&format!("{text} 00:00:00")))
        .or_else(|_| humantime::parse_rfc3339_weak(&format!("{text}:00")))
        .map(us)
        .map_err(|_| {
            format!("`{text}` is not a time; write for instance 2026-01-31, 2026-01-31T12:00:00Z, or 10m for ten minutes ago")
        })
}

/// Where reading begins: `beginning`, `new`, a sequence, `last-N`, or a time.
pub(super) fn start(text: &str) -> Result<Start, String> {
    match text {
        "beginning" | "first" | "all" => return Ok(Start::Beginning),
        "new" => return Ok(Start::New),
        "last" => return Ok(Start::Last(1)),
        _ => {}
    }
    if let Some(n) = text.strip_prefix("last-") {
        return n
            .parse()
            .map(Start::Last)
            .map_err(|_| format!("`{n}` is not a number; write for instance last-10"));
    }
    if let Ok(sequence) = text.parse::<u64>() {
        return match sequence {
            0 => Err("sequences start at 1".to_owned()),
            _ => Ok(Start::Sequence(sequence)),
        };
    }
    time_us(text)
        .map(Start::TimeUs)
        .map_err(|_| format!("`{text}` is none of: beginning, new, a sequence, last-N, a time (2026-01-31T12:00:00Z), or how long ago (10m)"))
}

/// A separator with the escapes `\n`, `\r`, `\t`, `\0` and `\\`.
pub(super) fn separator(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        bytes.push(match rest.next() {
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('0') => 0,
            Some('\\') => b'\\',
            Some(_) | None => {
                return Err(format!(
                    "`{text}` has an unknown escape; \\n, \\r, \\t, \\0 and \\\\ are known"
                ));
            }
        });
    }
    Ok(bytes)
}

/// `1,234,567`.
pub(super) fn show_count(n: u64) -> String {
    let digits = n.to_string();
    let mut shown = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(d);
    }
    shown
}

/// `1.5 GiB`.
pub(super) fn show_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1_024.0 {
            break;
        }
        value /= 1_024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

/// `1h 30m`.
pub(super) fn show_duration_us(us: u64) -> String {
    humantime::format_duration(Duration::from_micros(us)).to_string()
}

/// How far something is behind: `1,200 entries, 3.1 MiB, 2.4 s`; empty: not at all.
pub(super) fn show_lag(entries: u64, bytes: Option<u64>, us: Option<u64>) -> String {
    if entries == 0 {
        return String::new();
    }
    let mut parts = vec![format!(
        "{} {}",
        show_count(entries),
        if entries == 1 { "entry" } else { "entries" }
    )];
    parts.extend(bytes.filter(|b| *b > 0).map(show_size));
    parts.extend(us.filter(|us| *us > 0).map(show_age_us));
    parts.join(", ")
}

/// How long something has taken, or is ago: `12 ms`, `1.3 s`, and from a minute on `3m 20s`.
pub(super) fn show_age_us(us: u64) -> String {
    match us {
        0..1_000_000 => format!("{} ms", us / 1_000),
        1_000_000..60_000_000 => format!("{:.1} s", us as f64 / 1e6),
        // To the second: more is noise.
        60_000_000.. => show_duration_us(us / 1_000_000 * 1_000_000),
    }
}

/// `2026-01-31T12:00:00.000000Z`.
pub(super) fn show_time_us(us: u64) -> String {
    humantime::format_rfc3339_micros(UNIX_EPOCH + Duration::from_micros(us)).to_string()
}

/// `2026-01-31T12:00:00.000Z`, for what people look at.
pub(super) fn show_time_ms(us: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_micros(us)).to_string()
}

/// `12.3 ms`, for latencies.
pub(super) fn show_latency_us(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        1_000_000.. => format!("{:.2} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_and_counts() {
        for (text, value) in [
            ("0", 0),
            ("512", 512),
            ("1KiB", 1_024),
            ("1.5 GiB", 3 << 29),
            ("10MB", 10_000_000),
            ("64k", 65_536),
        ] {
            assert_eq!(size(text), Ok(value), "{text}");
        }
        for (text, value) in [("1,000", 1_000), ("1_000", 1_000), ("10k", 10_000), ("1.5M", 1_500_000)] {
            assert_eq!(count(text), Ok(value), "{text}");
        }
        for bad in ["", "x", "1Q", "-1", "1e99", "99999999TiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn starts() {
        assert_eq!(start("beginning"), Ok(Start::Beginning));
        assert_eq!(start("new"), Ok(Start::New));
        assert_eq!(start("17"), Ok(Start::Sequence(17)));
        assert_eq!(start("last-10"), Ok(Start::Last(10)));
        assert_eq!(start("1970-01-02"), Ok(Start::TimeUs(86_400_000_000)));
        assert_eq!(start("1970-01-01T00:00:01Z"), Ok(Start::TimeUs(1_000_000)));
        assert_eq!(start("1970-01-01T00:01"), Ok(Start::TimeUs(60_000_000)));
        assert!(matches!(start("10m"), Ok(Start::TimeUs(_))));
        for bad in ["0", "last-x", "yesterday", ""] {
            assert!(start(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown() {
        assert_eq!(show_count(1), "1");
        assert_eq!(show_count(999), "999");
        assert_eq!(show_count(1_234_567), "1,234,567");
        assert_eq!(show_size(1_023), "1023 B");
        assert_eq!(show_size(1_536), "1.5 KiB");
        assert_eq!(show_time_us(1_000_000), "1970-01-01T00:00:01.000000Z");
        assert_eq!(show_latency_us(12_345), "12.35 ms");
        assert_eq!(show_lag(0, Some(1), Some(1)), "");
        assert_eq!(show_lag(1, None, Some(0)), "1 entry");
        assert_eq!(
            show_lag(1_200, Some(3 << 20), Some(2_400_000)),
            "1,200 entries, 3.0 MiB, 2.4 s"
        );
        assert_eq!(show_age_us(200_700_000), "3m 20s");
        assert_eq!(separator("a\\n\\n\\0"), Ok(b"a\n\n\0".to_vec()));
        assert!(separator("\\x").is_err());
    }
}
