//! What printer columns say of themselves. Columns that show a field carry the field's own description.

use std::collections::HashMap;
use std::sync::OnceLock;

/// group, resource, column, description; `*` for any.
const DESCRIPTIONS: &str = include_str!("descriptions.tsv");

/// What a printer column of a built-in kind shows.
pub(crate) fn description(group: &str, resource: &str, column: &str) -> &'static str {
    static TABLE: OnceLock<HashMap<String, String>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let parts = |line: &'static str| {
            let (kind, rest) = line.split_once('\t')?;
            let (column, text) = rest.split_once('\t')?;
            Some((format!("{kind}\t{column}"), text.replace("\\n", "\n")))
        };
        DESCRIPTIONS.lines().filter(|line| !line.starts_with('#')).filter_map(parts).collect()
    });
    let of_kind = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
    let found = table.get(&format!("{of_kind}\t{column}")).or_else(|| table.get(&format!("*\t{column}")));
    found.map(String::as_str).unwrap_or_default()
}
