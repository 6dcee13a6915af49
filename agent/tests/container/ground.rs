//! The parts of the agent's ground floor that the builder uses.

#[expect(dead_code, reason = "the storages and the helper use the rest")]
#[path = "../../src/ground/beneath.rs"]
pub(crate) mod beneath;
#[path = "../../src/ground/ids.rs"]
pub(crate) mod ids;
#[path = "../../src/ground/sysctls.rs"]
pub(crate) mod sysctls;

pub(crate) mod paths {
    /// The agent's program: this one is the tests'.
    pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_pericarp-agent");
}
