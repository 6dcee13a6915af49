//! The VMM of a pod: how it is started, described and controlled, and the templates that pods start
//! from.

pub(crate) mod client;
pub(crate) mod launch;
pub(crate) mod size;
pub(crate) mod template;
pub(crate) mod template_maker;
