//! CDI specifications of the guest: what a container that is given a PCI function gets besides
//! (Container Device Interface 1.1, SPEC.md).
//!
//! The format is the CDI's own. Paths of the host in it are paths of the image, and an annotation
//! says which functions a device goes with. What the guest cannot do is refused by name: network
//! devices and cache allocation are unknown fields here.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::is_beneath;
use crate::machine::devices::Model;

/// Largest specification in bytes. `nvidia-ctk` writes some 20 KiB.
pub(super) const SPEC_BYTES_MAX: u64 = 1 << 20;

/// Devices of a specification, and entries of each list of edits.
const ENTRIES_MAX: usize = 512;

/// Says which functions a device goes with.
const FUNCTIONS: &str = "pericarp.dev/pci";

/// Annotations of ours begin so.
const OURS: &str = "pericarp.dev/";

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    cdi_version: String,
    kind: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    container_edits: Edits,
}

/// What is changed in a container's specification.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Edits {
    pub(super) env: Vec<String>,
    pub(super) device_nodes: Vec<Node>,
    pub(super) mounts: Vec<Mount>,
    pub(super) hooks: Vec<Hook>,
    pub(super) additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Node {
    /// In the container.
    pub(super) path: String,
    /// In the guest, when it is another.
    pub(super) host_path: String,
    /// "b", "c", "u", "p", or empty to find out.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// 0 to find out.
    pub(super) major: i64,
    pub(super) minor: i64,
    pub(super) file_mode: Option<u32>,
    /// Letters of "rwm", "none", or empty for all.
    pub(super) permissions: String,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// A file or directory of the image in the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Mount {
    /// In the image.
    pub(super) host_path: String,
    pub(super) container_path: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) options: Vec<String>,
}

/// A program of the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Hook {
    pub(super) hook_name: String,
    pub(super) path: String,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) timeout: Option<i64>,
}

/// The stages of hooks, as the specification names them.
pub(super) const STAGES: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// The one stage whose programs are the container's own.
pub(super) const START_CONTAINER: &str = STAGES[3];

impl Spec {
    /// Reads a file. The error says where in it; it begins with line and column, or with a field.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let spec: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), String> {
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let version: Vec<&str> = self.cdi_version.split('.').collect();
        if version.len() != 3
            || !version.iter().all(|part| digits(part))
            || !matches!(version[0], "0" | "1")
        {
            let found = &self.cdi_version;
            return Err(format!(
                "cdiVersion: {found:?} is not a version 0.x.y or 1.x.y"
            ));
        }
        let kind = self.kind.split_once('/');
        if !kind.is_some_and(|(vendor, class)| !vendor.is_empty() && !class.is_empty()) {
            return Err(format!("kind: {:?} is not vendor/class", self.kind));
        }
        check_annotations("annotations", &self.annotations)?;
        bounded("devices", self.devices.len())?;
        if self.devices.is_empty() {
            return Err("devices: there is none, so nothing would be applied".to_owned());
        }
        self.container_edits.check("containerEdits")?;
        let mut names = BTreeSet::new();
        for (index, device) in self.devices.iter().enumerate() {
            let field = format!("devices[{index}]");
            if device.name.is_empty() || !names.insert(&device.name) {
                let name = &device.name;
                return Err(format!("{field}.name: {name:?} is empty or there already"));
            }
            check_annotations(&format!("{field}.annotations"), &device.annotations)?;
            device
                .container_edits
                .check(&format!("{field}.containerEdits"))?;
        }
        Ok(())
    }

    /// The edits for a container that has these functions, each once, with the field they stand in.
    pub(super) fn edits_for(&self, functions: &[Model]) -> Vec<(String, &Edits)> {
        let goes_with = |device: &Device| {
            let own = device.annotations.get(FUNCTIONS);
            let selectors = own.or_else(|| self.annotations.get(FUNCTIONS));
            match selectors {
                None => !functions.is_empty(),
                // Read when the image was; what cannot be read goes with nothing.
                Some(text) => parse_selectors(text).is_ok_and(|selectors| {
                    let means = |function| selectors.iter().any(|one| one.means(function));
                    functions.iter().any(means)
                }),
            }
        };
        let mut edits: Vec<(String, &Edits)> = Vec::new();
        for (index, device) in self.devices.iter().enumerate() {
            if goes_with(device) {
                if edits.is_empty() {
                    edits.push(("containerEdits".to_owned(), &self.container_edits));
                }
                let field = format!("devices[{index}].containerEdits");
                edits.push((field, &device.container_edits));
            }
        }
        edits
    }

    /// Every edit of the file, with its field.
    pub(super) fn all_edits(&self) -> impl Iterator<Item = (String, &Edits)> {
        let devices = self.devices.iter().enumerate();
        let devices = devices.map(|(index, device)| {
            let field = format!("devices[{index}].containerEdits");
            (field, &device.container_edits)
        });
        std::iter::once(("containerEdits".to_owned(), &self.container_edits)).chain(devices)
    }
}

fn bounded(field: &str, count: usize) -> Result<(), String> {
    if count > ENTRIES_MAX {
        return Err(format!("{field}: {count} entries, at most {ENTRIES_MAX}"));
    }
    Ok(())
}

fn check_annotations(field: &str, annotations: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in annotations {
        if name == FUNCTIONS {
            parse_selectors(value).map_err(|reason| format!("{field}[{FUNCTIONS:?}]: {reason}"))?;
        } else if name.starts_with(OURS) {
            return Err(format!("{field}[{name:?}]: only {FUNCTIONS} is known"));
        }
    }
    Ok(())
}

impl Edits {
    fn check(&self, field: &str) -> Result<(), String> {
        for (list, count) in [
            ("env", self.env.len()),
            ("deviceNodes", self.device_nodes.len()),
            ("mounts", self.mounts.len()),
            ("hooks", self.hooks.len()),
            ("additionalGids", self.additional_gids.len()),
        ] {
            bounded(&format!("{field}.{list}"), count)?;
        }
        let at = |list: &str, index: usize, reason: String| {
            Err(format!("{field}.{list}[{index}]{reason}"))
        };
        for (index, entry) in self.env.iter().enumerate() {
            if !is_variable(entry) {
                return at("env", index, format!(": {entry:?} is not name=value"));
            }
        }
        for (index, node) in self.device_nodes.iter().enumerate() {
            if let Err(reason) = node.check() {
                return at("deviceNodes", index, reason);
            }
        }
        for (index, mount) in self.mounts.iter().enumerate() {
            if let Err(reason) = mount.check() {
                return at("mounts", index, reason);
            }
        }
        for (index, hook) in self.hooks.iter().enumerate() {
            if let Err(reason) = hook.check() {
                return at("hooks", index, reason);
            }
        }
        Ok(())
    }
}

fn is_variable(entry: &str) -> bool {
    let name = entry.split_once('=').map_or("", |(name, _)| name);
    !name.is_empty() && !entry.contains('\0')
}

/// An absolute path without `..`, below `/`.
fn is_absolute(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(is_beneath)
}

impl Node {
    /// Where the guest has it.
    pub(super) fn guest_path(&self) -> &str {
        if self.host_path.is_empty() {
            &self.path
        } else {
            &self.host_path
        }
    }

    fn check(&self) -> Result<(), String> {
        if !is_absolute(&self.path) {
            return Err(format!(".path: {:?} is not an absolute path", self.path));
        }
        let guest_path = self.guest_path();
        if !is_absolute(guest_path) {
            return Err(format!(".hostPath: {guest_path:?} is not an absolute path"));
        }
        if !matches!(self.kind.as_str(), "" | "b" | "c" | "u" | "p") {
            return Err(format!(".type: {:?} is not b, c, u or p", self.kind));
        }
        // makedev(3): what the kernel keeps of them.
        if self.major < 0 || self.major >> 12 != 0 || self.minor < 0 || self.minor >> 20 != 0 {
            let (major, minor) = (self.major, self.minor);
            return Err(format!(
                ".major, .minor: {major}:{minor} is not a device number"
            ));
        }
        let permissions = self.permissions.as_str();
        if permissions != "none" && !permissions.chars().all(|letter| "rwm".contains(letter)) {
            return Err(format!(
                ".permissions: {permissions:?} is not of r, w and m"
            ));
        }
        Ok(())
    }
}

impl Mount {
    fn check(&self) -> Result<(), String> {
        if !is_absolute(&self.host_path) {
            let path = &self.host_path;
            return Err(format!(
                ".hostPath: {path:?} is not a path in the image: begin at its root with `/`"
            ));
        }
        if !is_absolute(&self.container_path) {
            let path = &self.container_path;
            return Err(format!(".containerPath: {path:?} is not an absolute path"));
        }
        if !matches!(self.kind.as_str(), "" | "bind" | "none") {
            let kind = &self.kind;
            return Err(format!(
                ".type: {kind:?}: only files of the image are mounted (bind)"
            ));
        }
        if self.options.iter().any(|option| option == "rw") {
            return Err(".options: rw: the image is read-only".to_owned());
        }
        Ok(())
    }
}

impl Hook {
    fn check(&self) -> Result<(), String> {
        if !STAGES.contains(&self.hook_name.as_str()) {
            let name = &self.hook_name;
            return Err(format!(
                ".hookName: {name:?} is not one of {}",
                STAGES.join(", ")
            ));
        }
        if !is_absolute(&self.path) {
            return Err(format!(".path: {:?} is not an absolute path", self.path));
        }
        if !self.env.iter().all(|entry| is_variable(entry)) {
            return Err(format!(".env: {:?} are not all name=value", self.env));
        }
        if self.timeout.is_some_and(|seconds| seconds <= 0) {
            return Err(".timeout: not a positive number of seconds".to_owned());
        }
        Ok(())
    }
}

/// Functions that are meant, by what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Selector {
    /// Base class.
    Class(u16),
    /// Base class and subclass.
    Subclass(u16),
    Vendor(u16),
    Model(u16, u16),
}

impl Selector {
    /// As the keys `devices.resources` and `security.passthrough_devices` write them: `class:03`,
    /// `class:0302`, `vendor:10de`, `10de:2331`. Addresses are the host's, which the guest does not
    /// know.
    fn parse(text: &str) -> Option<Self> {
        let (kind, digits) = text.split_once(':')?;
        match kind {
            "class" if digits.len() == 2 => Some(Self::Class(hex(digits, 2)?)),
            "class" => Some(Self::Subclass(hex(digits, 4)?)),
            "vendor" => Some(Self::Vendor(hex(digits, 4)?)),
            vendor => Some(Self::Model(hex(vendor, 4)?, hex(digits, 4)?)),
        }
    }

    fn means(self, function: &Model) -> bool {
        match self {
            Self::Class(class) => function.class >> 8 == class,
            Self::Subclass(class) => function.class == class,
            Self::Vendor(vendor) => function.vendor == vendor,
            Self::Model(vendor, device) => (function.vendor, function.device) == (vendor, device),
        }
    }
}

fn parse_selectors(text: &str) -> Result<Vec<Selector>, String> {
    let selector = |word: &str| {
        Selector::parse(word.trim()).ok_or_else(|| {
            format!(
                "{word:?} is not one of class:03, class:0302, vendor:10de and 10de:2331 \
                 (vendor:device)"
            )
        })
    };
    text.split(',').map(selector).collect()
}

fn hex(text: &str, digits: usize) -> Option<u16> {
    let good = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let good = text.len() == digits && text.bytes().all(good);
    good.then(|| u16::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
#[path = "cdi_tests.rs"]
mod tests;
