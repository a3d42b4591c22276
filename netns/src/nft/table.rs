//! What a table of ours holds, and the smallest change that brings the kernel there.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::encode::Transaction;
use super::expression::{BaseChain, Rule};
use super::set::{Element, SetSpec, Value};
use crate::Family;

/// A name of a set or chain.
pub(crate) type Name = Arc<str>;

/// A chain: base chains are part of the layout, others come and go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) base: Option<BaseChain>,
    pub(crate) rules: Vec<Rule>,
}

/// A set and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    pub(crate) spec: SetSpec,
    pub(crate) elements: HashMap<Element, Value>,
}

/// A table as the kernel is to have it. Changes are collected until [`Table::change`].
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) family: Family,
    name: String,
    pub(crate) chains: BTreeMap<Name, Chain>,
    pub(crate) sets: BTreeMap<Name, Set>,
    /// What the kernel has where that differs: `None` is nothing.
    old_chains: BTreeMap<Name, Option<Chain>>,
    old_sets: BTreeMap<Name, bool>,
    old_elements: BTreeMap<Name, HashMap<Element, Option<Value>>>,
    /// What the kernel has does not matter: the table is going to be replaced.
    replaced: bool,
}

impl Table {
    /// An empty table.
    pub(crate) fn new(family: Family, name: &str) -> Self {
        Self {
            family,
            name: name.into(),
            chains: BTreeMap::new(),
            sets: BTreeMap::new(),
            old_chains: BTreeMap::new(),
            old_sets: BTreeMap::new(),
            old_elements: BTreeMap::new(),
            replaced: true,
        }
    }

    /// Puts a chain in place, or removes it.
    pub(crate) fn set_chain(&mut self, name: &str, chain: Option<Chain>) {
        if self.chains.get(name) == chain.as_ref() {
            return;
        }
        let name: Name = name.into();
        let old = match chain {
            Some(chain) => self.chains.insert(name.clone(), chain),
            None => self.chains.remove(&name),
        };
        self.old_chains.entry(name).or_insert(old);
    }

    /// Puts a set in place, or removes it with what is in it.
    pub(crate) fn set_set(&mut self, name: &str, spec: Option<SetSpec>) {
        let name: Name = name.into();
        let had = self.sets.contains_key(&name);
        match spec {
            Some(_) if had => return,
            Some(spec) => {
                self.sets.insert(name.clone(), Set { spec, elements: HashMap::new() });
            }
            None => {
                self.sets.remove(&name);
                self.old_elements.remove(&name);
            }
        }
        self.old_sets.entry(name).or_insert(had);
    }

    /// Puts an element in place, or removes it. The set must exist.
    pub(crate) fn set_element(&mut self, set: &str, element: Element, value: Option<Value>) {
        let elements = &mut self.sets.get_mut(set).expect("sets are made before their elements").elements;
        if elements.get(&element) == value.as_ref() {
            return;
        }
        let old = match value {
            Some(value) => elements.insert(element.clone(), value),
            None => elements.remove(&element),
        };
        if self.replaced {
            return;
        }
        match self.old_elements.get_mut(set) {
            Some(known) => {
                known.entry(element).or_insert(old);
            }
            None => {
                self.old_elements.insert(set.into(), HashMap::from([(element, old)]));
            }
        }
    }

    /// The change from what the kernel has to what it should have, as one transaction; call [`Table::committed`] once it is carried out.
    pub(crate) fn change(&self) -> Transaction {
        let mut change = Transaction::new(self.family, &self.name);
        for (number, name) in (1..).zip(self.old_sets.iter().filter(|(_, had)| !**had).map(|(name, _)| name)) {
            if let Some(set) = self.sets.get(name) {
                change.add_set(name, number, &set.spec);
            }
        }
        for (name, old) in &self.old_chains {
            if let Some(chain) = self.chains.get(name) {
                match old {
                    None => change.add_chain(name, chain.base),
                    Some(_) => change.flush_chain(name),
                }
            }
        }
        for name in self.old_chains.keys() {
            for rule in self.chains.get(name).iter().flat_map(|chain| &chain.rules) {
                change.add_rule(name, rule);
            }
        }
        for (set, changed) in &self.old_elements {
            let Some(now) = self.sets.get(set).map(|set| &set.elements) else { continue };
            let replaced = changed.iter().filter(|(element, old)| old.is_some() && now.get(*element) != old.as_ref());
            change.delete_elements(set, replaced.map(|(element, _)| element));
            let added = changed.iter().filter_map(|(element, old)| {
                now.get(element).filter(|value| old.as_ref() != Some(value)).map(|value| (element, value))
            });
            change.add_elements(set, added);
        }
        // Chains go last, when no element leads to them any more; two that go may lead to each other, so their rules go first.
        let gone = || {
            self.old_chains
                .iter()
                .filter(|(name, old)| old.is_some() && !self.chains.contains_key(*name))
                .map(|(name, _)| name)
        };
        gone().for_each(|name| change.flush_chain(name));
        gone().for_each(|name| change.delete_chain(name));
        for (name, _) in self.old_sets.iter().filter(|(name, had)| **had && !self.sets.contains_key(*name)) {
            change.delete_set(name);
        }
        change
    }

    /// The change that replaces whatever table of the name the kernel has, as one transaction.
    pub(crate) fn replacement(&self) -> Transaction {
        let mut change = Transaction::new(self.family, &self.name);
        change.add_table();
        change.delete_table();
        change.add_table();
        for (number, (name, set)) in (1..).zip(&self.sets) {
            change.add_set(name, number, &set.spec);
        }
        for (name, chain) in &self.chains {
            change.add_chain(name, chain.base);
        }
        for (name, chain) in &self.chains {
            chain.rules.iter().for_each(|rule| change.add_rule(name, rule));
        }
        for (name, set) in &self.sets {
            change.add_elements(name, &set.elements);
        }
        change
    }

    /// The table is going to be replaced: no differences are kept until then.
    pub(crate) fn replace(&mut self) {
        self.committed();
        self.replaced = true;
    }

    /// The kernel has what it should have.
    pub(crate) fn committed(&mut self) {
        self.replaced = false;
        self.old_chains.clear();
        self.old_sets.clear();
        self.old_elements.clear();
    }
}
