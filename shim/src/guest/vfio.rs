//! Device nodes of VFIO as a container's specification names them.

use std::path::Path;

/// Node of the host that gives functions memory without groups, where the kernel has it.
pub(crate) const IOMMUFD: &str = "/dev/iommu";

/// Whether a device's path is one of VFIO's, and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VfioPath {
    /// `/dev/vfio/vfio` or `/dev/iommu`, which come along with functions and say nothing.
    Container,
    /// `/dev/vfio/<group>`.
    Group(u32),
    /// `/dev/vfio/devices/vfio<number>`, a function's own.
    Device(u32),
    /// `/dev/vfio/noiommu-<group>` and whatever else may come.
    Other,
}

impl VfioPath {
    /// Reads a path; `None` when it has nothing to do with VFIO.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        if path == Path::new(IOMMUFD) {
            return Some(Self::Container);
        }
        let name = path.strip_prefix("/dev/vfio").ok()?.to_str()?;
        let device = name.strip_prefix("devices/vfio").map(str::parse);
        Some(match (name, device) {
            ("vfio", _) => Self::Container,
            (_, Some(Ok(number))) => Self::Device(number),
            _ => name.parse().map_or(Self::Other, Self::Group),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_vfio_are_known() {
        let of = |path: &str| VfioPath::of(Path::new(path));
        assert_eq!(of("/dev/vfio/vfio"), Some(VfioPath::Container));
        assert_eq!(of("/dev/vfio/12"), Some(VfioPath::Group(12)));
        assert_eq!(of("/dev/vfio/noiommu-0"), Some(VfioPath::Other));
        assert_eq!(of("/dev/vfio/devices/vfio0"), Some(VfioPath::Device(0)));
        assert_eq!(of("/dev/vfio/devices/noiommu-vfio0"), Some(VfioPath::Other));
        assert_eq!(of("/dev/iommu"), Some(VfioPath::Container));
        assert_eq!(of("/dev/vfiox"), None);
        assert_eq!(of("/dev/null"), None);
    }
}
