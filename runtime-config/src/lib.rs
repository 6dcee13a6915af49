//! The operator's file, its drop-ins and a pod's annotations become one validated value.
//!
//! ```text
//! keys.rs (the table) ─┬─> Settings, the typed value
//!                      ├─> docs/reference.md and the commented example
//!                      └─> the names that a pod may override
//!
//! config.toml, config.d/*.toml ── raw.rs ──> layers ── load.rs ──> Config
//! a pod's annotations ── annotations.rs ──> PodConfig ── sizing.rs ──> Sizing
//! ```
//!
//! Every setting is declared once, in [`keys`]. Parsing is pure: [`raw`] and [`annotations`] take
//! text and give values and positions; only [`load`] reads files. Layers are laid one over the
//! other in this order, and the later one wins: defaults, the file, drop-ins by name, the flavour
//! that the runtime handler chose, the pod's annotations.

pub mod annotations;
pub mod choice;
pub mod config;
pub mod keys;
pub mod kind;
pub mod load;
pub mod nearest;
pub mod options;
pub mod pci;
pub mod problem;
pub mod raw;
pub mod reference;
pub mod sizing;
mod table;

pub use annotations::{ANNOTATION_PREFIX, AnnotationError};
pub use choice::{CpuModel, HugePages, LogLevel, TemplateUse, VirtiofsCache};
pub use config::{Config, FlavourError, PodConfig};
pub use keys::{KEYS, Settings, Storage, Vm};
pub use kind::CpuFeature;
pub use load::LoadError;
pub use options::RuntimeOptions;
pub use pci::{DeviceResource, PciAddress, PciSelector, is_vfio_driver};
pub use sizing::{
    CPU_PERIOD_ANNOTATION, CPU_QUOTA_ANNOTATION, CPU_SHARES_ANNOTATION, Demand, HostCapacity,
    MEMORY_ANNOTATION, Sizing, SizingError,
};
