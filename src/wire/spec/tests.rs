use super::*;
use crate::wire::v1::{ByKey, BySubjectTokens, partitioning::By};

fn spec(change: impl FnOnce(&mut StreamSpec)) -> StreamSpec {
    let mut spec = StreamSpec {
        name: "orders".into(),
        ..StreamSpec::default()
    };
    change(&mut spec);
    spec
}

#[test]
fn defaults_are_as_told() {
    let normal = normalise(&spec(|_| ())).expect("valid");
    assert_eq!(normal.namespace, "default");
    assert_eq!(normal.subjects, ["orders", "orders.>"]);
    assert_eq!((normal.shards, normal.replicas), (1, 1));
    assert_eq!(normal.duplicate_window_us, Some(120_000_000));
    assert_eq!(normal.duplicate_ids_max, Some(200_000));
    assert_eq!(normal.durability(), Durability::QuorumSynced);
    assert_eq!(normal.limits.expect("filled in").discard(), DiscardPolicy::Old);
    assert_eq!(partitioning_text(&normal), "by subject");
    assert_eq!(normalise(&normal), Ok(normal.clone()));
    // Order and repetition of subjects mean nothing.
    let twice = normalise(&spec(|s| {
        s.subjects = vec!["orders.>".into(), "orders".into(), "orders".into()]
    }));
    assert_eq!(twice, Ok(normal));
}

#[test]
fn refusals_name_the_field() {
    let cases: Vec<(&str, StreamSpec)> = vec![
        ("name", spec(|s| s.name = String::new())),
        ("name", spec(|s| s.name = "a.b".into())),
        ("name", spec(|s| s.name = "x".repeat(300))),
        ("namespace", spec(|s| s.namespace = "ä".into())),
        ("description", spec(|s| s.description = "x".repeat(5_000))),
        ("subjects", spec(|s| s.subjects = vec!["a..b".into()])),
        ("subjects", spec(|s| s.subjects = vec!["a".into(); 65])),
        ("shards", spec(|s| s.shards = 1_025)),
        ("replicas", spec(|s| s.replicas = 8)),
        (
            "placement",
            spec(|s| s.placement.get_or_insert_default().zones = vec!["a b".into()]),
        ),
        (
            "placement",
            spec(|s| s.placement.get_or_insert_default().zones = vec!["z".into(); 33]),
        ),
        (
            "placement",
            spec(|s| {
                drop(
                    s.placement
                        .get_or_insert_default()
                        .tags
                        .insert("disk".into(), String::new()),
                )
            }),
        ),
        ("duplicate_ids_max", spec(|s| s.duplicate_ids_max = Some(0))),
        ("duplicate_window_us", spec(|s| s.duplicate_window_us = Some(u64::MAX))),
        ("durability", spec(|s| s.durability = 9)),
        ("metadata", spec(|s| drop(s.metadata.insert(String::new(), "x".into())))),
        (
            "metadata",
            spec(|s| drop(s.metadata.insert("k".into(), "x".repeat(5_000)))),
        ),
        (
            "limits.max_age_us",
            spec(|s| s.limits.get_or_insert_default().max_age_us = Some(99_999)),
        ),
        (
            "limits.max_bytes",
            spec(|s| s.limits.get_or_insert_default().max_bytes = Some(0)),
        ),
        (
            "limits.max_messages",
            spec(|s| s.limits.get_or_insert_default().max_messages = Some(0)),
        ),
        (
            "limits.max_message_bytes",
            spec(|s| s.limits.get_or_insert_default().max_message_bytes = Some(5 << 20)),
        ),
        ("limits.discard", spec(|s| s.limits.get_or_insert_default().discard = 7)),
        (
            "partitioning",
            spec(|s| {
                s.partitioning = Some(Partitioning {
                    by: Some(By::SubjectTokens(BySubjectTokens { positions: vec![] })),
                })
            }),
        ),
    ];
    for (field, spec) in cases {
        assert_eq!(normalise(&spec).expect_err(field).field, field);
    }
    // A name as long as may be leaves no room for `NAME.>`.
    let long = normalise(&spec(|s| s.name = "x".repeat(255))).expect("valid");
    assert_eq!(long.subjects.len(), 1);
}

#[test]
fn differences_are_told() {
    let a = normalise(&spec(|_| ())).expect("valid");
    let b = normalise(&spec(|s| {
        s.shards = 4;
        s.limits.get_or_insert_default().max_bytes = Some(5);
    }))
    .expect("valid");
    assert_eq!(difference(&a, &a), None);
    assert_eq!(
        difference(&a, &b).as_deref(),
        Some("shards (1 there, 4 asked); limits.max_bytes (none there, 5 asked)")
    );
    assert_eq!(fixed_difference(&a, &b).as_deref(), Some("shards (1 there, 4 asked)"));
    let key = normalise(&spec(|s| {
        s.partitioning = Some(Partitioning {
            by: Some(By::Key(ByKey {})),
        })
    }))
    .expect("valid");
    assert_eq!(
        difference(&a, &key).as_deref(),
        Some("partitioning (by subject there, by key asked)")
    );
    assert!(!shard_config(&key, "", 1, 0).subject_in_one_shard);
    assert!(shard_config(&a, "", 1, 0).subject_in_one_shard);
}

/// Every field that can differ is told: a spec that differs in nothing but that field.
#[test]
fn no_difference_goes_untold() {
    let a = normalise(&spec(|_| ())).expect("valid");
    let changes: Vec<fn(&mut StreamSpec)> = vec![
        |s| s.namespace = "other".into(),
        |s| s.name = "other".into(),
        |s| s.description = "x".into(),
        |s| s.subjects = vec!["x".into()],
        |s| s.shards = 2,
        |s| s.replicas = 2,
        |s| s.limits.get_or_insert_default().max_age_us = Some(1_000_000),
        |s| s.limits.get_or_insert_default().max_messages = Some(1),
        |s| s.limits.get_or_insert_default().max_message_bytes = Some(1),
        |s| s.limits.get_or_insert_default().discard = DiscardPolicy::New as i32,
        |s| s.duplicate_window_us = Some(1),
        |s| s.duplicate_ids_max = Some(1),
        |s| drop(s.metadata.insert("k".into(), "v".into())),
        |s| s.dedicated = true,
        |s| s.placement.get_or_insert_default().zones = vec!["a".into()],
    ];
    for change in changes {
        let mut b = a.clone();
        change(&mut b);
        assert!(difference(&a, &b).is_some(), "{b:?}");
    }
}

#[test]
fn placements() {
    let zones = |zones: &[&str]| {
        spec(|s| s.placement.get_or_insert_default().zones = zones.iter().map(|z| z.to_string()).collect())
    };
    assert_eq!(normalise(&zones(&[])).expect("valid").placement, None);
    let a = normalise(&zones(&["b", "a", "b"])).expect("valid");
    assert_eq!(a.placement.as_ref().expect("kept").zones, ["a", "b"]);
    assert_eq!(placement_text(a.placement.as_ref()), "zone=a,b");
    let b = normalise(&zones(&[])).expect("valid");
    assert_eq!(
        difference(&a, &b).as_deref(),
        Some("placement (zone=a,b there, any asked)")
    );
    assert_eq!(fixed_difference(&a, &b), None);
}

#[test]
fn masks() {
    let current = normalise(&spec(|s| s.limits.get_or_insert_default().max_bytes = Some(5))).expect("valid");
    let wanted = spec(|s| {
        s.description = "new".into();
        s.shards = 9;
        s.limits.get_or_insert_default().max_messages = Some(7);
    });
    let updated = apply_mask(&current, &wanted, ["limits.max_messages"]).expect("valid");
    let limits = updated.limits.expect("there");
    assert_eq!(
        (limits.max_messages, limits.max_bytes, updated.description.as_str()),
        (Some(7), Some(5), "")
    );
    let updated = apply_mask(&current, &wanted, ["limits", "description"]).expect("valid");
    let limits = updated.limits.expect("there");
    assert_eq!(
        (limits.max_messages, limits.max_bytes, updated.description.as_str()),
        (Some(7), None, "new")
    );
    assert!(
        apply_mask(&current, &wanted, ["shards"])
            .expect_err("fixed")
            .problem
            .starts_with("it is fixed")
    );
    assert!(
        apply_mask(&current, &wanted, ["colour"])
            .expect_err("unknown")
            .problem
            .starts_with("there is no")
    );
    assert_eq!(
        apply_mask::<&str>(&current, &wanted, []).expect_err("empty").field,
        "update_mask"
    );
    for path in UPDATABLE {
        assert!(apply_mask(&current, &wanted, [path]).is_ok(), "{path}");
    }
}
