//! What the tests stand on: the test node, and the checks of the repository itself.

pub mod node;
