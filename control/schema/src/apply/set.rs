//! Field sets: which paths of an object somebody owns (`fieldsV1`).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::gofmt;

/// Deepest path in a set that comes from outside.
const MAX_DEPTH: usize = 100;

/// A step of a path in its encoded form: `f:name`, `k:{"name":"a"}`, `v:"x"` or `i:0`.
pub(super) type Element = String;

/// A set of paths, as a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set(pub(super) BTreeMap<Element, Node>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// The path that ends here is in the set.
    pub(super) member: bool,
    pub(super) children: Set,
}

impl Set {
    pub(super) fn insert(&mut self, path: &[Element]) {
        let Some((last, parents)) = path.split_last() else {
            return;
        };
        let mut here = self;
        for step in parents {
            if !here.0.contains_key(step) {
                here.0.insert(step.clone(), Node::default());
            }
            let Some(node) = here.0.get_mut(step) else {
                return;
            };
            here = &mut node.children;
        }
        here.0.entry(last.clone()).or_default().member = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.values().all(|node| !node.member && node.children.is_empty())
    }

    #[must_use]
    pub(super) fn union(mut self, other: &Self) -> Self {
        for (step, theirs) in &other.0 {
            match self.0.get_mut(step) {
                Some(ours) => {
                    ours.member |= theirs.member;
                    ours.children = std::mem::take(&mut ours.children).union(&theirs.children);
                }
                None => {
                    self.0.insert(step.clone(), theirs.clone());
                }
            }
        }
        self
    }

    /// The paths that are not in `other`.
    #[must_use]
    pub(super) fn minus(mut self, other: &Self) -> Self {
        for (step, theirs) in &other.0 {
            if let Some(ours) = self.0.get_mut(step) {
                ours.member &= !theirs.member;
                ours.children = std::mem::take(&mut ours.children).minus(&theirs.children);
            }
        }
        self.trimmed()
    }

    /// The paths that neither are in `other` nor lie below one of its paths.
    #[must_use]
    pub(super) fn minus_deep(mut self, other: &Self) -> Self {
        for (step, theirs) in &other.0 {
            if theirs.member {
                self.0.remove(step);
            } else if let Some(ours) = self.0.get_mut(step) {
                ours.children = std::mem::take(&mut ours.children).minus_deep(&theirs.children);
            }
        }
        self.trimmed()
    }

    #[must_use]
    pub(super) fn intersection(&self, other: &Self) -> Self {
        let mut both = Self::default();
        for (step, ours) in &self.0 {
            if let Some(theirs) = other.0.get(step) {
                let node = Node {
                    member: ours.member && theirs.member,
                    children: ours.children.intersection(&theirs.children),
                };
                both.0.insert(step.clone(), node);
            }
        }
        both.trimmed()
    }

    fn trimmed(mut self) -> Self {
        self.0.retain(|_, node| node.member || !node.children.0.is_empty());
        self
    }

    /// Every path of the set, as the server prints it: `.spec.containers[name="a"].image`.
    pub(super) fn paths(&self) -> Vec<String> {
        fn walk(set: &Set, prefix: &str, paths: &mut Vec<String>) {
            for (step, _) in set.0.iter().filter(|(_, node)| node.member) {
                paths.push(format!("{prefix}{}", printed(step)));
            }
            for (step, node) in &set.0 {
                walk(&node.children, &format!("{prefix}{}", printed(step)), paths);
            }
        }
        let mut paths = Vec::new();
        walk(self, "", &mut paths);
        paths
    }

    /// As `fieldsV1`.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        for (step, node) in &self.0 {
            let mut inner = node.children.to_json();
            if let (true, false, Value::Object(inner)) = (node.member, node.children.0.is_empty(), &mut inner) {
                inner.insert(".".into(), Value::Object(Map::new()));
            }
            map.insert(step.clone(), inner);
        }
        Value::Object(map)
    }

    /// From `fieldsV1`; `None` if it is none.
    pub fn from_json(value: &Value) -> Option<Self> {
        Self::read(value, 0)
    }

    fn read(value: &Value, depth: usize) -> Option<Self> {
        let mut set = Self::default();
        if depth > MAX_DEPTH {
            return None;
        }
        for (step, inner) in value.as_object()? {
            if step == "." {
                continue;
            }
            let step = match step.split_at_checked(2)? {
                ("f:", _) => step.clone(),
                ("i:", index) => format!("i:{}", index.parse::<i64>().ok()?),
                (prefix @ ("k:" | "v:"), text) => {
                    format!("{prefix}{}", serde_json::from_str::<Value>(text).ok()?)
                }
                _ => return None,
            };
            let entries = inner.as_object()?;
            let member = entries.is_empty() || entries.contains_key(".");
            set.0.insert(step, Node { member, children: Self::read(inner, depth + 1)? });
        }
        Some(set)
    }
}

/// One step as the server prints it.
pub(super) fn printed(step: &str) -> String {
    let (prefix, rest) = step.split_at_checked(2).unwrap_or(("", step));
    let mut text = String::new();
    match prefix {
        "f:" => {
            text.push('.');
            text.push_str(rest);
        }
        "k:" => {
            text.push('[');
            if let Ok(Value::Object(keys)) = serde_json::from_str(rest) {
                for (i, (name, value)) in keys.iter().enumerate() {
                    if i > 0 {
                        text.push(',');
                    }
                    text.push_str(name);
                    text.push('=');
                    gofmt::value_into(&mut text, value);
                }
            }
            text.push(']');
        }
        "v:" => {
            text.push_str("[=");
            if let Ok(value) = serde_json::from_str(rest) {
                gofmt::value_into(&mut text, &value);
            }
            text.push(']');
        }
        _ => write!(text, "[{rest}]").expect("writing to a String cannot fail"),
    }
    text
}
