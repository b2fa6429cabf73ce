//! Values as people write them: "128MiB", "5s", "127.0.0.1:7411". What is shown can be read again.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::limits::PLACEMENT_TAGS_MAX;
use crate::wire::spec::check_label;

/// How a kind of value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Path,
    Address,
    Hosts,
    Pairs,
    Size,
    Duration,
    Count,
    Ratio,
    Switch,
    Choice(&'static [&'static str]),
}

impl Kind {
    /// As the name of a flag's value, and in the reference.
    pub fn placeholder(self) -> &'static str {
        match self {
            Kind::Text => "TEXT",
            Kind::Path => "PATH",
            Kind::Address => "ADDR",
            Kind::Hosts => "HOST:PORT",
            Kind::Pairs => "KEY=VALUE",
            Kind::Size => "SIZE",
            Kind::Duration => "DURATION",
            Kind::Count => "N",
            Kind::Ratio => "RATIO",
            Kind::Switch => "true|false",
            Kind::Choice(_) => "WORD",
        }
    }

    /// What is allowed, for errors and the reference.
    pub fn allowed(self) -> String {
        match self {
            Kind::Text => "a text".into(),
            Kind::Path => "a path".into(),
            Kind::Address => {
                "an address with a port, such as 127.0.0.1:7411 or [::1]:7411 (port 0: any free one)".into()
            }
            Kind::Hosts => {
                "HOST:PORT, such as node-1.example:7412; several with commas between where that makes sense".into()
            }
            Kind::Pairs => {
                "KEY=VALUE, several with commas between, each key once; letters, digits, '_', '-' and '.'".into()
            }
            Kind::Size => "bytes, with or without a unit: 65536, 64KiB, 128MiB, 2GiB, 10GB".into(),
            Kind::Duration => "a number with a unit: 250ms, 5s, 2m, 1h, 1m 30s".into(),
            Kind::Count => "a whole number".into(),
            Kind::Ratio => "a number such as 0.2".into(),
            Kind::Switch => "true or false".into(),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
        }
    }

    /// Whether the value stands in quotes in TOML.
    pub fn is_quoted(self) -> bool {
        match self {
            Kind::Text
            | Kind::Path
            | Kind::Address
            | Kind::Hosts
            | Kind::Pairs
            | Kind::Size
            | Kind::Duration
            | Kind::Choice(_) => true,
            Kind::Count | Kind::Ratio | Kind::Switch => false,
        }
    }
}

/// A value of a setting.
pub trait Human: Sized {
    const KIND: Kind;

    /// Reads what a person wrote; none if it is not of this kind.
    fn parse(text: &str) -> Option<Self>;

    /// In a form that [`Human::parse`] reads; none: not set.
    fn show(&self) -> Option<String>;

    /// What a range is compared by; none: no range makes sense.
    fn magnitude(&self) -> Option<f64> {
        None
    }

    /// Reads, and holds the value within a range written in the same form.
    fn read(text: &str, range: Option<(&str, &str)>) -> Result<Self, String> {
        let value = Self::parse(text)
            .ok_or_else(|| format!("\"{text}\" cannot be used here; allowed: {}", Self::KIND.allowed()))?;
        if let Some((low, high)) = range {
            let at = |bound: &str| Self::parse(bound).and_then(|bound| bound.magnitude());
            let within = match (at(low), value.magnitude(), at(high)) {
                (Some(low), Some(value), Some(high)) => low <= value && value <= high,
                _ => true,
            };
            if !within {
                return Err(format!("\"{text}\" is out of range; allowed: {low} to {high}"));
            }
        }
        Ok(value)
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// So many mebibytes.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// As the type of lengths in memory; on a 32-bit machine not more than fits.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

const BINARY: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
const DECIMAL: [(&str, u64); 4] = [
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
];

impl Human for ByteSize {
    const KIND: Kind = Kind::Size;

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let digits = text
            .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number = number.replace('_', "");
        let unit = unit.trim();
        let factor = if unit.is_empty() || unit.eq_ignore_ascii_case("b") {
            1
        } else {
            BINARY
                .iter()
                .chain(&DECIMAL)
                .find(|(name, _)| name.eq_ignore_ascii_case(unit))?
                .1
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(ByteSize);
        }
        let bytes = number.parse::<f64>().ok()? * factor as f64;
        // A fraction is fine where it still makes whole bytes, such as 1.5GiB.
        (bytes.fract() == 0.0 && bytes < 9e15).then_some(ByteSize(bytes as u64))
    }

    fn show(&self) -> Option<String> {
        let fits = |(_, factor): &&(&str, u64)| self.0 >= *factor && self.0.is_multiple_of(*factor);
        Some(match BINARY.iter().find(fits) {
            Some((unit, factor)) => format!("{}{unit}", self.0 / factor),
            None => self.0.to_string(),
        })
    }

    fn magnitude(&self) -> Option<f64> {
        Some(self.0 as f64)
    }
}

impl Human for Duration {
    const KIND: Kind = Kind::Duration;

    fn parse(text: &str) -> Option<Self> {
        humantime::parse_duration(text.trim()).ok()
    }

    fn show(&self) -> Option<String> {
        Some(humantime::format_duration(*self).to_string())
    }

    fn magnitude(&self) -> Option<f64> {
        Some(self.as_secs_f64())
    }
}

impl Human for String {
    const KIND: Kind = Kind::Text;

    fn parse(text: &str) -> Option<Self> {
        (!text.trim().is_empty()).then(|| text.to_owned())
    }

    fn show(&self) -> Option<String> {
        Some(self.clone())
    }
}

impl Human for PathBuf {
    const KIND: Kind = Kind::Path;

    fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| PathBuf::from(text))
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string_lossy().into_owned())
    }
}

impl Human for SocketAddr {
    const KIND: Kind = Kind::Address;

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        match text.strip_prefix("localhost:") {
            Some(port) => Some(SocketAddr::from(([127, 0, 0, 1], port.parse().ok()?))),
            None => text.parse().ok(),
        }
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

/// Where nodes are: `HOST:PORT`, one or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses(pub Vec<String>);

impl Addresses {
    /// The first; there is always one.
    pub fn first(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }
}

impl Human for Addresses {
    const KIND: Kind = Kind::Hosts;

    fn parse(text: &str) -> Option<Self> {
        let is_address = |text: &str| {
            let (host, port) = text.rsplit_once(':')?;
            let bracketed = host.starts_with('[') && host.ends_with(']');
            let plain = !host.contains([':', '[', ']', '/', '@']) && !host.contains(char::is_whitespace);
            let port: u16 = port.parse().ok()?;
            (!host.is_empty() && (bracketed || plain) && port != 0).then(|| text.to_owned())
        };
        let all: Option<Vec<String>> = text.split(',').map(|one| is_address(one.trim())).collect();
        all.map(Addresses)
    }

    fn show(&self) -> Option<String> {
        Some(self.0.join(","))
    }
}

/// What placement may ask of a node: keys with values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tags(pub BTreeMap<String, String>);

impl Human for Tags {
    const KIND: Kind = Kind::Pairs;

    fn parse(text: &str) -> Option<Self> {
        let mut tags = BTreeMap::new();
        for pair in text.split(',') {
            let (key, value) = pair.trim().split_once('=')?;
            let is_label = |text: &str| check_label("tags", text).is_ok();
            // One key twice is a mistake, whichever is meant.
            if !is_label(key) || !is_label(value) || tags.insert(key.to_owned(), value.to_owned()).is_some() {
                return None;
            }
        }
        (tags.len() <= PLACEMENT_TAGS_MAX).then_some(Tags(tags))
    }

    fn show(&self) -> Option<String> {
        let pairs: Vec<_> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        Some(pairs.join(","))
    }
}

impl Human for bool {
    const KIND: Kind = Kind::Switch;

    fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        }
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Human for u32 {
    const KIND: Kind = Kind::Count;

    fn parse(text: &str) -> Option<Self> {
        text.trim().replace('_', "").parse().ok()
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn magnitude(&self) -> Option<f64> {
        Some(f64::from(*self))
    }
}

impl Human for f64 {
    const KIND: Kind = Kind::Ratio;

    fn parse(text: &str) -> Option<Self> {
        text.trim().parse().ok().filter(|value: &f64| value.is_finite())
    }

    fn show(&self) -> Option<String> {
        // Always with a point, so that TOML reads it as what it is.
        Some(format!("{self:?}"))
    }

    fn magnitude(&self) -> Option<f64> {
        Some(*self)
    }
}

/// May be left out; "" and "none" take away what a lower layer has set.
impl<T: Human> Human for Option<T> {
    const KIND: Kind = T::KIND;

    fn parse(text: &str) -> Option<Self> {
        if text.is_empty() || text == "none" {
            Some(None)
        } else {
            T::parse(text).map(Some)
        }
    }

    fn show(&self) -> Option<String> {
        self.as_ref().and_then(T::show)
    }

    fn magnitude(&self) -> Option<f64> {
        self.as_ref().and_then(T::magnitude)
    }
}

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* $variant),* }

        impl Human for $name {
            const KIND: Kind = Kind::Choice(&[$($word),*]);

            fn parse(text: &str) -> Option<Self> {
                match text.trim() { $($word => Some($name::$variant),)* _ => None }
            }

            fn show(&self) -> Option<String> {
                Some(match self { $($name::$variant => $word),* }.to_owned())
            }
        }
    };
}

choice! {
    /// How log lines are written.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json"
    }
}

choice! {
    /// Whether clients must show a certificate, where `tls.client_ca` is set.
    ClientAuth {
        /// Those without one are anonymous.
        Optional = "optional",
        /// Those without one are refused.
        Required = "required"
    }
}

/// Which log lines are written: a level, or directives such as `info,mainstem::raft=debug`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter(pub String);

impl Human for LogFilter {
    const KIND: Kind = Kind::Text;

    fn parse(text: &str) -> Option<Self> {
        let is_level = |word: &str| {
            ["off", "error", "warn", "info", "debug", "trace"]
                .iter()
                .any(|level| level.eq_ignore_ascii_case(word))
        };
        // A bare word that is no level would be taken for the name of a module, and silence everything.
        let words_ok = text.split(',').all(|part| {
            if part.contains(['=', '[', ':']) {
                true
            } else {
                is_level(part.trim())
            }
        });
        let ok = words_ok && tracing_subscriber::EnvFilter::try_new(text).is_ok();
        ok.then(|| LogFilter(text.to_owned()))
    }

    fn show(&self) -> Option<String> {
        Some(self.0.clone())
    }

    fn read(text: &str, _range: Option<(&str, &str)>) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| {
            format!(
                "\"{text}\" is not a log level; allowed: off, error, warn, info, debug, trace, or directives by module \
                 such as \"info,mainstem::raft=debug\""
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let cases = [
            ("0", Some(0)),
            ("65536", Some(65_536)),
            ("64KiB", Some(65_536)),
            ("64 kib", Some(65_536)),
            ("1.5GiB", Some(3 << 29)),
            ("10GB", Some(10_000_000_000)),
            ("1_000", Some(1_000)),
            ("7B", Some(7)),
            ("18446744073709551615", Some(u64::MAX)),
            ("", None),
            ("MiB", None),
            ("12 cows", None),
            ("-1", None),
            ("0.3B", None),
            ("20000000TiB", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(ByteSize::parse(text), bytes.map(ByteSize), "{text}");
        }
        for bytes in [0, 1, 1_000, 1_024, 1_536, 128 << 20, 3 << 29, 5 << 40, u64::MAX] {
            let shown = ByteSize(bytes).show().expect("always shown");
            assert_eq!(ByteSize::parse(&shown), Some(ByteSize(bytes)), "{shown}");
        }
        assert_eq!(ByteSize::mib(128).show().as_deref(), Some("128MiB"));
    }

    #[test]
    fn durations_come_back() {
        for text in ["0s", "250ms", "5s", "1m 30s", "1h"] {
            let value = Duration::parse(text).expect("a duration");
            assert_eq!(value.show().as_deref(), Some(text));
        }
        assert_eq!(Duration::parse("5"), None, "a unit is needed");
    }

    #[test]
    fn ranges_say_what_is_allowed() {
        let range = Some(("1MiB", "4GiB"));
        assert_eq!(ByteSize::read("1MiB", range), Ok(ByteSize::mib(1)));
        assert_eq!(ByteSize::read("4096MiB", range), Ok(ByteSize::mib(4096)));
        let message = ByteSize::read("1048575", range).expect_err("one byte too few");
        assert_eq!(message, "\"1048575\" is out of range; allowed: 1MiB to 4GiB");
        assert!(u32::read("-3", None).expect_err("negative").contains("a whole number"));
        assert!(
            LogFormat::read("xml", None)
                .expect_err("unknown")
                .contains("one of text, json")
        );
    }

    #[test]
    fn log_filters() {
        for good in ["info", "WARN", "info,mainstem::raft=debug", "off", "mainstem=trace"] {
            assert!(LogFilter::parse(good).is_some(), "{good}");
        }
        for bad in ["loud", "mainstem", "info,loud", "mainstem=loud", ""] {
            assert!(LogFilter::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn hosts() {
        let several = Addresses::parse("a:1, [::1]:2,b.example:3").expect("three");
        assert_eq!(several.show().as_deref(), Some("a:1,[::1]:2,b.example:3"));
        for bad in ["", "a", "a:", "a:0", "::1:2", "http://a:1", "a:1,", "a b:1"] {
            assert_eq!(Addresses::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn tags() {
        let tags = Tags::parse("rack=7, disk=ssd").expect("two");
        assert_eq!(tags.show().as_deref(), Some("disk=ssd,rack=7"));
        for bad in ["", "a", "a=", "=a", "a=1,a=2", "a=b=c", "a=1,", "a b=1"] {
            assert_eq!(Tags::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(SocketAddr::parse("localhost:1"), SocketAddr::parse("127.0.0.1:1"));
        assert!(SocketAddr::parse("[::1]:0").is_some());
        assert!(SocketAddr::parse("127.0.0.1").is_none(), "a port is needed");
        assert_eq!(Option::<SocketAddr>::parse("none"), Some(None));
    }
}
