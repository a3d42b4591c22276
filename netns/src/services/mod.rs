//! Services: from the model to rules. [`compile`] says which addresses lead where, [`balance`] which chain does the choosing, [`layout`] what is the
//! same for every state, and [`proxy`] keeps a table in step with the model.

pub(crate) mod balance;
pub(crate) mod compile;
pub(crate) mod health;
pub(crate) mod keys;
pub(crate) mod layout;
pub(crate) mod proxy;

#[cfg(test)]
mod tests;
