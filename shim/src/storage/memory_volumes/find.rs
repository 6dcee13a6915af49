//! Which paths of the host lie in a pod's `emptyDir` volume in memory: pure functions over the
//! text of mountinfo (proc_pid_mountinfo(5)).
//!
//! kubelet mounts such a volume at `<root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>`, and
//! for a `subPath` binds the directory in it to
//! `<root>/pods/<uid>/volume-subpaths/<name>/<container>/<index>`. Secrets, ConfigMaps and tokens
//! are on tmpfs too, beneath the names of other plugins: they are the host's to change.

use std::path::{Component, Path, PathBuf};

use crate::storage::{
    kubelet::EMPTY_DIR,
    mountinfo::{self, Mount, plain},
};

/// What the agent takes of a mount's options; the others are the kernel's defaults.
const OPTIONS: [&str; 6] = ["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"];

/// A place in a volume in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Where the volume is mounted.
    pub(super) volume: PathBuf,
    /// The way from there; empty for the volume itself.
    pub(super) beneath: PathBuf,
    /// Options of the mount by which the place was named, where that is not the volume's own.
    pub(super) bind: Option<Vec<String>>,
    /// Options of the volume's own mount.
    pub(super) options: Vec<String>,
    /// The size of the volume when it has one of its own; 0 is none at all.
    pub(super) size_bytes: Option<u64>,
    /// Every place in the volume that is mounted somewhere else too: kubelet made them.
    pub(super) mounted: Vec<PathBuf>,
}

/// Whether `path` can lie in a volume of the pod with this `uid` at all.
pub(super) fn is_candidate(path: &Path, uid: &str) -> bool {
    let names = names(path);
    let mut pairs = names.windows(3);
    pairs.any(|three| {
        three[..2] == ["pods", uid] && three[2] == "volume-subpaths"
            || three[..2] == [uid, "volumes"] && three[2] == EMPTY_DIR
    })
}

/// Finds the place of `source`, a path without symbolic links, in a volume of the pod with this
/// `uid`.
pub(super) fn find(mountinfo: &[u8], source: &Path, uid: &str) -> Option<Place> {
    if !is_candidate(source, uid) {
        return None;
    }
    let mounts = mountinfo::parse(mountinfo);
    // Of mounts on one another the last is seen.
    let above = mounts.iter().filter(|one| source.starts_with(&one.point));
    let own = above.max_by_key(|one| one.point.components().count())?;
    let same = |one: &&Mount| one.device == own.device && one.fs_type == "tmpfs";
    let of_volume = |one: &&Mount| one.root == Path::new("/") && is_volume(&one.point, uid);
    let volume = mounts.iter().filter(same).rev().find(of_volume)?;
    let read_only = [&volume.options, &volume.parameters];
    if read_only
        .iter()
        .any(|options| options.split(',').any(|option| option == "ro"))
    {
        return None;
    }
    let mut beneath = plain(&own.root)?;
    beneath.extend(source.strip_prefix(&own.point).ok()?);
    let others = mounts.iter().filter(same).filter_map(way);
    Some(Place {
        volume: volume.point.clone(),
        beneath,
        bind: (own != volume).then(|| kept_options(&own.options)),
        options: kept_options(&volume.options),
        size_bytes: size_bytes(&volume.parameters),
        mounted: others.collect(),
    })
}

/// The way from the volume to what is mounted, unless that is the volume itself.
fn way(mount: &Mount) -> Option<PathBuf> {
    plain(&mount.root).filter(|way| !way.as_os_str().is_empty())
}

fn names(path: &Path) -> Vec<&str> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_str().unwrap_or_default()),
        _ => None,
    });
    names.collect()
}

fn is_volume(point: &Path, uid: &str) -> bool {
    matches!(names(point)[..], [.., "pods", pod, "volumes", EMPTY_DIR, _] if pod == uid)
}

fn kept_options(options: &str) -> Vec<String> {
    let words = options.split(',');
    let kept = words.filter(|word| OPTIONS.contains(word));
    kept.map(str::to_owned).collect()
}

/// The kernel shows a size that is not its default, in units of 1024 bytes
/// (Documentation/filesystems/tmpfs.rst).
fn size_bytes(parameters: &str) -> Option<u64> {
    let mut words = parameters.split(',');
    let size = words.find_map(|word| word.strip_prefix("size="))?;
    let kib: u64 = size.strip_suffix('k')?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: &str = "/var/lib/kubelet/pods/u1";
    const VOLUME: &str = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/m";

    const MOUNTS: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
80 22 0:51 / /var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/m rw,nosuid,relatime \
shared:9 master:2 - tmpfs tmpfs rw,size=65536k,inode64
81 22 0:52 / /var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/free rw,relatime - \
tmpfs tmpfs rw
82 22 0:53 / /var/lib/kubelet/pods/u1/volumes/kubernetes.io~projected/token rw,relatime - \
tmpfs tmpfs rw,size=65536k
83 22 0:54 / /var/lib/kubelet/pods/u2/volumes/kubernetes.io~empty-dir/m rw,relatime - \
tmpfs tmpfs rw,size=0k
84 22 0:51 /a\\040b/c /var/lib/kubelet/pods/u1/volume-subpaths/m/app/0 rw,noexec,relatime - \
tmpfs tmpfs rw,size=65536k,inode64
85 22 0:53 /tok /var/lib/kubelet/pods/u1/volume-subpaths/token/app/1 rw,relatime - \
tmpfs tmpfs rw,size=65536k
86 22 8:1 /d /var/lib/kubelet/pods/u1/volume-subpaths/disk/app/2 rw,relatime - \
ext4 /dev/sda1 rw
87 22 0:51 /gone//deleted /var/lib/kubelet/pods/u1/volume-subpaths/m/app/3 rw,relatime - \
tmpfs tmpfs rw,size=65536k
88 22 0:55 / /var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/huge rw,relatime - \
hugetlbfs nodev rw,pagesize=2M
89 22 0:56 / /var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/ro ro,relatime - \
tmpfs tmpfs rw
";

    fn found(source: &str) -> Option<Place> {
        find(MOUNTS.as_bytes(), Path::new(source), "u1")
    }

    #[test]
    fn a_volume_is_found_by_its_own_path() {
        let place = found(VOLUME).unwrap();
        let expected = Place {
            volume: VOLUME.into(),
            beneath: PathBuf::new(),
            bind: None,
            options: vec!["nosuid".to_owned()],
            size_bytes: Some(64 << 20),
            mounted: vec!["a b/c".into()],
        };
        assert_eq!(place, expected);
        // The kernel's own size is none of the volume's.
        let free = found(&VOLUME.replace("/m", "/free")).unwrap();
        assert_eq!((free.size_bytes, free.mounted), (None, Vec::new()));
        let inside = found(&format!("{VOLUME}/x/y")).unwrap();
        assert_eq!(inside.beneath, Path::new("x/y"));
    }

    #[test]
    fn a_sub_path_is_found_by_its_bind_mount() {
        let place = found(&format!("{POD}/volume-subpaths/m/app/0")).unwrap();
        assert_eq!(place.volume, Path::new(VOLUME));
        assert_eq!(place.beneath, Path::new("a b/c"));
        assert_eq!(place.bind, Some(vec!["noexec".to_owned()]));
        assert_eq!(place.options, ["nosuid"]);
    }

    #[test]
    fn everything_else_stays_the_hosts() {
        for source in [
            "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~projected/token",
            // Of another pod: a hostPath volume may lead there.
            "/var/lib/kubelet/pods/u2/volumes/kubernetes.io~empty-dir/m",
            "/var/lib/kubelet/pods/u1/volume-subpaths/token/app/1",
            "/var/lib/kubelet/pods/u1/volume-subpaths/disk/app/2",
            "/var/lib/kubelet/pods/u1/volume-subpaths/m/app/3",
            // On the disk.
            "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/disk",
            "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/huge",
            "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/ro",
            "/var/lib/kubelet/pods/u1",
            "/dev/shm",
            "/",
        ] {
            assert_eq!(found(source), None, "{source}");
        }
        assert_eq!(find(b"", Path::new(VOLUME), "u1"), None);
    }

    #[test]
    fn what_is_mounted_over_a_volume_is_what_counts() {
        let over = |kind: &str, device: &str| {
            format!("{MOUNTS}90 80 {device} / {VOLUME} rw,relatime - {kind} x rw,size=4k\n")
        };
        let find_in = |text: String| find(text.as_bytes(), Path::new(VOLUME), "u1");
        assert_eq!(find_in(over("ext4", "8:2")), None);
        let place = find_in(over("tmpfs", "0:99")).unwrap();
        assert_eq!((place.size_bytes, place.mounted), (Some(4096), Vec::new()));
    }

    #[test]
    fn names_of_the_path_are_whole_names() {
        assert!(is_candidate(Path::new(VOLUME), "u1"));
        assert!(is_candidate(
            Path::new("/k/pods/u1/volume-subpaths/m/c/0"),
            "u1"
        ));
        for path in [
            "/k/pods/u1/volumes/kubernetes.io~empty-dirs/m",
            "/k/pods/u11/volumes/kubernetes.io~empty-dir/m",
            "/k/pods/u1/volumes/kubernetes.io~secret/m",
            "/k/pods/u2/volume-subpaths/m/c/0",
        ] {
            assert!(!is_candidate(Path::new(path), "u1"), "{path}");
        }
    }

    proptest! {
        // A tenant chooses names in sub paths, and the kernel writes them into the text.
        #[test]
        fn any_text_is_read(text in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut all = MOUNTS.as_bytes().to_vec();
            all.extend(&text);
            let place = find(&all, Path::new(VOLUME), "u1");
            if let Some(place) = place {
                prop_assert!(place.beneath.is_relative());
                prop_assert!(place.mounted.iter().all(|way| way.is_relative()));
            }
        }
    }
}
