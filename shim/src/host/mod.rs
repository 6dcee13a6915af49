//! The kernel of the node: cgroups, child processes, id maps, private directories, and the journal
//! of what to undo.

pub(crate) mod block_io;
pub(crate) mod capacity;
pub(crate) mod cgroup;
pub(crate) mod child;
pub(crate) mod clock;
pub(crate) mod id_map;
pub(crate) mod journal;
pub(crate) mod limits;
pub(crate) mod placement;
pub(crate) mod private;
pub(crate) mod scope;
