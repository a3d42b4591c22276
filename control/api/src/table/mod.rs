//! `meta.k8s.io/v1` Tables: what `kubectl get` prints.

/// What a printer column of a built-in kind shows.
pub(crate) fn description(_group: &str, _resource: &str, _column: &str) -> &'static str {
    ""
}
