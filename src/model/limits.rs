//! Every limit of the product in one place: its name, its value and why. The relations between them are asserted when
//! the crate is compiled.

/// One mebibyte.
pub const MIB: usize = 1 << 20;

/// A fixed limit, as told by `GetServerInfo` and in docs/reference/limits.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Stable name; the unit comes last.
    pub name: &'static str,
    /// In the unit of the name; a plain count where there is none.
    pub value: u64,
    /// Why it is there, and why it has this value.
    pub why: &'static str,
}

macro_rules! limits {
    ($($(#[$doc:meta])* $constant:ident: $type:ty = $value:expr, $name:literal, $why:literal;)*) => {
        $(
            #[doc = $why]
            pub const $constant: $type = $value;
        )*

        /// All of them, in the order of this file.
        pub const LIMITS: &[Limit] = &[
            $(Limit { name: $name, value: $value as u64, why: $why },)*
        ];
    };
}

limits! {
    // ---- messages and batches
    SUBJECT_BYTES_MAX: usize = 255, "subject_bytes_max", "A subject's length has one byte in the batch format.";
    KEY_BYTES_MAX: usize = 1_024, "key_bytes_max", "A key picks a shard and is kept with each message; it is no payload.";
    MESSAGE_ID_BYTES_MAX: usize = 255, "message_id_bytes_max", "Ids of a whole window are kept in memory; their length has one byte in the batch format.";
    HEADERS_MAX: usize = 64, "headers_max", "Headers are walked one by one.";
    HEADER_NAME_BYTES_MAX: usize = 255, "header_name_bytes_max", "A name's length has one byte in the batch format.";
    MESSAGE_BYTES_MAX: usize = 4 * MIB, "message_bytes_max", "A message must fit a batch, and larger things belong in an object store.";
    BATCH_BYTES_MAX: usize = 8 * MIB, "batch_bytes_max", "An encoded batch travels in one gRPC message and in one log entry.";
    BATCH_BODY_BYTES_MAX: usize = 16 * MIB, "batch_body_bytes_max", "Bounds the memory that one compressed batch can ask for.";
    BATCH_RECORDS_MAX: usize = 100_000, "batch_records_max", "Bounds the work of one batch, whatever its bytes.";
    PUBLISH_MESSAGES_MAX: usize = 1_000, "publish_messages_max", "Unary publishes are for simple clients; a steady flow uses a session.";

    // ---- entries and transport
    ENTRY_BYTES_MAX: usize = 12 * MIB, "entry_bytes_max", "A log entry holds at least one batch of the largest size and travels between nodes in one gRPC message.";
    GRPC_MESSAGE_BYTES_MAX: usize = 16 * MIB, "grpc_message_bytes_max", "The size limit of the gRPC listeners, both ways.";
    ENTRY_ITEMS_MAX: usize = 8_192, "entry_items_max", "Bounds the answers that one entry's apply produces.";
    SESSION_WINDOW_BATCHES_MAX: usize = 64, "session_window_batches_max", "Batches a publish session may have unanswered; no more than a shard remembers the answers of.";

    // ---- streams
    NAME_BYTES_MAX: usize = 255, "name_bytes_max", "Names are keys and labels.";
    NAMESPACE_BYTES_MAX: usize = 64, "namespace_bytes_max", "Names are keys and labels.";
    DESCRIPTION_BYTES_MAX: usize = 4_096, "description_bytes_max", "Kept in every node's memory.";
    METADATA_PAIRS_MAX: usize = 64, "metadata_pairs_max", "Kept in every node's memory.";
    METADATA_BYTES_MAX: usize = 4_096, "metadata_bytes_max", "Kept in every node's memory.";
    STREAM_SUBJECTS_MAX: usize = 64, "stream_subjects_max", "Each is compared with every other stream's that could overlap.";
    READ_FILTERS_MAX: usize = 64, "read_filters_max", "Each is matched against every message read.";
    STREAMS_MAX: usize = 100_000, "streams_max", "The catalog is in every node's memory.";
    NODES_MAX: usize = 1_024, "nodes_max", "The catalog is in every node's memory.";
    NODES_REMEMBERED_MAX: usize = 16_384, "nodes_remembered_max", "Removed nodes count too: their ids are never given again, so they are kept.";
    SHARDS_MAX: u32 = 1_024, "shards_max", "No more than a quarter of the slots, so that shards stay even.";
    SLOTS: u32 = 4_096, "slots", "What a hash picks from; fixed for ever, since it decides which shard holds a subject.";
    PARTITION_TOKENS_MAX: usize = 16, "partition_tokens_max", "A partition by tokens looks at a few.";
    REPLICAS_MAX: u32 = 7, "replicas_max", "Seven replicas survive three failures; more only cost.";
    PLACEMENT_ZONES_MAX: usize = 32, "placement_zones_max", "Each is compared with each node's.";
    PLACEMENT_TAGS_MAX: usize = 16, "placement_tags_max", "Each is compared with each node's; also the tags of a node.";
    LABEL_BYTES_MAX: usize = 64, "label_bytes_max", "Zones and tags are short words.";
    META_VOTERS_MAX: u32 = 5, "meta_voters_max", "Voters of the meta group: five survive two failures; the other nodes are learners.";
    POOL_GROUPS_MAX: u32 = 256, "pool_groups_max", "Groups shared by ordinary streams; each costs tasks and memory.";
    MAX_AGE_MIN_US: u64 = 100_000, "max_age_min_us", "Below 100 ms expiry would be proposed without pause.";
    DUPLICATE_WINDOW_DEFAULT_US: u64 = 120_000_000, "duplicate_window_default_us", "Two minutes, as users of other systems expect.";
    DUPLICATE_WINDOW_MAX_US: u64 = 86_400_000_000, "duplicate_window_max_us", "A day; ids are kept in memory.";
    DUPLICATE_IDS_DEFAULT: u32 = 200_000, "duplicate_ids_default", "About 20 MiB of memory for a busy shard.";
    DUPLICATE_IDS_MAX: u32 = 1_000_000, "duplicate_ids_max", "Ids of a whole window are kept in memory.";

    // ---- producers
    PRODUCERS_MAX: u32 = 10_000, "producers_max", "Producers that one shard remembers; they are kept in memory.";
    PRODUCER_IDLE_US: u64 = 3_600_000_000, "producer_idle_us", "An hour: how long after its last batch a producer may still retry it.";
    PRODUCER_ANSWERS_MAX: usize = 64, "producer_answers_max", "Answers remembered per producer and shard, so that a whole window can be sent again.";

    // ---- work of one entry
    TRIM_BATCHES_MAX: usize = 4_096, "trim_batches_max", "Stored batches that one entry looks at to remove messages; more are left to the next entry.";
    TRIM_BYTES_MAX: usize = 64 * MIB, "trim_bytes_max", "Bytes of stored batches that one entry looks at to remove messages.";
    POSTING_OFFSETS_MAX: usize = 1 << 19, "posting_offsets_max", "Records that one posting names; an entry that decompresses to more of one subject writes several.";

    // ---- admin
    REQUEST_MEMORY_US: u64 = 600_000_000, "request_memory_us", "Ten minutes: how long the answer to a request id is remembered.";
    REQUESTS_MAX: usize = 100_000, "requests_max", "Remembered answers, in memory.";
    REQUESTS_BYTES_MAX: usize = 64 * MIB, "requests_bytes_max", "Remembered answers, in memory.";
    REQUEST_ID_BYTES_MAX: usize = 128, "request_id_bytes_max", "An id is a UUID or the like.";
    PAGE_SIZE_MAX: u32 = 1_000, "page_size_max", "A list's answer fits one gRPC message.";
    PAGE_SIZE_DEFAULT: u32 = 100, "page_size_default", "Quick to answer, and enough for most.";
}

/// What an entry holds besides its batches: command, stamps, expectations. For one item; an entry's maker counts this
/// for each.
pub const ENTRY_ITEM_OVERHEAD_BYTES: usize = 512;

/// What a gRPC message holds besides the batch or the entry in it.
pub const FRAME_OVERHEAD_BYTES: usize = 64 * 1_024;

const _: () = {
    assert!(SUBJECT_BYTES_MAX <= u8::MAX as usize);
    assert!(MESSAGE_ID_BYTES_MAX <= u8::MAX as usize);
    assert!(HEADER_NAME_BYTES_MAX <= u8::MAX as usize);
    assert!(KEY_BYTES_MAX <= u16::MAX as usize);
    assert!(HEADERS_MAX <= u16::MAX as usize);
    // message ≤ batch ≤ entry ≤ gRPC
    assert!(MESSAGE_BYTES_MAX + 32 <= BATCH_BYTES_MAX);
    assert!(BATCH_BYTES_MAX <= BATCH_BODY_BYTES_MAX);
    assert!(BATCH_BYTES_MAX + ENTRY_ITEM_OVERHEAD_BYTES + FRAME_OVERHEAD_BYTES <= ENTRY_BYTES_MAX);
    assert!(ENTRY_BYTES_MAX + FRAME_OVERHEAD_BYTES <= GRPC_MESSAGE_BYTES_MAX);
    assert!(BATCH_BODY_BYTES_MAX <= u32::MAX as usize);
    assert!(TRIM_BYTES_MAX >= BATCH_BYTES_MAX);
    // Offsets of postings are 32 bits wide and count from the first sequence of an entry.
    assert!((ENTRY_ITEMS_MAX as u64) * (BATCH_RECORDS_MAX as u64) <= u32::MAX as u64);
    assert!(SHARDS_MAX * 4 <= SLOTS && SHARDS_MAX <= u16::MAX as u32);
    assert!(SESSION_WINDOW_BATCHES_MAX <= PRODUCER_ANSWERS_MAX);
    assert!(PUBLISH_MESSAGES_MAX <= BATCH_RECORDS_MAX);
    assert!(DUPLICATE_IDS_DEFAULT <= DUPLICATE_IDS_MAX);
    assert!(DUPLICATE_WINDOW_DEFAULT_US <= DUPLICATE_WINDOW_MAX_US);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_words() {
        let mut names: Vec<_> = LIMITS.iter().map(|limit| limit.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), LIMITS.len());
        for limit in LIMITS {
            assert!(limit.value > 0, "{} is zero", limit.name);
            assert!(limit.why.ends_with('.'), "{} does not say why", limit.name);
        }
    }

    /// `MODEL_REWRITE=1` writes the page anew.
    #[test]
    fn the_page_is_up_to_date() {
        let mut page = String::from(
            "# Limits\n\nEvery fixed limit of the server, as `GetServerInfo` tells them. Written from `src/model/limits.rs`.\n\n\
             | name | value | why |\n|---|---|---|\n",
        );
        for Limit { name, value, why } in LIMITS {
            page += &format!("| `{name}` | {value} | {why} |\n");
        }
        page += "\nmessage ≤ batch ≤ entry ≤ gRPC message: asserted when the crate is compiled.\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/limits.md");
        if std::env::var_os("MODEL_REWRITE").is_some() {
            std::fs::write(path, &page).expect("writable");
        }
        assert_eq!(
            std::fs::read_to_string(path).expect("the page"),
            page,
            "MODEL_REWRITE=1 writes it anew"
        );
    }
}
