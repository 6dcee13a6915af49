//! What the tests stand on: the test node, pods in it, and the checks of the repository itself.

pub mod bars;
pub mod node;
pub mod pods;
pub mod verbs;
