//! DeviceLimits of containers on block devices of the host.
//!
//! `linux.resources.blockIO` numbers devices as the host does (OCI runtime specification,
//! config-linux.md, "Block IO"). What a container reads and writes there is done by the VMM and the
//! file-system daemon, so its limits are limits of the cgroup that both are in: for each device the
//! sum of what the pod's containers may. A container without a limit of its own shares those of the
//! others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use oci_spec::runtime::{LinuxBlockIo, LinuxResources, LinuxThrottleDevice};
use tracing::warn;

use crate::{errors::CallError, host::cgroup};

/// The file of a cgroup (cgroup-v2.rst, "IO Interface Files"), and its keys.
const FILE: &str = "io.max";
const KEYS: [&str; 4] = ["rbps", "wbps", "riops", "wiops"];

/// The limits of a device, in the order of [`KEYS`].
type DeviceLimits = [Option<u64>; KEYS.len()];

/// DeviceLimits of devices, by their numbers as `io.max` has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Throttles(BTreeMap<String, DeviceLimits>);

impl Throttles {
    /// Takes what resources name, and leaves what they do not. 0 takes a limit away, as it does in
    /// the first version of cgroups.
    pub(crate) fn update(&mut self, resources: &LinuxResources) {
        if let Some(block_io) = resources.block_io() {
            for (key, devices) in named(block_io).into_iter().enumerate() {
                for device in devices.iter().flatten() {
                    let name = format!("{}:{}", device.major(), device.minor());
                    let limit = Some(device.rate()).filter(|rate| *rate > 0);
                    if let Some(place) = self.0.entry(name).or_default().get_mut(key) {
                        *place = limit;
                    }
                }
            }
        }
        let unified = resources.unified().as_ref();
        for line in unified
            .and_then(|files| files.get(FILE))
            .into_iter()
            .flat_map(|text| text.lines())
        {
            self.take_line(line);
        }
    }

    /// Takes a line of `io.max`.
    fn take_line(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let Some(device) = words.next() else { return };
        let limits = self.0.entry(device.to_owned()).or_default();
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let mut places = KEYS.iter().zip(&mut *limits);
            if let Some((_, limit)) = places.find(|(key, _)| **key == name) {
                *limit = value.parse().ok();
            }
        }
    }

    /// What two containers may together.
    pub(crate) fn and(mut self, other: Self) -> Self {
        for (device, limits) in other.0 {
            let sums = self.0.entry(device).or_default();
            for (sum, limit) in sums.iter_mut().zip(limits) {
                *sum = match (*sum, limit) {
                    (Some(one), Some(other)) => Some(one.saturating_add(other)),
                    (one, other) => one.or(other),
                };
            }
        }
        self
    }

    /// Makes them, and no others, those of a pod with these cgroups.
    pub(crate) fn hold(&self, directories: &[impl AsRef<Path>]) -> Result<(), CallError> {
        let unified = |directory: &&Path| directory.join("cgroup.controllers").exists();
        let mut directories = directories.iter().map(AsRef::as_ref);
        match directories.next().filter(unified) {
            Some(directory) => self.hold_in(directory),
            None if self.0.is_empty() => Ok(()),
            None => Err(CallError::Invalid(
                "linux.resources.blockIO: the node limits block devices of pods with a cgroup of \
                 the second version alone: boot it with the unified hierarchy"
                    .to_owned(),
            )),
        }
    }

    fn hold_in(&self, directory: &Path) -> Result<(), CallError> {
        let file = directory.join(FILE);
        let failed = |device: &str| {
            let object = format!(
                "linux.resources.blockIO: device {device}: {}",
                file.display()
            );
            move |error: io::Error| CallError::host(object, error)
        };
        if !file.exists() {
            let Some((device, _)) = self.0.first_key_value() else {
                return Ok(());
            };
            pass_on(directory).map_err(failed(device))?;
        }
        let mut now = Self::default();
        let text = fs::read_to_string(&file).map_err(failed("any"))?;
        text.lines().for_each(|line| now.take_line(line));
        let devices: BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        for device in devices {
            let limits = |of: &Self| of.0.get(device).copied().unwrap_or_default();
            if limits(self) != limits(&now) {
                fs::write(&file, line(device, limits(self))).map_err(failed(device))?;
            }
        }
        Ok(())
    }
}

fn line(device: &str, limits: DeviceLimits) -> String {
    let word = |(key, limit): (&str, Option<u64>)| match limit {
        Some(limit) => format!(" {key}={limit}"),
        None => format!(" {key}=max"),
    };
    let words: String = KEYS.into_iter().zip(limits).map(word).collect();
    format!("{device}{words}")
}

/// The lists of limits, in the order of [`KEYS`].
fn named(block_io: &LinuxBlockIo) -> [&Option<Vec<LinuxThrottleDevice>>; KEYS.len()] {
    [
        block_io.throttle_read_bps_device(),
        block_io.throttle_write_bps_device(),
        block_io.throttle_read_iops_device(),
        block_io.throttle_write_iops_device(),
    ]
}

/// Has every cgroup above pass the controller on (cgroup-v2.rst, "Enabling and Disabling"); kubelet
/// does not.
fn pass_on(directory: &Path) -> io::Result<()> {
    let above: Vec<&Path> = directory.ancestors().skip(1).collect();
    let above = above.into_iter().rev();
    above
        .filter(|ancestor| ancestor.starts_with(cgroup::ROOT))
        .try_for_each(|ancestor| fs::write(ancestor.join("cgroup.subtree_control"), "+io"))
}

/// Takes what is about devices of the host out of resources that go to the guest.
pub(crate) fn take(resources: &mut LinuxResources) {
    if let Some(unified) = resources.unified_mut() {
        unified.remove(FILE);
    }
    let Some(block_io) = resources.block_io_mut() else {
        return;
    };
    if block_io.weight_device().iter().flatten().next().is_some() {
        warn!(
            "linux.resources.blockIO.weightDevice has no effect: containers of a VM share no \
             device of the host that their weights could be of"
        );
    }
    block_io
        .set_weight_device(None)
        .set_throttle_read_bps_device(None)
        .set_throttle_write_bps_device(None)
        .set_throttle_read_iops_device(None)
        .set_throttle_write_iops_device(None);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(value: serde_json::Value) -> LinuxResources {
        serde_json::from_value(value).unwrap()
    }

    fn slow() -> LinuxResources {
        resources(serde_json::json!({
            "blockIO": {
                "weight": 100,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 10}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1024}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 5}],
            },
            "unified": {"io.max": "8:16 wbps=7 riops=max", "memory.high": "5"},
        }))
    }

    fn of(resources: &LinuxResources) -> Throttles {
        let mut throttles = Throttles::default();
        throttles.update(resources);
        throttles
    }

    fn throttles(lines: &[&str]) -> Throttles {
        let mut throttles = Throttles::default();
        lines.iter().for_each(|line| throttles.take_line(line));
        throttles
    }

    #[test]
    fn limits_are_named_by_device_and_the_guest_hears_nothing_of_them() {
        let mut asked = slow();
        let wanted = throttles(&["8:0 rbps=1024", "8:16 wbps=7 wiops=5"]);
        assert_eq!(of(&asked), wanted);
        take(&mut asked);
        let left = serde_json::json!({"blockIO": {"weight": 100}, "unified": {"memory.high": "5"}});
        assert_eq!(asked, resources(left));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let mut found = of(&slow());
        found.update(&resources(serde_json::json!({"blockIO": {
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 0}],
            "throttleReadIOPSDevice": [{"major": 8, "minor": 16, "rate": 9}],
        }})));
        let wanted = throttles(&["8:0 rbps=max", "8:16 wbps=7 riops=9 wiops=5"]);
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_pod_may_what_its_containers_may_together() {
        let one = throttles(&["8:0 rbps=10 wbps=5"]);
        let other = throttles(&["8:0 rbps=1", "8:16 wiops=3"]);
        let both = throttles(&["8:0 rbps=11 wbps=5", "8:16 wiops=3"]);
        assert_eq!(one.clone().and(other), both);
        assert_eq!(one.clone().and(Throttles::default()), one);
    }

    #[test]
    fn the_cgroup_has_these_limits_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let held = |throttles: &Throttles| throttles.hold(&[folder.path()]);
        let file = |name: &str| folder.path().join(name);
        let wanted = throttles(&["8:0 rbps=1024"]);
        // No cgroup of the second version.
        let error = held(&wanted).unwrap_err().to_string();
        assert!(error.starts_with("linux.resources.blockIO: "), "{error}");
        held(&Throttles::default()).unwrap();
        fs::write(file("cgroup.controllers"), "io").unwrap();
        held(&Throttles::default()).unwrap();
        fs::write(file(FILE), "").unwrap();
        held(&wanted).unwrap();
        let seen = || fs::read_to_string(file(FILE)).unwrap();
        assert_eq!(seen(), "8:0 rbps=1024 wbps=max riops=max wiops=max");
        held(&Throttles::default()).unwrap();
        assert_eq!(seen(), "8:0 rbps=max wbps=max riops=max wiops=max");
    }
}
