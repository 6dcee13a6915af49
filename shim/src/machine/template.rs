//! Templates: machines that were saved when their agent was ready and before they held pod data. A
//! pod of the same shape starts from its template instead of booting.
//!
//! ```text
//! <run_dir>/.templates/<key>/memory      the machine's memory; forks map it privately
//! <run_dir>/.templates/<key>/state       processors and devices, as the VMM wrote them
//! <run_dir>/.templates/<key>/seal.json   how both looked when they were published
//! ```
//!
//! The key is a hash of everything that the saved machine depends on: the node's boot, the files of
//! the VMM, kernel and image, and the whole description. A template that was made from anything
//! else has another key and is never found. A template that differs from its seal is removed, and
//! the pod boots.

use std::{
    fmt, fs,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use pericarp_protocol::machine::{self, Request};
use pericarp_runtime_config::{HugePages, Settings, TemplateUse};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    errors::CallError,
    host::private,
    machine::{launch::describe, size::Plan},
};

/// Templates that a node keeps; the least recently used one is removed first.
const TEMPLATES_MAX: usize = 8;

/// Largest state that is accepted: ten times that of a machine with the most vCPUs.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// Stands for the VMM's user in the key, which is the same for every user but root.
const ANY_USER: u32 = 1;

/// Name of the directory of all templates, beneath `paths.run_dir`.
pub(crate) const TEMPLATES: &str = ".templates";

/// The directory of all templates.
pub(crate) fn directory(settings: &Settings) -> PathBuf {
    settings.paths.run_dir.join(TEMPLATES)
}

/// Why a pod boots instead of starting from a template.
#[derive(Debug)]
pub(crate) enum Cold {
    /// Templates are turned off by the configuration or the pod.
    Off,
    /// The pod uses a feature that needs shared guest memory.
    Unfit(&'static str),
    /// No template of the pod's shape exists yet.
    Missing,
    /// The template of the pod's shape cannot be used. One that differs from its seal has been
    /// removed; one that no guest could start from is removed when the same pod has booted.
    Damaged(String),
}

impl Cold {
    /// Whether a template would help the next pod of this shape.
    pub(crate) fn wants_one(&self) -> bool {
        matches!(self, Self::Missing | Self::Damaged(_))
    }
}

impl fmt::Display for Cold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => write!(f, "vm.template is off"),
            Self::Unfit(what) => write!(f, "{what} cannot be used with a template"),
            Self::Missing => write!(f, "there is no template of its shape yet"),
            Self::Damaged(reason) => write!(f, "the template of its shape was damaged: {reason}"),
        }
    }
}

/// A template that may be used.
#[derive(Debug)]
pub(crate) struct Template {
    /// Its name.
    pub(crate) key: String,
    directory: PathBuf,
}

impl Template {
    /// Finds the template of a pod of these settings and sizes, and checks its seal.
    pub(crate) fn find(settings: &Settings, plan: Plan) -> Result<Self, Cold> {
        if settings.vm.template == TemplateUse::Off {
            return Err(Cold::Off);
        }
        if settings.vm.huge_pages != HugePages::None {
            return Err(Cold::Unfit("huge pages"));
        }
        if !settings.devices.functions.is_empty() {
            return Err(Cold::Unfit("passthrough devices at boot"));
        }
        let damaged = |error: &dyn fmt::Display| Cold::Damaged(error.to_string());
        let key = key(settings, plan).map_err(|error| damaged(&error))?;
        let template = Self {
            directory: directory(settings).join(&key),
            key,
        };
        match template.check() {
            Ok(()) => {
                template.note_use();
                Ok(template)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Cold::Missing),
            Err(error) => {
                template.discard();
                Err(damaged(&error))
            }
        }
    }

    fn check(&self) -> io::Result<()> {
        let seal: Seal = serde_json::from_slice(&fs::read(self.directory.join(SEAL))?)?;
        // All files are published together, so a missing one is damage.
        let now = Seal::of(&self.directory).map_err(|error| io::Error::other(error.to_string()))?;
        if now == seal {
            Ok(())
        } else {
            Err(io::Error::other("its files are not as they were published"))
        }
    }

    /// Opens memory and state, both read-only.
    pub(super) fn open(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        let open = |name| File::open(self.directory.join(name)).map(OwnedFd::from);
        Ok((open(MEMORY)?, open(STATE)?))
    }

    /// Removes it. Machines that started from it keep their mappings.
    pub(crate) fn discard(&self) {
        // Another shim may have removed it already.
        let _ = fs::remove_dir_all(&self.directory);
    }

    /// Records the time of use, for [`make_room`].
    fn note_use(&self) {
        if let Ok(seal) = File::open(self.directory.join(SEAL)) {
            let _ = seal.set_modified(SystemTime::now());
        }
    }
}

const MEMORY: &str = "memory";
const STATE: &str = "state";
const SEAL: &str = "seal.json";

/// Identifies a file and its content: a change alters at least one of these.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        const SECOND_NS: i128 = 1_000_000_000;
        let file = fs::metadata(path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        Ok(Self {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.len(),
            modified_ns: i128::from(file.mtime()) * SECOND_NS + i128::from(file.mtime_nsec()),
            changed_ns: i128::from(file.ctime()) * SECOND_NS + i128::from(file.ctime_nsec()),
        })
    }
}

/// Identities of a template's files when it was published. A write changes `changed_ns`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seal {
    memory: Identity,
    state: Identity,
    /// SHA-256 of the state.
    state_hash: String,
}

impl Seal {
    fn of(directory: &Path) -> io::Result<Self> {
        let state = directory.join(STATE);
        let identity = Identity::of(&state)?;
        if identity.bytes > STATE_BYTES_MAX {
            return Err(io::Error::other("its state is too large"));
        }
        Ok(Self {
            memory: Identity::of(&directory.join(MEMORY))?,
            state: identity,
            state_hash: hex(Sha256::digest(fs::read(state)?).as_slice()),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Computes the key of the template of a pod of these settings and sizes.
pub(super) fn key(settings: &Settings, plan: Plan) -> Result<String, CallError> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let description = describe(settings, plan, ANY_USER, false)?;
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(fs::read(BOOT_ID).map_err(|error| CallError::host(BOOT_ID, error))?);
    hash.update([u8::from(settings.vm.free_page_reporting)]);
    let paths = &settings.paths;
    let files = [Some(&paths.vmm), Some(&paths.kernel), Some(&paths.image)];
    for path in files
        .into_iter()
        .chain([paths.initramfs.as_ref()])
        .flatten()
    {
        let identity = Identity::of(path).map_err(|error| CallError::Host(error.to_string()))?;
        hash.update(serde_json::to_vec(&identity).unwrap_or_default());
    }
    hash.update(machine::encode_request(0, &Request::Start(description)));
    Ok(hex(&hash.finalize()[..16]))
}

/// The files of a template in the making. They have no names until [`Unpublished::publish`], so
/// that an unfinished template leaves nothing behind.
#[derive(Debug)]
pub(super) struct Unpublished {
    /// The memory.
    pub(super) memory: File,
    /// The state.
    pub(super) state: File,
}

impl Unpublished {
    /// Makes both in `directory`, which exists.
    pub(super) fn new(directory: &Path, memory_bytes: u64) -> io::Result<Self> {
        let nameless = || private::nameless(directory);
        let memory = nameless()?;
        memory.set_len(memory_bytes)?;
        Ok(Self {
            memory,
            state: nameless()?,
        })
    }

    /// Publishes the template in `directory`, after making room there. It is put together in
    /// `work`, which the caller removes whatever happens.
    pub(super) fn publish(self, work: &Path, directory: &Path, key: &str) -> io::Result<()> {
        make_room(directory)?;
        let folder = work.join(key);
        private::make_directory(&folder)?;
        for (file, name) in [(&self.memory, MEMORY), (&self.state, STATE)] {
            private::name(file, &folder.join(name))?;
        }
        let seal = serde_json::to_vec(&Seal::of(&folder)?)?;
        fs::write(folder.join(SEAL), seal)?;
        let target = directory.join(key);
        match fs::remove_dir_all(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::rename(folder, target)
    }
}

/// Removes the least recently used templates until there is room for one more.
fn make_room(directory: &Path) -> io::Result<()> {
    let mut templates = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let used = fs::metadata(path.join(SEAL)).and_then(|seal| seal.modified());
        // Only templates are removed here.
        if let Ok(used) = used {
            templates.push((used, path));
        }
    }
    templates.sort();
    let surplus = (templates.len() + 1).saturating_sub(TEMPLATES_MAX);
    for (_, path) in templates.into_iter().take(surplus) {
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use pericarp_runtime_config::{Config, Demand, HostCapacity};

    use super::*;

    struct Node {
        folder: tempfile::TempDir,
        settings: Settings,
    }

    impl Node {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut settings = Config::default().settings;
            settings.paths.run_dir = folder.path().join("run");
            for (path, name) in [
                (&mut settings.paths.vmm, "vmm"),
                (&mut settings.paths.kernel, "kernel"),
                (&mut settings.paths.image, "image"),
            ] {
                *path = folder.path().join(name);
                fs::write(path, name).unwrap();
            }
            private::make_directory(&directory(&settings)).unwrap();
            Self { folder, settings }
        }

        fn plan(&self) -> Plan {
            let host = HostCapacity {
                cpus: 4,
                memory_bytes: 8 << 30,
            };
            Plan::of(&self.settings, Demand::default(), host).unwrap()
        }

        fn publish(&self, key: &str) {
            let directory = directory(&self.settings);
            let files = Unpublished::new(&directory, 1 << 20).unwrap();
            (&files.memory).write_all(b"memory").unwrap();
            (&files.state).write_all(b"state").unwrap();
            let work = self.folder.path().join("run");
            files.publish(&work, &directory, key).unwrap();
        }

        fn find(&self) -> Result<Template, Cold> {
            Template::find(&self.settings, self.plan())
        }

        fn made(&self) -> PathBuf {
            let key = key(&self.settings, self.plan()).unwrap();
            self.publish(&key);
            directory(&self.settings).join(key)
        }
    }

    #[test]
    fn what_was_published_is_found_until_something_of_it_changes() {
        let node = Node::new();
        assert!(matches!(node.find(), Err(Cold::Missing)));
        let path = node.made();
        let (memory, state) = node.find().unwrap().open().unwrap();
        assert_eq!(File::from(memory).metadata().unwrap().len(), 1 << 20);
        assert_eq!(File::from(state).metadata().unwrap().len(), 5);
        let damages: [fn(&Path); 5] = [
            |path| fs::write(path.join("state"), "other").unwrap(),
            |path| fs::remove_file(path.join("memory")).unwrap(),
            |path| fs::write(path.join("seal.json"), "{}").unwrap(),
            |path| {
                let memory = fs::OpenOptions::new().write(true).open(path.join("memory"));
                memory.unwrap().set_len(4096).unwrap();
            },
            |path| {
                let memory = fs::OpenOptions::new().write(true).open(path.join("memory"));
                memory.unwrap().write_all(b"M").unwrap();
            },
        ];
        for damage in damages {
            damage(&path);
            assert!(matches!(node.find(), Err(Cold::Damaged(_))));
            assert!(!path.exists(), "it is removed");
            assert!(matches!(node.find(), Err(Cold::Missing)));
            assert_eq!(node.made(), path);
            node.find().unwrap();
        }
    }

    #[test]
    fn another_machine_has_another_template() {
        let mut node = Node::new();
        let path = node.made();
        let first = key(&node.settings, node.plan()).unwrap();
        fs::write(&node.settings.paths.kernel, "a newer kernel").unwrap();
        assert!(matches!(node.find(), Err(Cold::Missing)));
        node.settings.vm.default_memory_mib += 64;
        assert_ne!(key(&node.settings, node.plan()).unwrap(), first);
        node.settings.vm.template = TemplateUse::Off;
        assert!(matches!(node.find(), Err(Cold::Off)));
        node.settings.vm.template = TemplateUse::Auto;
        node.settings.vm.huge_pages = HugePages::Size2Mib;
        assert!(matches!(node.find(), Err(Cold::Unfit(_))));
        assert!(path.exists());
    }

    #[test]
    fn the_number_of_templates_is_bounded_and_the_oldest_goes() {
        let node = Node::new();
        for number in 0..=TEMPLATES_MAX {
            node.publish(&number.to_string());
        }
        let mut names: Vec<_> = fs::read_dir(directory(&node.settings))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), TEMPLATES_MAX);
        assert!(!names.contains(&"0".to_owned()), "{names:?}");
    }
}
