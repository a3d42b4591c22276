//! Which definitions get their names: the first come in a group has them, later ones that clash wait.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::object;

/// What becomes of one definition.
pub(super) struct Verdict {
    /// Served.
    pub(super) established: bool,
    /// Names that it has.
    pub(super) accepted: Value,
    /// Why its names are refused: reason and sentence.
    clash: Option<(&'static str, String)>,
    /// Whether it is being deleted.
    terminating: bool,
    /// Whether it has been established before, so that it stays so.
    was: bool,
}

impl Verdict {
    /// `NamesAccepted`, `Established` and, when it goes, `Terminating`.
    pub(super) fn conditions(&self) -> Vec<Value> {
        let condition = |kind: &str, yes: bool, reason: &str, message: &str| json!({"type": kind, "status": if yes { "True" } else { "False" }, "reason": reason, "message": message});
        let mut all = match &self.clash {
            None => vec![condition("NamesAccepted", true, "NoConflicts", "no conflicts found")],
            Some((reason, message)) => vec![condition("NamesAccepted", false, reason, message)],
        };
        all.push(match (self.established, self.was) {
            (true, _) | (_, true) => {
                condition("Established", true, "InitialNamesAccepted", "the initial names have been accepted")
            }
            _ => condition("Established", false, "NotAccepted", "not all names are accepted"),
        });
        if self.terminating {
            all.push(condition(
                "Terminating",
                true,
                "InstanceDeletionPending",
                "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
            ));
        }
        all
    }
}

/// Judges all definitions together; those that are established keep what they have.
pub(super) fn judge(definitions: &[(u64, Value)]) -> Vec<Verdict> {
    // group and word → the definition that has it.
    let mut taken: HashMap<(String, String), String> = HashMap::new();
    let mut kinds: HashMap<(String, String), String> = HashMap::new();
    let mut order: Vec<usize> = (0..definitions.len()).collect();
    let established = |definition: &Value| {
        let conditions = definition.pointer("/status/conditions").and_then(Value::as_array);
        conditions.into_iter().flatten().any(|c| c["type"] == "Established" && c["status"] == "True")
    };
    order.sort_by_key(|&at| {
        let definition = &definitions[at].1;
        (
            !established(definition),
            object::text(definition, "/metadata/creationTimestamp").to_owned(),
            definitions[at].0,
        )
    });
    let mut verdicts: Vec<Option<Verdict>> = definitions.iter().map(|_| None).collect();
    for at in order {
        let definition = &definitions[at].1;
        let group = object::text(definition, "/spec/group").to_owned();
        let me = object::name(definition).to_owned();
        let names = definition.pointer("/spec/names").cloned().unwrap_or_default();
        let mut clash = None;
        let mut words = vec![object::text(&names, "/plural").to_owned(), object::text(&names, "/singular").to_owned()];
        words
            .extend(names["shortNames"].as_array().into_iter().flatten().filter_map(|n| n.as_str().map(str::to_owned)));
        for (word, reason) in words
            .iter()
            .zip(["PluralConflict", "SingularConflict"].into_iter().chain(std::iter::repeat("ShortNamesConflict")))
        {
            if taken.get(&(group.clone(), word.clone())).is_some_and(|owner| *owner != me) {
                clash = Some((reason, format!("{word:?} is already in use")));
            }
        }
        for member in ["kind", "listKind"] {
            let kind = object::text(&names, &format!("/{member}")).to_owned();
            if kinds.get(&(group.clone(), kind.clone())).is_some_and(|owner| *owner != me) {
                let reason = if member == "kind" { "KindConflict" } else { "ListKindConflict" };
                clash = Some((reason, format!("{kind:?} is already in use")));
            }
        }
        let was = established(definition);
        let accepted = if clash.is_none() {
            for word in words.into_iter().filter(|word| !word.is_empty()) {
                taken.insert((group.clone(), word), me.clone());
            }
            for member in ["kind", "listKind"] {
                kinds.insert((group.clone(), object::text(&names, &format!("/{member}")).to_owned()), me.clone());
            }
            names
        } else {
            definition.pointer("/status/acceptedNames").cloned().unwrap_or_else(|| json!({"plural": "", "kind": ""}))
        };
        let terminating = definition.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string);
        verdicts[at] = Some(Verdict { established: clash.is_none() || was, accepted, clash, terminating, was });
    }
    verdicts.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_has_the_name() {
        let definition = |name: &str, short: &str, time: &str| {
            json!({
                "metadata": {"name": name, "creationTimestamp": time},
                "spec": {"group": "g", "names": {"plural": name, "singular": format!("{name}x"), "kind": name, "listKind": format!("{name}List"), "shortNames": [short]}},
            })
        };
        let all =
            [(2, definition("b", "s", "2024-01-02T00:00:00Z")), (1, definition("a", "s", "2024-01-01T00:00:00Z"))];
        let verdicts = judge(&all);
        assert!(verdicts[1].established && !verdicts[0].established);
        assert_eq!(verdicts[0].conditions()[0]["reason"], "ShortNamesConflict");
    }
}
