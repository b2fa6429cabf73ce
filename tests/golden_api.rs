//! The public protocol may grow, but what was there stays: clients that were built against an older version go on.
//!
//! `tests/golden/mainstem.v1.bin` is the protocol as it was last agreed on, an encoded `FileDescriptorSet` without
//! comments. Additions pass. `UPDATE=1 cargo test --release --test golden_api` takes them up, so that they are kept from
//! then on; it also takes up a break, which is then seen in review by the change of that file: never after a release.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use prost::Message;
use prost_types::field_descriptor_proto::Label;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, MethodDescriptorProto,
    ServiceDescriptorProto,
};

const PACKAGE: &str = "mainstem.v1";

/// Everything of the package, by full name.
#[derive(Default)]
struct Protocol {
    messages: BTreeMap<String, DescriptorProto>,
    enums: BTreeMap<String, EnumDescriptorProto>,
    services: BTreeMap<String, ServiceDescriptorProto>,
}

impl Protocol {
    fn of(set: &FileDescriptorSet) -> Self {
        let mut all = Self::default();
        for file in set.file.iter().filter(|f| f.package() == PACKAGE) {
            for message in &file.message_type {
                all.message(PACKAGE, message);
            }
            for e in &file.enum_type {
                all.enums.insert(format!("{PACKAGE}.{}", e.name()), e.clone());
            }
            for service in &file.service {
                all.services
                    .insert(format!("{PACKAGE}.{}", service.name()), service.clone());
            }
        }
        all
    }

    fn message(&mut self, scope: &str, message: &DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        for nested in &message.nested_type {
            self.message(&name, nested);
        }
        for e in &message.enum_type {
            self.enums.insert(format!("{name}.{}", e.name()), e.clone());
        }
        self.messages.insert(name, message.clone());
    }
}

/// What a field is to those who speak the protocol: name (JSON, generated code), type, how often, and in which oneof.
fn nature(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let oneof = field
        .oneof_index
        .and_then(|i| message.oneof_decl.get(i as usize))
        .map(|o| o.name());
    let often = match (field.label(), field.proto3_optional()) {
        (Label::Repeated, _) => "repeated",
        (Label::Required, _) => "required",
        (Label::Optional, true) => "optional",
        (Label::Optional, false) => "plain",
    };
    let within = match oneof {
        Some(name) if !field.proto3_optional() => format!(" in oneof {name}"),
        Some(_) | None => String::new(),
    };
    format!(
        "{often} {:?} {} {}{within}",
        field.r#type(),
        field.type_name(),
        field.name()
    )
}

fn form(method: &MethodDescriptorProto) -> String {
    let stream = |is: bool| if is { "stream " } else { "" };
    format!(
        "({}{}) returns ({}{})",
        stream(method.client_streaming()),
        method.input_type(),
        stream(method.server_streaming()),
        method.output_type()
    )
}

fn breaking_fields(name: &str, old: &DescriptorProto, new: &DescriptorProto, wrong: &mut Vec<String>) {
    for field in &old.field {
        let number = field.number();
        let before = nature(old, field);
        match new.field.iter().find(|f| f.number() == number) {
            None => wrong.push(format!("{name}: field {number} ({before}) is gone")),
            Some(now) if nature(new, now) != before => {
                wrong.push(format!("{name}: field {number} was {before}, is {}", nature(new, now)));
            }
            Some(_) => {}
        }
    }
    // A number or a name that was given up must stay so.
    for range in &old.reserved_range {
        let kept = |n: i32| new.reserved_range.iter().any(|r| (r.start()..r.end()).contains(&n));
        if !(range.start()..range.end()).all(kept) {
            wrong.push(format!(
                "{name}: {}..{} is reserved no more",
                range.start(),
                range.end()
            ));
        }
    }
    for reserved in &old.reserved_name {
        if !new.reserved_name.contains(reserved) {
            wrong.push(format!("{name}: the name {reserved:?} is reserved no more"));
        }
    }
}

/// What a client of `old` could not live with in `new`.
fn breaking(old: &FileDescriptorSet, new: &FileDescriptorSet) -> Vec<String> {
    let (old, new) = (Protocol::of(old), Protocol::of(new));
    let mut wrong = Vec::new();
    for (name, message) in &old.messages {
        match new.messages.get(name) {
            None => wrong.push(format!("message {name} is gone")),
            Some(now) => breaking_fields(name, message, now, &mut wrong),
        }
    }
    for (name, e) in &old.enums {
        let Some(now) = new.enums.get(name) else {
            wrong.push(format!("enum {name} is gone"));
            continue;
        };
        for value in &e.value {
            let same = now
                .value
                .iter()
                .any(|v| (v.name(), v.number()) == (value.name(), value.number()));
            if !same {
                wrong.push(format!("{name}: {} = {} is gone", value.name(), value.number()));
            }
        }
    }
    for (name, service) in &old.services {
        let Some(now) = new.services.get(name) else {
            wrong.push(format!("service {name} is gone"));
            continue;
        };
        for method in &service.method {
            let before = form(method);
            match now.method.iter().find(|m| m.name() == method.name()) {
                None => wrong.push(format!("{name}: rpc {} is gone", method.name())),
                Some(m) if form(m) != before => {
                    wrong.push(format!("{name}: rpc {} was {before}, is {}", method.name(), form(m)));
                }
                Some(_) => {}
            }
        }
    }
    wrong
}

/// The protocol of this build, without comments and without what it imports.
fn current() -> FileDescriptorSet {
    let mut set = FileDescriptorSet::decode(mainstem::wire::DESCRIPTOR_SET).unwrap();
    set.file.retain(|f| f.package() == PACKAGE);
    for file in &mut set.file {
        file.source_code_info = None;
    }
    assert!(!set.file.is_empty());
    set
}

fn golden_file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mainstem.v1.bin")
}

#[test]
fn the_protocol_breaks_nobody() {
    let current = current();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(golden_file(), current.encode_to_vec()).unwrap();
    }
    let golden = std::fs::read(golden_file()).unwrap();
    let golden = FileDescriptorSet::decode(golden.as_slice()).unwrap();
    let wrong = breaking(&golden, &current);
    assert!(
        wrong.is_empty(),
        "these changes break clients of an earlier version:\n{}\nGive a new field a new number and leave the old one as it \
         is.",
        wrong.join("\n")
    );
    if golden != current {
        println!("the protocol has grown; UPDATE=1 cargo test --release --test golden_api keeps the additions");
    }
}

fn message<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut DescriptorProto {
    let mut all = set.file.iter_mut().flat_map(|f| &mut f.message_type);
    all.find(|m| m.name() == name).unwrap()
}

fn field<'a>(set: &'a mut FileDescriptorSet, of: &str, name: &str) -> &'a mut FieldDescriptorProto {
    let mut all = message(set, of).field.iter_mut();
    all.find(|f| f.name() == name).unwrap()
}

fn rpc<'a>(set: &'a mut FileDescriptorSet, of: &str, name: &str) -> &'a mut MethodDescriptorProto {
    let mut all = set.file.iter_mut().flat_map(|f| &mut f.service);
    let service = all.find(|s| s.name() == of).unwrap();
    service.method.iter_mut().find(|m| m.name() == name).unwrap()
}

type Change = (&'static str, fn(&mut FileDescriptorSet));

/// The test above would find each of these.
#[test]
fn every_kind_of_break_is_found() {
    use prost_types::field_descriptor_proto::Type;
    let cases: &[Change] = &[
        ("PublishRequest: field 3 ", |s| {
            message(s, "PublishRequest").field.retain(|f| f.number() != 3);
        }),
        ("PublishRequest: field 3 ", |s| {
            field(s, "PublishRequest", "messages").number = Some(77);
        }),
        ("PublishRequest: field 2 ", |s| {
            field(s, "PublishRequest", "stream").name = Some("stream_name".into());
        }),
        ("Message: field 2 ", |s| {
            field(s, "Message", "payload").set_type(Type::String);
        }),
        ("Message: field 3 ", |s| {
            field(s, "Message", "headers").type_name = Some(".mainstem.v1.Message".into());
        }),
        ("PublishRequest: field 2 ", |s| {
            field(s, "PublishRequest", "stream").set_label(Label::Repeated);
        }),
        ("UpdateStreamRequest: field 3 ", |s| {
            let field = field(s, "UpdateStreamRequest", "expected_revision");
            field.proto3_optional = None;
            field.oneof_index = None;
        }),
        ("PurgeStreamRequest: field 5 ", |s| {
            field(s, "PurgeStreamRequest", "keep").oneof_index = None;
        }),
        ("message mainstem.v1.Heartbeat is gone", |s| {
            for file in &mut s.file {
                file.message_type.retain(|m| m.name() != "Heartbeat");
            }
        }),
        ("RetryClass: RETRY_CLASS_CANNOT_WORK = 3 is gone", |s| {
            for e in s.file.iter_mut().flat_map(|f| &mut f.enum_type) {
                e.value.retain(|v| v.name() != "RETRY_CLASS_CANNOT_WORK");
            }
        }),
        ("RetryClass: RETRY_CLASS_CANNOT_WORK = 3 is gone", |s| {
            for v in s
                .file
                .iter_mut()
                .flat_map(|f| &mut f.enum_type)
                .flat_map(|e| &mut e.value)
            {
                if v.name() == "RETRY_CLASS_CANNOT_WORK" {
                    v.number = Some(9);
                }
            }
        }),
        ("enum mainstem.v1.Durability is gone", |s| {
            for file in &mut s.file {
                file.enum_type.retain(|e| e.name() != "Durability");
            }
        }),
        ("service mainstem.v1.ServerService is gone", |s| {
            for file in &mut s.file {
                file.service.retain(|s| s.name() != "ServerService");
            }
        }),
        ("ReadService: rpc Fetch is gone", |s| {
            for service in s.file.iter_mut().flat_map(|f| &mut f.service) {
                service.method.retain(|m| m.name() != "Fetch");
            }
        }),
        ("PublishService: rpc Publish was", |s| {
            rpc(s, "PublishService", "Publish").server_streaming = Some(true);
        }),
        ("ReadService: rpc ReadSession was", |s| {
            rpc(s, "ReadService", "ReadSession").client_streaming = Some(false);
        }),
        ("ReadService: rpc Get was", |s| {
            rpc(s, "ReadService", "Get").input_type = Some(".mainstem.v1.FetchRequest".into());
        }),
    ];
    let golden = current();
    for (expected, change) in cases {
        let mut changed = golden.clone();
        change(&mut changed);
        assert_ne!(changed, golden, "{expected}: the case changes nothing");
        let wrong = breaking(&golden, &changed);
        assert!(wrong.iter().any(|w| w.contains(expected)), "{expected}: {wrong:?}");
    }
    let mut reserved = golden.clone();
    message(&mut reserved, "Message").reserved_name.push("old".into());
    assert_eq!(breaking(&golden, &reserved), Vec::<String>::new());
    assert_eq!(breaking(&reserved, &golden).len(), 1);
}

#[test]
fn additions_pass() {
    let golden = current();
    let mut grown = golden.clone();
    let mut extra = field(&mut grown, "PublishRequest", "stream").clone();
    extra.name = Some("extra".into());
    extra.number = Some(99);
    message(&mut grown, "PublishRequest").field.push(extra);
    let mut copy = message(&mut grown, "Heartbeat").clone();
    copy.name = Some("Extra".into());
    let mut method = rpc(&mut grown, "ReadService", "Get").clone();
    method.name = Some("GetMore".into());
    let file = grown.file.iter_mut().find(|f| !f.service.is_empty()).unwrap();
    file.message_type.push(copy);
    file.service[0].method.push(method);
    for e in grown.file.iter_mut().flat_map(|f| &mut f.enum_type) {
        let mut value = e.value[0].clone();
        value.name = Some(format!("{}_EXTRA", e.name()));
        value.number = Some(99);
        e.value.push(value);
    }
    assert_ne!(grown, golden);
    assert_eq!(breaking(&golden, &grown), Vec::<String>::new());
    assert!(!breaking(&grown, &golden).is_empty());
}
