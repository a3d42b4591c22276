//! Label selectors and node selectors, brought into a form that is quick to compare and to ask.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub(crate) type Labels = BTreeMap<String, String>;

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    Gt,
    Lt,
    /// One that validation never lets in.
    Never,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

impl Requirement {
    fn new(key: &str, operator: &str, values: Option<&Vec<String>>) -> Self {
        let operator = match operator {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            "Gt" => Operator::Gt,
            "Lt" => Operator::Lt,
            _ => Operator::Never,
        };
        Self { key: key.to_owned(), operator, values: values.cloned().unwrap_or_default() }
    }

    fn holds(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|listed| listed == value);
        let compare = |wanted| {
            let numbers = value.and_then(|value| value.parse::<i64>().ok()).zip(self.values.first()?.parse().ok());
            Some(numbers?.0.cmp(&numbers?.1) == wanted)
        };
        match self.operator {
            Operator::In => value.is_some_and(listed),
            Operator::NotIn => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt => compare(std::cmp::Ordering::Greater) == Some(true),
            Operator::Lt => compare(std::cmp::Ordering::Less) == Some(true),
            Operator::Never => false,
        }
    }
}

/// A label selector: all its requirements must hold, so none means everything.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub(crate) struct Selector(Vec<Requirement>);

impl Selector {
    pub(crate) fn new(selector: &LabelSelector) -> Self {
        let mut all = Self::of_map(selector.match_labels.iter().flatten());
        for requirement in selector.match_expressions.iter().flatten() {
            all.0.push(Requirement::new(&requirement.key, &requirement.operator, requirement.values.as_ref()));
        }
        all
    }

    pub(crate) fn of_map<'a>(pairs: impl Iterator<Item = (&'a String, &'a String)>) -> Self {
        let one = |(key, value): (&String, &String)| Requirement {
            key: key.clone(),
            operator: Operator::In,
            values: vec![value.clone()],
        };
        Self(pairs.map(one).collect())
    }

    /// Narrows the selector to labels that have (or, `wanted` false, lack) this value.
    pub(crate) fn narrow(&mut self, key: &str, value: &str, wanted: bool) {
        let operator = if wanted { Operator::In } else { Operator::NotIn };
        let requirement = Requirement { key: key.to_owned(), operator, values: vec![value.to_owned()] };
        if !self.0.contains(&requirement) {
            self.0.push(requirement);
        }
    }

    /// Adds the requirements of another selector.
    pub(crate) fn join(&mut self, other: Self) {
        for requirement in other.0 {
            if !self.0.contains(&requirement) {
                self.0.push(requirement);
            }
        }
    }

    /// Whether it selects everything.
    pub(crate) fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.holds(labels.get(&requirement.key).map(String::as_str)))
    }
}

/// A term of a node selector: labels and fields; one without requirements matches nothing.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(crate) struct NodeTerm {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

impl NodeTerm {
    pub(crate) fn new(term: &NodeSelectorTerm) -> Self {
        let all = |list: &Option<Vec<NodeSelectorRequirement>>| {
            let one = |r: &NodeSelectorRequirement| Requirement::new(&r.key, &r.operator, r.values.as_ref());
            list.iter().flatten().map(one).collect()
        };
        Self { labels: all(&term.match_expressions), fields: all(&term.match_fields) }
    }

    pub(crate) fn matches(&self, name: &str, labels: &Labels) -> bool {
        if self.labels.is_empty() && self.fields.is_empty() {
            return false;
        }
        self.labels.iter().all(|requirement| requirement.holds(labels.get(&requirement.key).map(String::as_str)))
            && self.fields.iter().all(|field| field.key == "metadata.name" && field.holds(Some(name)))
    }

    /// The names of the only nodes that can match, if the term names them.
    pub(crate) fn names(&self) -> Option<&[String]> {
        let named = |field: &&Requirement| field.key == "metadata.name" && field.operator == Operator::In;
        self.fields.iter().find(named).map(|field| field.values.as_slice())
    }
}

/// Whether any of the terms matches a node.
pub(crate) fn any_matches(terms: &[NodeTerm], name: &str, labels: &Labels) -> bool {
    terms.iter().any(|term| term.matches(name, labels))
}
