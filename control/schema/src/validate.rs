//! Value checks of custom resources' schemas.

/// The value checks of one schema node.
#[derive(Debug, Default)]
pub struct Checks {}
