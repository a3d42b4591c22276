//! Built-in types, read lazily from the compact table `tables/types.tsv`.
//!
//! The table says of each type what decoding, patching, applying and the wire format need: JSON names, types, what is left
//! out when empty, protobuf numbers, list topology, patch strategy, defaults. Nothing is parsed until a type is asked for.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, OnceLock};

use parking_lot::Mutex;

use super::{Field, Kind, ListType, Omit, Patch, Schema, SchemaRef, Slot, Wire};

static TABLE: &str = include_str!("../tables/types.tsv");

/// Go's built-in scalars and the types with an encoding of their own.
const SCALARS: &[(&str, Kind, &str)] = &[
    ("string", Kind::String, "string"),
    ("bool", Kind::Bool, "bool"),
    ("int32", Kind::Int32, "int32"),
    ("int64", Kind::Int64, "int64"),
    ("uint8", Kind::Int32, "uint8"),
    ("float64", Kind::Float, "float64"),
    ("[]bytes", Kind::Bytes, "[]uint8"),
    ("any", Kind::Any, "interface {}"),
    ("meta.v1.Time", Kind::Time, "v1.Time"),
    ("meta.v1.MicroTime", Kind::MicroTime, "v1.MicroTime"),
    ("meta.v1.Duration", Kind::Duration, "v1.Duration"),
    ("meta.v1.FieldsV1", Kind::FieldsV1, "v1.FieldsV1"),
    ("meta.v1.Verbs", Kind::StringList, "v1.Verbs"),
    ("[]string=v1.ExtraValue", Kind::StringList, "v1.ExtraValue"),
    ("resource.Quantity", Kind::Quantity, "resource.Quantity"),
    ("intstr.IntOrString", Kind::IntOrString, "intstr.IntOrString"),
    ("runtime.RawExtension", Kind::Raw, "runtime.RawExtension"),
    ("runtime.Object", Kind::Raw, "runtime.Object"),
    ("apiextensions.v1.JSON", Kind::Json, "v1.JSON"),
    ("apiextensions.v1.JSONSchemaPropsOrBool", Kind::SchemaOrBool, "v1.JSONSchemaPropsOrBool"),
    ("apiextensions.v1.JSONSchemaPropsOrArray", Kind::SchemaOrArray, "v1.JSONSchemaPropsOrArray"),
    ("apiextensions.v1.JSONSchemaPropsOrStringArray", Kind::SchemaOrStrings, "v1.JSONSchemaPropsOrStringArray"),
];

/// The schema behind `JSONSchemaPropsOr…`.
const SCHEMA_PROPS: &str = "apiextensions.v1.JSONSchemaProps";

/// Abbreviations of the packages in the table's type texts; all else lies under `io.k8s.api.`.
const SHORT: &[(&str, &str)] = &[
    ("meta.", "io.k8s.apimachinery.pkg.apis.meta."),
    ("runtime.", "io.k8s.apimachinery.pkg.runtime."),
    ("apiextensions.", "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions."),
    ("apiregistration.", "io.k8s.kube-aggregator.pkg.apis.apiregistration."),
];

struct Types {
    /// Sorted by name; `text` holds the field lines.
    entries: Vec<Entry>,
}

struct Entry {
    name: &'static str,
    atomic: bool,
    text: &'static str,
    schema: OnceLock<Arc<Schema>>,
}

static TYPES: LazyLock<Types> = LazyLock::new(|| {
    let mut entries = Vec::new();
    for part in TABLE.split("\n@").skip(1) {
        let (head, text) = part.split_once('\n').unwrap_or((part, ""));
        let text = text.split_once("\n=").map_or(text, |(fields, _)| fields);
        let text = if text.starts_with('=') { "" } else { text };
        let (name, flag) = head.split_once('\t').unwrap_or((head, ""));
        entries.push(Entry { name, atomic: flag == "atomic", text, schema: OnceLock::new() });
    }
    entries.sort_unstable_by_key(|entry| entry.name);
    Types { entries }
});

/// Inline nodes without topology, shared by their type text.
static INLINE: LazyLock<Mutex<HashMap<&'static str, Arc<Schema>>>> = LazyLock::new(Mutex::default);

/// Names of all built-in definitions, sorted.
pub fn definitions() -> impl Iterator<Item = &'static str> {
    TYPES.entries.iter().map(|entry| entry.name)
}

/// The values of a named string type, `core.v1.PullPolicy`, if it is an enum.
pub fn enum_values(name: &str) -> Option<Vec<&'static str>> {
    TABLE.split("\n=").skip(1).find_map(|line| {
        let mut cells = line.lines().next()?.split('\t');
        cells.next()?;
        (cells.next()? == name).then(|| cells.collect())
    })
}

pub(super) fn name(name: &str) -> Option<&'static str> {
    position(name).map(|at| TYPES.entries[at].name)
}

pub(super) fn by_name(name: &str) -> Option<Arc<Schema>> {
    position(name).map(|at| entry_schema(at).clone())
}

pub(super) fn by_id(id: u16) -> &'static Schema {
    entry_schema(usize::from(id))
}

fn position(name: &str) -> Option<usize> {
    TYPES.entries.binary_search_by(|entry| entry.name.cmp(name)).ok()
}

fn entry_schema(at: usize) -> &'static Arc<Schema> {
    let entry = &TYPES.entries[at];
    entry.schema.get_or_init(|| Arc::new(parse_type(entry)))
}

fn parse_type(entry: &Entry) -> Schema {
    let mut schema = Schema::of(Kind::Object);
    schema.name = entry.name;
    schema.go = Cow::Owned(go_name(entry.name));
    schema.atomic = entry.atomic;
    let mut fields = Vec::new();
    for line in entry.text.lines().filter(|line| !line.is_empty()) {
        let cells: Vec<&'static str> = line.split('\t').collect();
        let cell = |i: usize| cells.get(i).copied().unwrap_or("");
        let number = cell(3).parse().unwrap_or(0);
        let flags = cell(2);
        if flags.contains('i') {
            inline_fields(cell(1), number, &mut fields, &mut schema.wire);
            continue;
        }
        if number > 0 {
            let at = u16::try_from(fields.len()).expect("a built-in type has fewer than 65,536 fields");
            schema.wire.push(Wire { number, slot: Slot::Field(at) });
        }
        fields.push(parse_field(cell(0), cell(1), flags, cell(4), cell(5), cell(6)));
    }
    schema.wire.sort_by_key(|wire| wire.number);
    schema.set_fields(fields);
    schema
}

/// An embedded struct: its fields stand in the outer object's JSON, but it is a message of its own on the wire.
fn inline_fields(ty: &'static str, number: u32, fields: &mut Vec<Field>, wire: &mut Vec<Wire>) {
    let target = type_ref(ty.trim_start_matches('*'), "");
    for field in &target.get().fields {
        fields.push(Field {
            name: field.name.clone(),
            schema: field.schema.clone(),
            default: field.default.clone(),
            ..*field
        });
    }
    if number > 0 {
        wire.push(Wire { number, slot: Slot::Inline(target) });
    }
}

fn parse_field(
    name: &'static str,
    ty: &'static str,
    flags: &str,
    topology: &'static str,
    patch: &'static str,
    default: &str,
) -> Field {
    let (topology, map) = topology.split_once("m=").unwrap_or((topology, ""));
    let omit = match (flags.contains('z'), flags.contains('o')) {
        (true, _) => Omit::Zero,
        (_, true) => Omit::Empty,
        _ => Omit::Never,
    };
    let (strategies, merge_key) = patch.split_once(':').unwrap_or((patch, ""));
    let strategy = |name| strategies.split(',').any(|word| word == name);
    Field {
        name: Cow::Borrowed(name),
        schema: type_ref(ty.trim_start_matches('*'), topology),
        required: flags.contains('R') || !(flags.contains('p') || flags.contains('o')),
        pointer: ty.starts_with('*'),
        omit,
        atomic: map == "atomic",
        patch: Patch {
            merge: strategy("merge"),
            replace: strategy("replace"),
            retain_keys: strategy("retainKeys"),
            merge_key,
        },
        default: serde_json::from_str(default).ok(),
    }
}

/// A type text without a leading `*`: a definition by reference, anything else as an inline node.
fn type_ref(ty: &'static str, topology: &'static str) -> SchemaRef {
    if let Some(at) = position(&long_name(ty)) {
        return SchemaRef::Builtin(u16::try_from(at).expect("the table has fewer than 65,536 types"));
    }
    if topology.is_empty()
        && let Some(shared) = INLINE.lock().get(ty)
    {
        return SchemaRef::Inline(shared.clone());
    }
    let schema = Arc::new(inline_type(ty, topology));
    if topology.is_empty() {
        INLINE.lock().insert(ty, schema.clone());
    }
    SchemaRef::Inline(schema)
}

fn inline_type(ty: &'static str, topology: &'static str) -> Schema {
    if let Some((_, kind, go)) = SCALARS.iter().find(|(name, ..)| *name == ty) {
        let mut schema = Schema::of(*kind);
        schema.go = Cow::Borrowed(go);
        if matches!(kind, Kind::SchemaOrBool | Kind::SchemaOrArray | Kind::SchemaOrStrings) {
            schema.items = Some(type_ref(SCHEMA_PROPS, ""));
        }
        return schema;
    }
    if let Some(item) = ty.strip_prefix("[]") {
        let mut schema = Schema::of(Kind::List);
        // A name after `=` is the item's for scalars, the list's own for structs.
        let item = if item.starts_with("string") { item } else { item.split_once('=').map_or(item, |(base, _)| base) };
        schema.go = go_text(ty);
        schema.items = Some(type_ref(item, ""));
        schema.list = match topology.split_once(':') {
            Some(("map", keys)) => ListType::Map(keys.split(',').map(Cow::Borrowed).collect()),
            _ if topology == "set" => ListType::Set,
            _ => ListType::Atomic,
        };
        return schema;
    }
    if let Some(value) = ty.strip_prefix("map[string]") {
        let mut schema = Schema::of(Kind::Object);
        schema.go = go_text(ty);
        let value = if SCALARS.iter().any(|(name, ..)| *name == value) || value.starts_with("string") {
            value
        } else {
            value.split_once('=').map_or(value, |(base, _)| base)
        };
        schema.values = Some(type_ref(value, ""));
        return schema;
    }
    if let Some((base, _)) = ty.split_once('=') {
        let mut schema = inline_type(base, "");
        schema.go = go_text(ty);
        return schema;
    }
    unreachable!("the type table names an unknown type: {ty}")
}

/// `[]core.v1.Container` → `[]v1.Container`; a name after `=` wins.
fn go_text(ty: &'static str) -> Cow<'static, str> {
    if let Some((base, name)) = ty.split_once('=') {
        let list = base.strip_prefix("[]").is_some_and(|item| item == "string");
        return if list { Cow::Owned(format!("[]{name}")) } else { Cow::Borrowed(name) };
    }
    let start = ty.rfind(']').map_or(0, |at| at + 1);
    let (prefix, base) = ty.split_at(start);
    match SCALARS.iter().find(|(name, ..)| *name == base) {
        Some((_, _, go)) => Cow::Owned(format!("{prefix}{go}")),
        None => Cow::Owned(format!("{prefix}{}", go_name(base))),
    }
}

/// The last two parts of a definition name: `v1.Container`.
fn go_name(name: &str) -> String {
    let mut parts = name.rsplitn(3, '.');
    let last = parts.next().unwrap_or("");
    let version = parts.next().unwrap_or("");
    format!("{version}.{last}")
}

fn long_name(ty: &str) -> String {
    for (short, long) in SHORT {
        if let Some(rest) = ty.strip_prefix(short) {
            return format!("{long}{rest}");
        }
    }
    format!("io.k8s.api.{ty}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_of_the_table_parses() {
        for name in definitions() {
            let schema = by_name(name).expect("listed");
            for field in &schema.fields {
                let _ = field.schema.get();
                assert!(schema.field(&field.name).is_some(), "{name}.{}", field.name);
            }
        }
    }

    /// The types that a busy server asks for, all of them at worst, are a small part of its memory.
    #[test]
    fn all_types_take_little_memory() {
        fn size(schema: &Schema) -> usize {
            let mut bytes =
                size_of::<Schema>() + schema.wire.len() * size_of::<Wire>() + schema.fields.len() * size_of::<u16>();
            for field in &schema.fields {
                bytes += size_of::<Field>();
                if let SchemaRef::Inline(inner) = &field.schema {
                    // Shared nodes are counted by each who shares them, so this is an upper bound.
                    bytes += size(inner);
                }
            }
            bytes
        }
        let total: usize = definitions().filter_map(by_name).map(|schema| size(&schema)).sum();
        assert!(total < 4 << 20, "{total} bytes");
    }

    #[test]
    fn a_container_is_described_whole() {
        let pod = Schema::builtin("io.k8s.api.core.v1.Pod").expect("pod");
        let containers = pod.descend("spec.containers").expect("containers");
        assert_eq!(containers.list, ListType::Map(vec![Cow::Borrowed("name")]));
        assert_eq!(containers.go, "[]v1.Container");
        let ports = pod.descend("spec.containers.ports").expect("ports");
        assert_eq!(ports.list, ListType::Map(vec![Cow::Borrowed("containerPort"), Cow::Borrowed("protocol")]));
        let port = ports.items.as_ref().expect("items").get();
        assert_eq!(port.field("protocol").expect("protocol").default, Some("TCP".into()));
        assert_eq!(pod.descend("spec.volumes.configMap.name").expect("inlined twice").kind, Kind::String);
        assert_eq!(pod.descend("spec.restartPolicy").expect("named").go, "v1.RestartPolicy");
        assert_eq!(enum_values("core.v1.PullPolicy"), Some(vec!["Always", "IfNotPresent", "Never"]));
        assert!(pod.descend("spec.affinity.nope").is_none());
    }
}
