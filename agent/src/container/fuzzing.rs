//! Parsers of the container builder, for the fuzz targets.

use std::path::Path;

use oci_spec::runtime::{LinuxResources, Spec};

use super::{
    CreateOptions,
    cgroup::{self, devices, limits},
    helper::fuzzing as helper,
    message::Report,
    plan,
};

/// See [`helper::paths`].
pub(crate) fn paths(data: &[u8]) {
    helper::paths(data);
}

/// See [`helper::passwd`].
pub(crate) fn passwd(data: &[u8]) {
    helper::passwd(data);
}

/// A runtime specification: it is refused by a field, or its plan survives the way to the helper.
pub(crate) fn specification(data: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<Spec>(data) else {
        return;
    };
    match plan::of("id", &spec, &CreateOptions::default()) {
        Err(error) => assert!(error.to_string().contains(": ")),
        Ok((plan, _)) => {
            let text = serde_json::to_string(&plan).expect("a plan is JSON");
            let back: plan::ContainerPlan = serde_json::from_str(&text).expect("of this form");
            assert_eq!(serde_json::to_string(&back).expect("still"), text);
            for mount in &plan.mounts {
                let mut names = mount.destination.split('/').skip(1);
                assert!(names.all(|name| !matches!(name, "" | "." | "..")));
            }
            for (path, _) in &plan.sysctls {
                assert!(path.split('/').all(|name| !matches!(name, "" | "." | "..")));
            }
        }
    }
}

/// Limits of a container: files of its own cgroup alone, and a program for its devices.
pub(crate) fn resources(data: &[u8]) {
    let Ok(resources) = serde_json::from_slice::<LinuxResources>(data) else {
        return;
    };
    if let Ok(settings) = limits::of(&resources, |_| false) {
        for setting in settings {
            assert!(!setting.file.contains('/') && !setting.file.starts_with("cgroup."));
        }
    }
    if let Ok(rules) = devices::rules(resources.devices().as_deref().unwrap_or_default(), &[]) {
        assert!(!devices::program(&rules).is_empty());
    }
}

/// `/proc/<pid>/cgroup` of a process that may have made cgroups of any name: the one that is found
/// lies within the container's.
pub(crate) fn cgroup_of_process(data: &[u8]) {
    let own = Path::new("/sys/fs/cgroup/pod/c");
    let text = String::from_utf8_lossy(data);
    if let Some(home) = cgroup::home_in(&text, own) {
        assert!(home.starts_with(own) && !home.components().any(|part| part.as_os_str() == ".."));
    }
}

/// What a helper says, which a privileged container could have made it say.
pub(crate) fn report(data: &[u8]) {
    if let Ok(Report::Failed(error)) = serde_json::from_slice(data) {
        let status = error.exit_status();
        assert!(
            status.is_none_or(|status| (1..=255).contains(&status)),
            "{error}"
        );
    }
}
