//! What was measured: rows for a table and for `bench-report.json`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// One figure against one other.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    /// The figure that printed it.
    pub figure: String,
    /// Absent: not measured; `note` says why.
    pub value: Option<f64>,
    pub unit: String,
    /// What it is compared with, if anything.
    pub against: Option<String>,
    pub against_value: Option<f64>,
    /// value / against_value.
    pub ratio: Option<f64>,
    /// Such as "ratio >= 3". Absent: told, without a bar.
    pub bar: Option<String>,
    pub stretch: Option<String>,
    /// Absent without a bar or without a value.
    pub met: Option<bool>,
    /// Prints this figure again.
    pub command: String,
    /// Every round's value, and the other's.
    pub rounds: Vec<f64>,
    pub against_rounds: Vec<f64>,
    /// Message size, batch, window, replicas, sync, subjects, ids, indexes, versions …
    pub conditions: BTreeMap<String, String>,
    pub note: Option<String>,
    /// Start of the run, seconds since the Unix epoch.
    pub run: u64,
}

/// What must hold.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    RatioAtLeast(f64),
    RatioAtMost(f64),
    ValueAtLeast(f64),
    ValueAtMost(f64),
    ValueBelow(f64),
}

impl Bar {
    fn holds(self, value: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(bar) => ratio.map(|r| r >= bar),
            Self::RatioAtMost(bar) => ratio.map(|r| r <= bar),
            Self::ValueAtLeast(bar) => Some(value >= bar),
            Self::ValueAtMost(bar) => Some(value <= bar),
            Self::ValueBelow(bar) => Some(value < bar),
        }
    }
}

impl std::fmt::Display for Bar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RatioAtLeast(bar) => write!(f, "ratio >= {bar}"),
            Self::RatioAtMost(bar) => write!(f, "ratio <= {bar}"),
            Self::ValueAtLeast(bar) => write!(f, "value >= {bar}"),
            Self::ValueAtMost(bar) => write!(f, "value <= {bar}"),
            Self::ValueBelow(bar) => write!(f, "value < {bar}"),
        }
    }
}

/// Builds rows that share a figure and its conditions.
pub struct Rows {
    figure: String,
    run: u64,
    conditions: BTreeMap<String, String>,
    rows: Vec<Row>,
}

/// Whom a value is compared with.
pub struct Against<'a> {
    pub name: &'a str,
    pub rounds: &'a [f64],
}

impl Rows {
    pub fn new(figure: &str, run: u64, conditions: BTreeMap<String, String>) -> Self {
        Self {
            figure: figure.to_owned(),
            run,
            conditions,
            rows: Vec::new(),
        }
    }

    /// A condition for all rows, those pushed before too.
    pub fn condition(&mut self, name: &str, value: impl ToString) {
        self.conditions.insert(name.to_owned(), value.to_string());
    }

    /// The last row gets this note.
    pub fn note(&mut self, note: impl Into<String>) {
        if let Some(row) = self.rows.last_mut() {
            row.note = Some(note.into());
        }
    }

    /// `name` is the figure's, with a suffix where it has several rows. Rounds empty: not measured.
    pub fn push(
        &mut self,
        name: &str,
        unit: &str,
        rounds: &[f64],
        against: Option<Against<'_>>,
        bar: Option<Bar>,
        stretch: Option<Bar>,
    ) {
        let value = median(rounds);
        let against_value = against.as_ref().and_then(|a| median(a.rounds));
        let ratio = value.zip(against_value).map(|(v, a)| v / a);
        let met = bar.zip(value).and_then(|(bar, v)| bar.holds(v, ratio));
        self.rows.push(Row {
            name: name.to_owned(),
            figure: self.figure.clone(),
            value,
            unit: unit.to_owned(),
            against: against.as_ref().map(|a| a.name.to_owned()),
            against_value,
            ratio,
            bar: bar.map(|b| b.to_string()),
            stretch: stretch.map(|b| b.to_string()),
            met,
            command: format!("make bench FIGURE={}", self.figure),
            rounds: rounds.to_vec(),
            against_rounds: against.map(|a| a.rounds.to_vec()).unwrap_or_default(),
            conditions: BTreeMap::new(),
            note: None,
            run: self.run,
        });
    }

    pub fn done(mut self) -> Vec<Row> {
        for row in &mut self.rows {
            row.conditions.clone_from(&self.conditions);
        }
        self.rows
    }
}

/// The middle value; of an even number, the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// Writes the rows; those of figures that this run did not measure are kept from the last report.
pub fn write(path: &Path, fresh: &[Row]) -> Result<()> {
    let mut all: Vec<Row> = match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    all.retain(|old| !fresh.iter().any(|new| new.figure == old.figure));
    all.extend_from_slice(fresh);
    let text = serde_json::to_string_pretty(&all)?;
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![
        [
            "name",
            "value",
            "unit",
            "against",
            "its value",
            "ratio",
            "bar",
            "met",
            "spread",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for row in rows {
        lines.push(vec![
            row.name.clone(),
            row.value.map_or_else(|| "not measured".to_owned(), number),
            row.unit.clone(),
            row.against.clone().unwrap_or_default(),
            row.against_value.map(number).unwrap_or_default(),
            row.ratio.map(number).unwrap_or_default(),
            row.bar.clone().unwrap_or_default(),
            match row.met {
                Some(true) => "yes".to_owned(),
                Some(false) => "NO".to_owned(),
                None => String::new(),
            },
            spread(&row.rounds),
        ]);
    }
    let columns = lines[0].len();
    let widths: Vec<_> = (0..columns)
        .map(|c| lines.iter().map(|l| l[c].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<_> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    for row in rows {
        if let Some(note) = &row.note {
            text.push_str(&format!("{}: {note}\n", row.name));
        }
    }
    text
}

/// Lowest and highest round.
fn spread(rounds: &[f64]) -> String {
    let low = rounds.iter().copied().min_by(f64::total_cmp);
    let high = rounds.iter().copied().max_by(f64::total_cmp);
    match low.zip(high) {
        Some((low, high)) if rounds.len() > 1 => format!("{}..{}", number(low), number(high)),
        _ => String::new(),
    }
}

/// Three or four digits that matter; thousands apart.
pub fn number(value: f64) -> String {
    if value.abs() < 10.0 {
        return format!("{value:.2}");
    }
    if value.abs() < 1_000.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (n, c) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n) % 3 == 0 && c != '-' {
            text.push(',');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_row_is_judged_by_its_medians() {
        let mut rows = Rows::new("f", 7, BTreeMap::new());
        let against = |rounds| Some(Against { name: "other", rounds });
        rows.push(
            "f",
            "msg/s",
            &[30.0, 10.0, 20.0],
            against(&[5.0, 6.0]),
            Some(Bar::RatioAtLeast(3.6)),
            None,
        );
        rows.push(
            "f",
            "msg/s",
            &[30.0, 10.0, 20.0],
            against(&[5.0, 6.0]),
            Some(Bar::RatioAtLeast(3.7)),
            None,
        );
        rows.push("f", "msg/s", &[], against(&[5.0]), Some(Bar::RatioAtLeast(3.0)), None);
        rows.push("f", "msg/s", &[1.0], against(&[]), Some(Bar::RatioAtLeast(3.0)), None);
        rows.push("f", "s", &[1.0, 3.0], None, Some(Bar::ValueAtMost(2.0)), None);
        rows.condition("late", 1);
        let rows = rows.done();
        let met: Vec<_> = rows.iter().map(|r| r.met).collect();
        assert_eq!(met, [Some(true), Some(false), None, None, Some(true)]);
        assert_eq!(rows[0].value, Some(20.0));
        assert_eq!(rows[0].against_value, Some(5.5));
        assert_eq!(rows[0].conditions["late"], "1");
        assert_eq!(rows[0].command, "make bench FIGURE=f");
    }

    #[test]
    fn a_report_keeps_the_other_figures() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench-report.json");
        let row = |figure: &str, value| {
            let mut rows = Rows::new(figure, 1, BTreeMap::new());
            rows.push(figure, "s", &[value], None, None, None);
            rows.done()
        };
        write(&path, &row("a", 1.0)).unwrap();
        write(&path, &row("b", 2.0)).unwrap();
        write(&path, &row("a", 3.0)).unwrap();
        let all: Vec<Row> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let seen: Vec<_> = all.iter().map(|r| (r.name.as_str(), r.value.unwrap())).collect();
        assert_eq!(seen, [("b", 2.0), ("a", 3.0)]);
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(number(0.256), "0.26");
        assert_eq!(number(1_234_567.0), "1,234,567");
        assert_eq!(number(123.44), "123.4");
    }
}
