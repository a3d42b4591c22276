//! Merges against slow, obvious models, and every entry point against bytes that nobody meant.

use coracle_schema::{Schema, apply, decode, fuzz, patch, protobuf};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn pod_schema() -> std::sync::Arc<Schema> {
    Schema::builtin("io.k8s.api.core.v1.Pod").expect("built in")
}

prop_compose! {
    /// A container of a few names with a few fields, environment included.
    fn container()(
        name in "[a-d]",
        image in proptest::option::of("[xyz]"),
        env in proptest::collection::btree_map("[A-C]", "[0-9]", 0..3),
        command in proptest::option::of(proptest::collection::vec("[a-c]", 1..3)),
    ) -> Value {
        let mut map = Map::new();
        map.insert("name".into(), name.into());
        map.extend(image.map(|image| ("image".to_owned(), image.into())));
        if !env.is_empty() {
            let env: Vec<Value> = env.into_iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
            map.insert("env".into(), env.into());
        }
        map.extend(command.map(|command| ("command".to_owned(), command.into())));
        Value::Object(map)
    }
}

fn unique(items: Vec<Value>) -> Vec<Value> {
    let mut kept: Vec<Value> = Vec::new();
    for item in items {
        if !kept.iter().any(|other| other["name"] == item["name"]) {
            kept.push(item);
        }
    }
    kept
}

prop_compose! {
    fn pod()(
        containers in proptest::collection::vec(container(), 0..4),
        labels in proptest::collection::btree_map("[a-c]", "[0-9]", 0..3),
        finalizers in proptest::collection::btree_set("[a-d]", 0..3),
        host_network in proptest::option::of(any::<bool>()),
    ) -> Value {
        let mut metadata = Map::new();
        metadata.insert("name".into(), "p".into());
        if !labels.is_empty() {
            metadata.insert("labels".into(), json!(labels));
        }
        if !finalizers.is_empty() {
            metadata.insert("finalizers".into(), json!(finalizers));
        }
        let mut spec = Map::new();
        let containers = unique(containers);
        if !containers.is_empty() {
            spec.insert("containers".into(), containers.into());
        }
        spec.extend(host_network.map(|flag| ("hostNetwork".to_owned(), flag.into())));
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata});
        if !spec.is_empty() {
            pod["spec"] = spec.into();
        }
        pod
    }
}

/// The content of a strategic merge, lists of names as maps: order aside, this is what must come out.
fn model(old: &Value, new: &Value) -> Value {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let mut merged = old.clone();
            for (name, value) in new {
                let value = merged.get(name).map_or_else(|| value.clone(), |old| model_field(name, old, value));
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        _ => new.clone(),
    }
}

fn model_field(name: &str, old: &Value, new: &Value) -> Value {
    match (name, old, new) {
        ("containers" | "env", Value::Array(old), Value::Array(new)) => {
            let mut merged = old.clone();
            for item in new {
                match merged.iter_mut().find(|own| own["name"] == item["name"]) {
                    Some(own) => *own = model(own, item),
                    None => merged.push(item.clone()),
                }
            }
            Value::Array(merged)
        }
        ("finalizers", Value::Array(old), Value::Array(new)) => {
            let mut merged = old.clone();
            merged.extend(new.iter().filter(|item| !old.contains(item)).cloned());
            Value::Array(merged)
        }
        _ => model(old, new),
    }
}

/// A value with its keyed lists in one order.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.iter()
                .map(|(name, inner)| {
                    let mut inner = sorted(inner);
                    if let (true, Value::Array(items)) =
                        (matches!(name.as_str(), "containers" | "env" | "finalizers"), &mut inner)
                    {
                        items.sort_by_key(ToString::to_string);
                    }
                    (name.clone(), inner)
                })
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

fn names(pod: &Value) -> Vec<String> {
    let list = pod.pointer("/spec/containers").and_then(Value::as_array).cloned().unwrap_or_default();
    list.iter().map(|item| item["name"].as_str().unwrap_or("").to_owned()).collect()
}

/// `part` in the order in which `whole` has it.
fn keeps_order(whole: &[String], part: &[String]) -> bool {
    let found: Vec<&String> = whole.iter().filter(|name| part.contains(name)).collect();
    let wanted: Vec<&String> = part.iter().filter(|name| whole.contains(name)).collect();
    found == wanted
}

fn request<'a>(schema: &'a Schema, manager: &'a str) -> apply::Request<'a> {
    apply::Request {
        schema,
        api_version: "v1",
        subresource: "",
        manager,
        now: "2026-01-01T00:00:00Z",
        reset: &[],
        convert: None,
    }
}

fn without_owners(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(metadata) = value["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    value
}

/// All leaf paths of a pod with their values, keyed lists by name.
fn leaves(value: &Value, path: String, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(name, inner)| leaves(inner, format!("{path}.{name}"), found)),
        Value::Array(items) if items.iter().all(Value::is_object) => {
            items.iter().for_each(|item| leaves(item, format!("{path}[{}]", item["name"]), found));
        }
        Value::Array(items) if path.ends_with("finalizers") => {
            items.iter().for_each(|item| found.push((format!("{path}[{item}]"), item.clone())));
        }
        other => found.push((path, other.clone())),
    }
}

fn leaf_map(value: &Value) -> std::collections::BTreeMap<String, Value> {
    let mut found = Vec::new();
    leaves(&without_owners(value), String::new(), &mut found);
    found.into_iter().filter(|(path, _)| !matches!(path.as_str(), ".apiVersion" | ".kind" | ".metadata.name")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn strategic_merge_is_the_model(old in pod(), new in pod()) {
        let mut merged = old.clone();
        patch::strategic::apply(&mut merged, new.clone(), &pod_schema()).expect("merges");
        prop_assert_eq!(sorted(&merged), sorted(&model(&old, &new)));
        // Those of the patch stand in its order, the others in theirs.
        let (after, patched) = (names(&merged), names(&new));
        prop_assert!(keeps_order(&after, &patched));
        let others: Vec<String> = names(&old).into_iter().filter(|name| !patched.contains(name)).collect();
        prop_assert!(keeps_order(&after, &others));
        // Merging twice is merging once.
        let mut again = merged.clone();
        patch::strategic::apply(&mut again, new, &pod_schema()).expect("merges");
        prop_assert_eq!(again, merged);
    }

    /// Two managers apply in turns, with force. Model: each leaf belongs to whoever applied it last and still does; a leaf that
    /// its last owner lets go is removed.
    #[test]
    fn forced_applies_are_the_model(steps in proptest::collection::vec((any::<bool>(), pod()), 1..6)) {
        let schema = pod_schema();
        let mut live = json!({});
        let mut owned: [std::collections::BTreeMap<String, Value>; 2] = Default::default();
        for (second, config) in steps {
            let manager = if second { "two" } else { "one" };
            let applied = apply::apply(&live, &config, true, &request(&schema, manager)).expect("applies");
            live = applied.value;
            live["metadata"]["uid"] = "u".into();
            let new = leaf_map(&config);
            let other = &mut owned[usize::from(!second)];
            other.retain(|path, value| new.get(path).is_none_or(|new| new == value));
            owned[usize::from(second)] = new;
            let mut expected = owned[0].clone();
            expected.extend(owned[1].clone());
            let mut have = leaf_map(&live);
            have.remove(".metadata.uid");
            prop_assert_eq!(have, expected);
            // Applying the same again changes nothing and needs no force.
            let again = apply::apply(&live, &config, false, &request(&schema, manager)).expect("applies again");
            prop_assert!(!again.changed);
            prop_assert_eq!(&again.value, &live);
        }
    }

    /// A conflict is reported exactly when the other manager applied another value for a leaf.
    #[test]
    fn conflicts_are_the_model(first in pod(), second in pod()) {
        let schema = pod_schema();
        let mut live = apply::apply(&json!({}), &first, false, &request(&schema, "one")).expect("creates").value;
        live["metadata"]["uid"] = "u".into();
        let (owned, wanted) = (leaf_map(&first), leaf_map(&second));
        let clash = wanted.iter().filter(|(path, value)| owned.get(*path).is_some_and(|own| own != *value)).count();
        match apply::apply(&live, &second, false, &request(&schema, "two")) {
            Ok(_) => prop_assert_eq!(clash, 0),
            Err(apply::ApplyError::Conflicts(conflicts)) => prop_assert_eq!(conflicts.len(), clash),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// Whatever is decoded is the same after a trip over the wire.
    #[test]
    fn protobuf_round_trips(pod in pod()) {
        let schema = pod_schema();
        let bytes = serde_json::to_vec(&pod).expect("encodes");
        let mut value = decode::decode(&bytes, decode::Format::Json, &schema).expect("decodes").value;
        decode::typed::fill(&mut value, &schema);
        let back = protobuf::decode(&protobuf::encode(&value).expect("encodes")).expect("decodes");
        let mut back_filled = back;
        decode::typed::fill(&mut back_filled, &schema);
        prop_assert_eq!(back_filled, value);
    }

    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "\\PC{0,80}") {
        for input in [bytes.as_slice(), text.as_bytes()] {
            fuzz::object(input);
            fuzz::patches(input);
            fuzz::applies(input);
            fuzz::custom(input);
        }
    }

    /// A real object with some bytes changed.
    #[test]
    fn no_damage_does_harm(pod in pod(), other in pod(), hits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
        let both = format!("{pod}\n{other}").into_bytes();
        let wire = protobuf::encode(&pod).expect("encodes");
        for mut input in [both, pod.to_string().into_bytes(), wire] {
            for (at, byte) in &hits {
                let at = at.index(input.len());
                input[at] = *byte;
            }
            fuzz::object(&input);
            fuzz::patches(&input);
            fuzz::applies(&input);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_expression_does_harm(text in "[a-z0-9.()\\[\\]{}+*?:&|!=<>'\", -]{0,60}", piece in 0_usize..8, tail in "[a-z().,]{0,12}") {
        let pieces = ["self.a.map(x, x", "self.m.all(k, k", "[1,2].sum(", "'%s'.format([", "{'a': 1}.transformMap(", "self.s.split(", "size(", "1 / 0 + "];
        fuzz::expression(text.as_bytes());
        fuzz::expression(format!("{}{tail}", pieces[piece]).as_bytes());
    }
}

/// The seeds that the fuzzers start from pass, and are not empty.
#[test]
fn the_fuzzers_seeds_pass() {
    type Target = fn(&[u8]);
    let targets: [(&str, Target); 5] = [
        ("api_object", fuzz::object),
        ("schema_patches", fuzz::patches),
        ("schema_applies", fuzz::applies),
        ("schema_custom", fuzz::custom),
        ("schema_expression", fuzz::expression),
    ];
    for (name, target) in targets {
        let folder = format!("{}/../../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let files: Vec<_> = std::fs::read_dir(&folder).expect("the corpus is checked in").collect();
        assert!(!files.is_empty(), "{folder} is empty");
        for file in files {
            target(&std::fs::read(file.expect("listed").path()).expect("readable"));
        }
    }
}
