//! What a stream is asked to be.

use std::time::Duration;

use clap::Args;

use super::micros;
use crate::cli::failure::Failure;
use crate::cli::output::{Format, FormatArg};
use crate::cli::units;
use crate::client::proto::{self, DiscardPolicy, Limits, Partitioning, Placement, StreamSpec, partitioning::By};

/// What can be changed later.
#[derive(Debug, Default, Args)]
struct Settings {
    /// Subjects that belong to the stream, with wildcards; can be repeated [default: NAME and NAME.>]
    #[arg(long, alias = "subjects", value_name = "FILTER")]
    subject: Vec<String>,
    /// Free text
    #[arg(long)]
    description: Option<String>,
    /// Remove messages older than this; `none`: never
    #[arg(long, value_name = "DURATION", value_parser = maybe_duration)]
    max_age: Option<Maybe>,
    /// Largest stored size of a shard; `none`: no limit
    #[arg(long, value_name = "SIZE", value_parser = maybe_size)]
    max_bytes: Option<Maybe>,
    /// Most messages in a shard; `none`: no limit
    #[arg(long, value_name = "N", value_parser = maybe_count)]
    max_messages: Option<Maybe>,
    /// Largest message; `none`: the server's own limit
    #[arg(long, value_name = "SIZE", value_parser = maybe_size)]
    max_message_size: Option<Maybe>,
    /// What happens when a limit is reached
    #[arg(long, value_enum)]
    discard: Option<Discard>,
    /// How long message ids are remembered; 0: not at all [default: 2m]
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    duplicate_window: Option<Duration>,
    /// How many message ids each shard remembers at most [default: 200000]
    #[arg(long, value_name = "N", value_parser = units::count)]
    duplicate_ids: Option<u64>,
    /// A pair of free text; can be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Which nodes may hold its replicas: `zone=a,b` or `tag:KEY=VALUE`; can be repeated; `any`: all nodes
    #[arg(long, value_name = "WHERE", value_parser = placement)]
    placement: Vec<Where>,
}

/// A part of a placement.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Where {
    Any,
    Zones(Vec<String>),
    Tag(String, String),
}

fn placement(text: &str) -> Result<Where, String> {
    let bad = || format!("`{text}` is none of: zone=NAME[,NAME]…, tag:KEY=VALUE, any");
    if text == "any" {
        return Ok(Where::Any);
    }
    let (key, value) = text.split_once('=').ok_or_else(bad)?;
    match key.strip_prefix("tag:") {
        Some(tag) if !tag.is_empty() => Ok(Where::Tag(tag.to_owned(), value.to_owned())),
        None if key == "zone" => Ok(Where::Zones(value.split(',').map(|z| z.trim().to_owned()).collect())),
        Some(_) | None => Err(bad()),
    }
}

/// Create a stream; creating the identical one again succeeds
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Its name: letters, digits, `-` and `_`
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// Number of shards, the units of order; cannot be changed
    #[arg(long, value_name = "N", default_value_t = 1)]
    shards: u32,
    /// Replicas of each shard, 1 to 7
    #[arg(long, value_name = "N", default_value_t = 1)]
    replicas: u32,
    /// What decides a message's shard: `subject`, `key`, or tokens of the subject, e.g. `tokens:1,3`; cannot be changed
    #[arg(long, value_name = "WHAT", default_value = "subject", value_parser = partitioning)]
    partition_by: Partitioning,
    /// Give every shard a Raft group of its own
    #[arg(long)]
    dedicated: bool,
    #[command(flatten)]
    format: FormatArg,
}

/// Change a stream; only what is named is changed
#[derive(Debug, Args)]
pub(super) struct EditArgs {
    /// The stream
    name: String,
    #[command(flatten)]
    settings: Settings,
    /// Replicas of each shard; messages are taken all the while
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=7))]
    replicas: Option<u32>,
    /// Only if the stream has this revision
    #[arg(long, value_name = "REVISION")]
    expected_revision: Option<u64>,
    /// Of a change of replicas or placement: do not wait until it is made
    #[arg(long)]
    no_wait: bool,
    /// Likewise: give up waiting after so long; the change goes on [default: never]
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    within: Option<Duration>,
    #[command(flatten)]
    format: FormatArg,
}

/// A change of a stream.
#[derive(Debug)]
pub(super) struct Edit {
    pub(super) spec: StreamSpec,
    /// The fields of it that are meant.
    pub(super) paths: Vec<String>,
    pub(super) expected_revision: Option<u64>,
    pub(super) no_wait: bool,
    pub(super) within: Option<Duration>,
    pub(super) format: Format,
}

impl Edit {
    /// Whether replicas come or go with it.
    pub(super) fn moves_replicas(&self) -> bool {
        self.paths.iter().any(|path| path == "replicas" || path == "placement")
    }
}

/// A value, or the wish to have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Maybe(Option<u64>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Discard {
    /// The oldest messages make room
    Old,
    /// New messages are refused
    New,
}

fn maybe(text: &str, read: impl Fn(&str) -> Result<u64, String>) -> Result<Maybe, String> {
    if text == "none" {
        Ok(Maybe(None))
    } else {
        read(text).map(|v| Maybe(Some(v)))
    }
}

fn maybe_duration(text: &str) -> Result<Maybe, String> {
    maybe(text, |t| units::duration(t).map(micros))
}

fn maybe_size(text: &str) -> Result<Maybe, String> {
    maybe(text, units::size)
}

fn maybe_count(text: &str) -> Result<Maybe, String> {
    maybe(text, units::count)
}

fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .ok_or_else(|| format!("`{text}` is not KEY=VALUE"))
}

fn partitioning(text: &str) -> Result<Partitioning, String> {
    let by = match text {
        "subject" => By::Subject(proto::BySubject {}),
        "key" => By::Key(proto::ByKey {}),
        _ => {
            let positions = text
                .strip_prefix("tokens:")
                .and_then(|list| {
                    list.split(',')
                        .map(|p| p.trim().parse().ok())
                        .collect::<Option<Vec<u32>>>()
                })
                .ok_or_else(|| format!("`{text}` is none of: subject, key, tokens:POSITION[,POSITION]…"))?;
            By::SubjectTokens(proto::BySubjectTokens { positions })
        }
    };
    Ok(Partitioning { by: Some(by) })
}

fn narrow(value: u64, what: &str) -> Result<u32, Failure> {
    u32::try_from(value).map_err(|_| Failure::usage(format!("{what} of {value} is too large")))
}

impl Settings {
    /// The fields that were given, and their paths.
    fn read(self, name: String) -> Result<(StreamSpec, Vec<String>), Failure> {
        let mut paths = Vec::new();
        let mut named = |path: &str| paths.push(path.to_owned());
        let mut spec = StreamSpec {
            name,
            ..StreamSpec::default()
        };
        let mut limits = Limits::default();
        if !self.subject.is_empty() {
            named("subjects");
            spec.subjects = self.subject;
        }
        if let Some(text) = self.description {
            named("description");
            spec.description = text;
        }
        if let Some(Maybe(age)) = self.max_age {
            named("limits.max_age_us");
            limits.max_age_us = age;
        }
        if let Some(Maybe(bytes)) = self.max_bytes {
            named("limits.max_bytes");
            limits.max_bytes = bytes;
        }
        if let Some(Maybe(messages)) = self.max_messages {
            named("limits.max_messages");
            limits.max_messages = messages;
        }
        if let Some(Maybe(bytes)) = self.max_message_size {
            named("limits.max_message_bytes");
            limits.max_message_bytes = bytes.map(|b| narrow(b, "a message size")).transpose()?;
        }
        if let Some(discard) = self.discard {
            named("limits.discard");
            limits.set_discard(match discard {
                Discard::Old => DiscardPolicy::Old,
                Discard::New => DiscardPolicy::New,
            });
        }
        if let Some(window) = self.duplicate_window {
            named("duplicate_window_us");
            spec.duplicate_window_us = Some(micros(window));
        }
        if let Some(ids) = self.duplicate_ids {
            named("duplicate_ids_max");
            spec.duplicate_ids_max = Some(narrow(ids, "a number of ids")?);
        }
        if !self.metadata.is_empty() {
            named("metadata");
            spec.metadata = self.metadata.into_iter().collect();
        }
        if !self.placement.is_empty() {
            named("placement");
            let mut placement = Placement::default();
            for part in self.placement {
                match part {
                    // Empty is any.
                    Where::Any => {}
                    Where::Zones(zones) => placement.zones.extend(zones),
                    Where::Tag(key, value) => drop(placement.tags.insert(key, value)),
                }
            }
            spec.placement = Some(placement);
        }
        spec.limits = Some(limits);
        Ok((spec, paths))
    }
}

impl CreateArgs {
    pub(super) fn spec(self) -> Result<(StreamSpec, Format), Failure> {
        let (spec, _) = self.settings.read(self.name)?;
        let spec = StreamSpec {
            shards: self.shards,
            replicas: self.replicas,
            partitioning: Some(self.partition_by),
            dedicated: self.dedicated,
            ..spec
        };
        Ok((spec, self.format.format))
    }
}

impl EditArgs {
    pub(super) fn change(self) -> Result<Edit, Failure> {
        let (mut spec, mut paths) = self.settings.read(self.name)?;
        if let Some(replicas) = self.replicas {
            spec.replicas = replicas;
            paths.push("replicas".to_owned());
        }
        if paths.is_empty() {
            return Err(Failure::usage("nothing to change is named").hint("for instance --max-age 7days"));
        }
        Ok(Edit {
            spec,
            paths,
            expected_revision: self.expected_revision,
            no_wait: self.no_wait,
            within: self.within,
            format: self.format.format,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::Parser as _;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: EditArgs,
    }

    #[test]
    fn an_edit_names_what_it_changes() {
        let line = "edit s --max-age 7days --max-bytes none --discard new --metadata a=b";
        let edit = Line::try_parse_from(line.split(' ')).unwrap().args.change().unwrap();
        assert!(!edit.moves_replicas());
        let (spec, paths, revision) = (edit.spec, edit.paths, edit.expected_revision);
        assert_eq!(
            paths,
            ["limits.max_age_us", "limits.max_bytes", "limits.discard", "metadata"]
        );
        let limits = spec.limits.unwrap();
        assert_eq!((limits.max_age_us, limits.max_bytes), (Some(604_800_000_000), None));
        assert_eq!(limits.discard(), DiscardPolicy::New);
        assert_eq!((spec.metadata["a"].as_str(), revision), ("b", None));
        assert!(Line::try_parse_from(["edit", "s"]).unwrap().args.change().is_err());
    }

    #[test]
    fn replicas_and_placements() {
        let line = "edit s --replicas 5 --placement zone=a,b --placement tag:disk=ssd";
        let edit = Line::try_parse_from(line.split(' ')).unwrap().args.change().unwrap();
        assert!(edit.moves_replicas());
        let (spec, paths) = (edit.spec, edit.paths);
        assert_eq!(paths, ["placement", "replicas"]);
        let placement = spec.placement.unwrap();
        assert_eq!(
            (placement.zones, spec.replicas),
            (vec!["a".to_owned(), "b".to_owned()], 5)
        );
        assert_eq!(placement.tags["disk"], "ssd");
        assert_eq!(placement_of("any"), Ok(Where::Any));
        assert!(placement_of("a,b").is_err() && placement_of("tag:=x").is_err());
        assert!(Line::try_parse_from(["edit", "s", "--replicas", "8"]).is_err());
    }

    fn placement_of(text: &str) -> Result<Where, String> {
        placement(text)
    }

    #[test]
    fn partitionings() {
        assert_eq!(
            partitioning("tokens:1,3").unwrap().by,
            Some(By::SubjectTokens(proto::BySubjectTokens { positions: vec![1, 3] }))
        );
        assert!(partitioning("tokens:").is_err() && partitioning("subjects").is_err());
    }
}
