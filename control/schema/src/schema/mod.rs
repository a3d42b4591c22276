//! The schema IR: one immutable description of a type, for built-in kinds and custom resources alike.
//!
//! A [`Schema`] is a node. Children are [`SchemaRef`]s: inline nodes, or named built-in definitions that are read from the
//! compact type table on first use (so an idle server holds only the types that somebody asked for).

mod builtin;
pub mod crd;
mod gvk;

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::Value;

pub use builtin::{definitions, enum_values};
pub use gvk::{definition_for, group_of, group_versions};

use crate::validate::Checks;

/// A type as the API sees it.
#[derive(Debug)]
pub struct Schema {
    /// Definition name, `io.k8s.api.core.v1.Container`; empty for an inline node.
    pub name: &'static str,
    /// How decoding errors name the type: `v1.Container`, `[]string`; empty for custom resources.
    pub go: Cow<'static, str>,
    pub kind: Kind,
    pub nullable: bool,
    /// Known fields in declaration order; see [`Schema::field`] to look one up.
    pub fields: Vec<Field>,
    /// Positions in `fields`, sorted by name.
    index: Vec<u16>,
    /// Schema of a map's values (`additionalProperties`).
    pub values: Option<SchemaRef>,
    /// Schema of a list's items.
    pub items: Option<SchemaRef>,
    pub list: ListType,
    /// A map or struct that server-side apply owns and replaces whole.
    pub atomic: bool,
    /// Unknown fields are kept (`x-kubernetes-preserve-unknown-fields`).
    pub preserve_unknown: bool,
    /// An object with `apiVersion`, `kind`, `metadata` of its own (`x-kubernetes-embedded-resource`).
    pub embedded: bool,
    pub default: Option<Value>,
    /// Value checks of a custom resource's schema; built-ins are checked by their kind's own code.
    pub checks: Option<Box<Checks>>,
    /// Protobuf fields in declaration order; empty when there is no wire form.
    pub(crate) wire: Vec<Wire>,
}

/// The shapes a value can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Anything at all.
    Any,
    /// A struct (`fields`), a map (`values`) or, in custom resources, both.
    Object,
    List,
    String,
    /// Base64 text in JSON.
    Bytes,
    Bool,
    Int32,
    Int64,
    Float,
    IntOrString,
    Quantity,
    /// RFC 3339, seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    /// Text such as `1h30m`.
    Duration,
    /// Any object, kept as it is (`RawExtension`).
    Raw,
    /// A field set of managed fields.
    FieldsV1,
    /// Any JSON value (`apiextensions` `JSON`).
    Json,
    /// `JSONSchemaPropsOrBool`; `items` is the schema.
    SchemaOrBool,
    /// `JSONSchemaPropsOrArray`; `items` is the schema.
    SchemaOrArray,
    /// `JSONSchemaPropsOrStringArray`; `items` is the schema.
    SchemaOrStrings,
    /// A list of strings that is a message of its own on the wire (`ExtraValue`, `Verbs`).
    StringList,
}

/// How server-side apply merges a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ListType {
    #[default]
    Atomic,
    Set,
    /// Items are identified by these fields.
    Map(Vec<Cow<'static, str>>),
}

/// One field of an object.
#[derive(Debug)]
pub struct Field {
    pub name: Cow<'static, str>,
    pub schema: SchemaRef,
    /// Listed under `required` in OpenAPI.
    pub required: bool,
    /// May be absent apart from its zero value.
    pub pointer: bool,
    pub omit: Omit,
    /// The field's own `mapType`/`structType` is atomic.
    pub atomic: bool,
    pub patch: Patch,
    pub default: Option<Value>,
}

/// When a built-in's field is left out of the encoded object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Omit {
    /// Always written; an absent slice, map or pointer is `null`.
    Never,
    /// Left out when empty; a struct is never empty.
    Empty,
    /// Left out when zero, structs included.
    Zero,
}

/// Strategic merge patch behaviour of a field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    pub merge: bool,
    pub replace: bool,
    pub retain_keys: bool,
    /// Field that identifies a list item; empty for lists of scalars.
    pub merge_key: &'static str,
}

/// A child of a schema node.
#[derive(Clone, Debug)]
pub enum SchemaRef {
    Inline(Arc<Schema>),
    /// Position in the built-in type table.
    Builtin(u16),
}

impl SchemaRef {
    pub fn get(&self) -> &Schema {
        match self {
            Self::Inline(schema) => schema,
            Self::Builtin(id) => builtin::by_id(*id),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) number: u32,
    pub(crate) slot: Slot,
}

#[derive(Debug)]
pub(crate) enum Slot {
    /// A position in `fields`.
    Field(u16),
    /// A nested message whose fields stand inline in JSON.
    Inline(SchemaRef),
}

impl Schema {
    /// A built-in definition by its OpenAPI name, `io.k8s.api.core.v1.Pod`.
    pub fn builtin(name: &str) -> Option<Arc<Self>> {
        builtin::by_name(name)
    }

    /// A node of the given kind with nothing else said.
    pub fn of(kind: Kind) -> Self {
        Self {
            name: "",
            go: Cow::Borrowed(""),
            kind,
            nullable: false,
            fields: Vec::new(),
            index: Vec::new(),
            values: None,
            items: None,
            list: ListType::Atomic,
            atomic: false,
            preserve_unknown: false,
            embedded: false,
            default: None,
            checks: None,
            wire: Vec::new(),
        }
    }

    /// Looks a field up by its JSON name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        let at = self.index.binary_search_by(|&i| self.fields[usize::from(i)].name.as_ref().cmp(name)).ok()?;
        Some(&self.fields[usize::from(self.index[at])])
    }

    /// The schema of what stands under `name` in an object: the field's, or the map's values'.
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.field(name).map(|field| field.schema.get()).or_else(|| self.values.as_ref().map(SchemaRef::get))
    }

    /// A struct: named fields and no others.
    pub fn is_struct(&self) -> bool {
        self.kind == Kind::Object && self.values.is_none()
    }

    /// A map from any string to one schema.
    pub fn is_map(&self) -> bool {
        self.kind == Kind::Object && self.values.is_some() && self.fields.is_empty()
    }

    /// Follows `path` (`spec.template.spec.containers`) through fields, map values and list items.
    pub fn descend(&self, path: &str) -> Option<&Self> {
        let mut here = self;
        for part in path.split('.').filter(|part| !part.is_empty()) {
            while let (Kind::List, Some(items)) = (here.kind, &here.items) {
                here = items.get();
            }
            here = here.child(part)?;
        }
        Some(here)
    }

    pub(crate) fn set_fields(&mut self, fields: Vec<Field>) {
        let count =
            u16::try_from(fields.len()).expect("a type has fewer than 65,536 fields: the decoders bound objects");
        let mut index: Vec<u16> = (0..count).collect();
        index.sort_unstable_by(|&a, &b| fields[usize::from(a)].name.cmp(&fields[usize::from(b)].name));
        self.fields = fields;
        self.index = index;
    }
}
