//! What a user asks for when creating or changing a stream: defaults filled in, checked, compared.

use std::collections::BTreeMap;
use std::fmt::Debug;

use super::internal::v1 as pb;
use super::v1::{DiscardPolicy, Durability, Limits, Partitioning, Placement, StreamSpec};
use crate::model::Filter;
use crate::model::limits::{
    DESCRIPTION_BYTES_MAX, DUPLICATE_IDS_DEFAULT, DUPLICATE_IDS_MAX, DUPLICATE_WINDOW_DEFAULT_US,
    DUPLICATE_WINDOW_MAX_US, LABEL_BYTES_MAX, MAX_AGE_MIN_US, MESSAGE_BYTES_MAX, METADATA_BYTES_MAX,
    METADATA_PAIRS_MAX, NAME_BYTES_MAX, NAMESPACE_BYTES_MAX, PLACEMENT_TAGS_MAX, PLACEMENT_ZONES_MAX, PRODUCER_IDLE_US,
    PRODUCERS_MAX, REPLICAS_MAX, SHARDS_MAX, STREAM_SUBJECTS_MAX,
};
use crate::model::partition;

/// The namespace that an empty one means.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Paths that an update may name.
pub const UPDATABLE: &[&str] = &[
    "description",
    "subjects",
    "limits",
    "limits.max_age_us",
    "limits.max_bytes",
    "limits.max_messages",
    "limits.max_message_bytes",
    "limits.discard",
    "duplicate_window_us",
    "duplicate_ids_max",
    "metadata",
    "replicas",
    "placement",
];

/// Fields of the spec that are fixed when a stream is created.
const FIXED: &[&str] = &["namespace", "name", "partitioning", "shards", "durability", "dedicated"];

/// What is wrong with a spec, and with which field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct SpecError {
    /// Path of the field, as in a field mask.
    pub field: String,
    /// What it is and what is allowed.
    pub problem: String,
}

impl SpecError {
    fn new(field: &str, problem: impl ToString) -> Self {
        Self {
            field: field.to_string(),
            problem: problem.to_string(),
        }
    }
}

/// The namespace of a request: "default" if it is empty. Checked.
pub fn namespace(text: &str) -> Result<String, SpecError> {
    if text.is_empty() {
        return Ok(DEFAULT_NAMESPACE.to_string());
    }
    check_word("namespace", text, NAMESPACE_BYTES_MAX)?;
    Ok(text.to_string())
}

/// Checks a stream's name.
pub fn check_name(name: &str) -> Result<(), SpecError> {
    check_word("name", name, NAME_BYTES_MAX)
}

fn check_word(field: &str, text: &str, bytes_max: usize) -> Result<(), SpecError> {
    if text.is_empty() || text.len() > bytes_max {
        return Err(SpecError::new(
            field,
            format!("it has {} characters; 1-{bytes_max} are allowed", text.len()),
        ));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if let Some(bad) = text.chars().find(|c| !allowed(*c)) {
        return Err(SpecError::new(
            field,
            format!("{text:?} has {bad:?}; only letters, digits, '_' and '-' are allowed"),
        ));
    }
    Ok(())
}

fn check_range<T: PartialOrd + Debug>(field: &str, value: T, least: T, most: T) -> Result<T, SpecError> {
    if value < least || value > most {
        return Err(SpecError::new(
            field,
            format!("it is {value:?}; {least:?} to {most:?} is allowed"),
        ));
    }
    Ok(value)
}

/// Fills in the defaults that types.proto tells, puts what has no order in order, and checks everything. Two specs mean
/// the same exactly if they are equal after this; doing it again changes nothing.
pub fn normalise(spec: &StreamSpec) -> Result<StreamSpec, SpecError> {
    let namespace = namespace(&spec.namespace)?;
    check_name(&spec.name)?;
    if spec.description.len() > DESCRIPTION_BYTES_MAX {
        return Err(SpecError::new(
            "description",
            format!(
                "it has {} bytes; at most {DESCRIPTION_BYTES_MAX} are allowed",
                spec.description.len()
            ),
        ));
    }
    let partitioning = normalise_partitioning(spec.partitioning.as_ref())?;
    let window = spec.duplicate_window_us.unwrap_or(DUPLICATE_WINDOW_DEFAULT_US);
    check_range("duplicate_window_us", window, 0, DUPLICATE_WINDOW_MAX_US)?;
    let ids = spec.duplicate_ids_max.unwrap_or(DUPLICATE_IDS_DEFAULT);
    check_range("duplicate_ids_max", ids, 1, DUPLICATE_IDS_MAX)?;
    check_metadata(&spec.metadata)?;
    let durability = match Durability::try_from(spec.durability) {
        Ok(Durability::Unspecified | Durability::QuorumSynced) => Durability::QuorumSynced,
        Err(_) => {
            return Err(SpecError::new(
                "durability",
                format!("{} is not known", spec.durability),
            ));
        }
    };
    Ok(StreamSpec {
        namespace,
        name: spec.name.clone(),
        description: spec.description.clone(),
        subjects: normalise_subjects(&spec.name, &spec.subjects)?,
        partitioning: Some(partitioning),
        shards: check_range("shards", spec.shards.max(1), 1, SHARDS_MAX)?,
        replicas: check_range("replicas", spec.replicas.max(1), 1, REPLICAS_MAX)?,
        limits: Some(normalise_limits(&spec.limits.unwrap_or_default())?),
        duplicate_window_us: Some(window),
        duplicate_ids_max: Some(ids),
        metadata: spec.metadata.clone(),
        durability: durability as i32,
        dedicated: spec.dedicated,
        placement: normalise_placement(spec.placement.as_ref())?,
    })
}

/// A placement that allows every node is none.
fn normalise_placement(placement: Option<&Placement>) -> Result<Option<Placement>, SpecError> {
    let Some(Placement { zones, tags }) = placement.filter(|p| !p.zones.is_empty() || !p.tags.is_empty()) else {
        return Ok(None);
    };
    if zones.len() > PLACEMENT_ZONES_MAX || tags.len() > PLACEMENT_TAGS_MAX {
        return Err(SpecError::new(
            "placement",
            format!(
                "it names {} zones and {} tags; at most {PLACEMENT_ZONES_MAX} and {PLACEMENT_TAGS_MAX} are allowed",
                zones.len(),
                tags.len()
            ),
        ));
    }
    for zone in zones {
        check_label("placement", zone)?;
    }
    for (key, value) in tags {
        check_label("placement", key)?;
        check_label("placement", value)?;
    }
    let mut zones = zones.clone();
    zones.sort_unstable();
    zones.dedup();
    let tags = tags.clone();
    Ok(Some(Placement { zones, tags }))
}

/// Checks a zone, or the key or value of a node's tag: 1-64 letters, digits, '_', '-', '.'.
pub fn check_label(field: &str, text: &str) -> Result<(), SpecError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if text.is_empty() || text.len() > LABEL_BYTES_MAX || !text.chars().all(allowed) {
        return Err(SpecError::new(
            field,
            format!("{text:?} is no label; 1-{LABEL_BYTES_MAX} letters, digits, '_', '-' and '.' are allowed"),
        ));
    }
    Ok(())
}

fn normalise_partitioning(wire: Option<&Partitioning>) -> Result<Partitioning, SpecError> {
    let model = match wire {
        None => partition::Partitioning::Subject,
        Some(wire) => partition::Partitioning::try_from(wire).map_err(|error| SpecError::new("partitioning", error))?,
    };
    Ok(Partitioning::from(&model))
}

fn normalise_subjects(name: &str, subjects: &[String]) -> Result<Vec<String>, SpecError> {
    if subjects.is_empty() {
        // A name may be as long as a subject; then there is no room for `.>`.
        let below = format!("{name}.>");
        let mut subjects = vec![name.to_string()];
        subjects.extend(Filter::parse(&below).is_ok().then_some(below));
        return Ok(subjects);
    }
    if subjects.len() > STREAM_SUBJECTS_MAX {
        return Err(SpecError::new(
            "subjects",
            format!(
                "there are {}; at most {STREAM_SUBJECTS_MAX} are allowed",
                subjects.len()
            ),
        ));
    }
    for subject in subjects {
        Filter::parse(subject).map_err(|error| SpecError::new("subjects", format!("{subject:?}: {error}")))?;
    }
    let mut subjects = subjects.to_vec();
    subjects.sort_unstable();
    subjects.dedup();
    Ok(subjects)
}

fn normalise_limits(limits: &Limits) -> Result<Limits, SpecError> {
    if let Some(age) = limits.max_age_us {
        check_range("limits.max_age_us", age, MAX_AGE_MIN_US, u64::MAX)?;
    }
    if let Some(bytes) = limits.max_bytes {
        check_range("limits.max_bytes", bytes, 1, u64::MAX)?;
    }
    if let Some(messages) = limits.max_messages {
        check_range("limits.max_messages", messages, 1, u64::MAX)?;
    }
    if let Some(bytes) = limits.max_message_bytes {
        check_range("limits.max_message_bytes", bytes, 1, MESSAGE_BYTES_MAX as u32)?;
    }
    let discard = match DiscardPolicy::try_from(limits.discard) {
        Ok(DiscardPolicy::Unspecified | DiscardPolicy::Old) => DiscardPolicy::Old,
        Ok(DiscardPolicy::New) => DiscardPolicy::New,
        Err(_) => {
            return Err(SpecError::new(
                "limits.discard",
                format!("{} is not known", limits.discard),
            ));
        }
    };
    Ok(Limits {
        discard: discard as i32,
        ..*limits
    })
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), SpecError> {
    if metadata.len() > METADATA_PAIRS_MAX {
        return Err(SpecError::new(
            "metadata",
            format!(
                "there are {} pairs; at most {METADATA_PAIRS_MAX} are allowed",
                metadata.len()
            ),
        ));
    }
    let bytes: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > METADATA_BYTES_MAX {
        return Err(SpecError::new(
            "metadata",
            format!("it has {bytes} bytes; at most {METADATA_BYTES_MAX} are allowed"),
        ));
    }
    if metadata.contains_key("") {
        return Err(SpecError::new("metadata", "a key is empty"));
    }
    Ok(())
}

/// Each field of a normalised spec that a user would name, as text. Absent: no such limit, or empty.
fn fields(spec: &StreamSpec) -> Vec<(&'static str, String)> {
    let limits = spec.limits.unwrap_or_default();
    let number = |value: Option<u64>| value.map_or("none".to_string(), |value| value.to_string());
    vec![
        ("namespace", format!("{:?}", spec.namespace)),
        ("name", format!("{:?}", spec.name)),
        ("description", format!("{:?}", spec.description)),
        ("subjects", spec.subjects.join(",")),
        ("partitioning", partitioning_text(spec)),
        ("shards", spec.shards.to_string()),
        ("replicas", spec.replicas.to_string()),
        ("limits.max_age_us", number(limits.max_age_us)),
        ("limits.max_bytes", number(limits.max_bytes)),
        ("limits.max_messages", number(limits.max_messages)),
        (
            "limits.max_message_bytes",
            number(limits.max_message_bytes.map(u64::from)),
        ),
        ("limits.discard", limits.discard().as_str_name().to_string()),
        ("duplicate_window_us", number(spec.duplicate_window_us)),
        ("duplicate_ids_max", number(spec.duplicate_ids_max.map(u64::from))),
        ("metadata", format!("{:?}", spec.metadata)),
        ("durability", spec.durability().as_str_name().to_string()),
        ("dedicated", spec.dedicated.to_string()),
        ("placement", placement_text(spec.placement.as_ref())),
    ]
}

/// A placement as a user would write it: "zone=a,b tag:disk=ssd", or "any".
pub fn placement_text(placement: Option<&Placement>) -> String {
    let Some(Placement { zones, tags }) = placement else {
        return "any".into();
    };
    let zones = (!zones.is_empty()).then(|| format!("zone={}", zones.join(",")));
    let tags = tags.iter().map(|(key, value)| format!("tag:{key}={value}"));
    zones.into_iter().chain(tags).collect::<Vec<_>>().join(" ")
}

fn partitioning_text(spec: &StreamSpec) -> String {
    use super::v1::partitioning::By;
    match spec
        .partitioning
        .as_ref()
        .and_then(|partitioning| partitioning.by.as_ref())
    {
        None | Some(By::Subject(_)) => "by subject".into(),
        Some(By::SubjectTokens(tokens)) => format!("by subject tokens {:?}", tokens.positions),
        Some(By::Key(_)) => "by key".into(),
    }
}

/// A value as it is told in an error: not all of a long one.
fn shortened(text: &str) -> String {
    const CHARACTERS: usize = 200;
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

fn differing(a: &StreamSpec, b: &StreamSpec, among: impl Fn(&str) -> bool) -> Option<String> {
    let differences: Vec<String> = fields(a)
        .into_iter()
        .zip(fields(b))
        .filter(|((name, left), (_, right))| among(name) && left != right)
        .map(|((name, left), (_, right))| format!("{name} ({} there, {} asked)", shortened(&left), shortened(&right)))
        .collect();
    (!differences.is_empty()).then(|| differences.join("; "))
}

/// In which fields two normalised specs differ: "shards (1 there, 4 asked); …". `None` if they are the same.
pub fn difference(there: &StreamSpec, asked: &StreamSpec) -> Option<String> {
    if there == asked {
        return None;
    }
    differing(there, asked, |_| true)
}

/// As [`difference`], of the fields that an update must not change.
pub fn fixed_difference(there: &StreamSpec, asked: &StreamSpec) -> Option<String> {
    differing(there, asked, |name| FIXED.contains(&name))
}

/// The current (normalised) spec with the fields that the paths name taken from another; normalised and checked.
pub fn apply_mask<S: AsRef<str>>(
    current: &StreamSpec,
    wanted: &StreamSpec,
    paths: impl IntoIterator<Item = S>,
) -> Result<StreamSpec, SpecError> {
    let mut spec = current.clone();
    let wanted_limits = wanted.limits.unwrap_or_default();
    let mut named = false;
    for path in paths {
        named = true;
        let limits = spec.limits.get_or_insert_default();
        match path.as_ref() {
            "description" => spec.description = wanted.description.clone(),
            "subjects" => spec.subjects = wanted.subjects.clone(),
            "limits" => *limits = wanted_limits,
            "limits.max_age_us" => limits.max_age_us = wanted_limits.max_age_us,
            "limits.max_bytes" => limits.max_bytes = wanted_limits.max_bytes,
            "limits.max_messages" => limits.max_messages = wanted_limits.max_messages,
            "limits.max_message_bytes" => limits.max_message_bytes = wanted_limits.max_message_bytes,
            "limits.discard" => limits.discard = wanted_limits.discard,
            "duplicate_window_us" => spec.duplicate_window_us = wanted.duplicate_window_us,
            "duplicate_ids_max" => spec.duplicate_ids_max = wanted.duplicate_ids_max,
            "metadata" => spec.metadata = wanted.metadata.clone(),
            "replicas" => spec.replicas = wanted.replicas,
            "placement" => spec.placement = wanted.placement.clone(),
            other => {
                let why = match FIXED.contains(&other.split('.').next().unwrap_or(other)) {
                    true => "it is fixed when a stream is created",
                    false => "there is no such field",
                };
                return Err(SpecError::new(
                    other,
                    format!("{why}; {} may be changed", UPDATABLE.join(", ")),
                ));
            }
        }
    }
    if !named {
        return Err(SpecError::new(
            "update_mask",
            format!("it names nothing; {} may be changed", UPDATABLE.join(", ")),
        ));
    }
    normalise(&spec)
}

/// What a shard needs to know of its stream's (normalised) spec.
pub fn shard_config(spec: &StreamSpec, stream_id: &str, epoch: u64, shard_index: u32) -> pb::ShardConfig {
    let partitioning = spec.partitioning.as_ref().map(partition::Partitioning::try_from);
    pb::ShardConfig {
        stream_id: stream_id.to_string(),
        epoch,
        shard_index,
        limits: spec.limits,
        duplicate_window_us: spec.duplicate_window_us.unwrap_or(DUPLICATE_WINDOW_DEFAULT_US),
        duplicate_ids_max: spec.duplicate_ids_max.unwrap_or(DUPLICATE_IDS_DEFAULT),
        producers_max: PRODUCERS_MAX,
        producer_idle_us: PRODUCER_IDLE_US,
        subject_in_one_shard: match partitioning {
            Some(Ok(partitioning)) => partitioning.keeps_subject_together(),
            Some(Err(_)) => false,
            None => true,
        },
    }
}

#[cfg(test)]
mod tests;
