//! The driver image: what vendors' devices need of the guest, on a read-only disk that the
//! operator names (`paths.modules`; layout: docs/gpu.md).
//!
//! ```text
//! modules.load   modules for the kernel, loaded in this order before any container
//! firmware/      where the kernel looks for firmware
//! cdi/*.json     what a container with a function gets besides: libraries, nodes, variables, hooks
//! ```
//!
//! The operator is trusted and fallible: a mistake is an error that names file, place and remedy,
//! and the sandbox is refused. Links in the image lead to places in the image.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    kmod::{ModuleInitFlags, finit_module},
    sys::stat::{major, minor},
};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Process, Spec};

use crate::{
    ground::{beneath, files, kernel},
    machine::devices::Model,
};

mod cdi;
mod edit;
mod modules;

use cdi::Edits;
use edit::{Guest, Number};
use modules::Module;

/// Directories of the image.
const FIRMWARE: &str = "firmware";
const CDI: &str = "cdi";

/// Where the kernel is told to look for firmware first.
const FIRMWARE_PATH: &str = "/sys/module/firmware_class/parameters/path";

/// CDI files of an image.
const SPECS_MAX: usize = 64;

/// Lines of the kernel's log that are repeated about a module.
const WORDS_MAX: usize = 3;

/// Why a driver image cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriversError {
    /// Its content is invalid.
    #[error("driver image: {place}: {reason}")]
    Mistake {
        /// File, with line or field.
        place: String,
        /// The problem and the remedy.
        reason: String,
    },
    /// It cannot be read, or the kernel not be told of it.
    #[error("driver image: cannot use {object}")]
    Kernel {
        /// The file.
        object: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The kernel does not load a module.
    #[error(
        "driver image: {list}:{line}: the guest's kernel {release} refuses module {path}: \
         {answer}{words}; build it against that very kernel, and name what it needs before it",
        list = modules::LIST
    )]
    Module {
        /// Where it is named.
        line: usize,
        /// The module's file.
        path: String,
        /// The kernel's release.
        release: String,
        /// The kernel's answer; no source, since more follows it.
        answer: io::Error,
        /// Lines of its log.
        words: String,
    },
}

fn mistake(place: impl Into<String>, reason: impl Into<String>) -> DriversError {
    DriversError::Mistake {
        place: place.into(),
        reason: reason.into(),
    }
}

/// Whether a relative path stays beneath where it begins.
fn is_beneath(path: &str) -> bool {
    let normal = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    !path.is_empty() && !path.contains('\0') && Path::new(path).components().all(normal)
}

/// A tree of which no path leads out.
#[derive(Debug)]
struct Tree(OwnedFd);

impl Tree {
    fn open(root: &Path) -> io::Result<Self> {
        Ok(Self(File::open(root)?.into()))
    }

    fn get(&self, path: &str, flags: OFlag) -> io::Result<File> {
        Ok(beneath::open_with(self.0.as_fd(), path, flags)?.into())
    }

    fn has(&self, path: &str) -> Result<bool, DriversError> {
        match self.get(path, OFlag::O_PATH) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(DriversError::Kernel {
                object: path.to_owned(),
                source,
            }),
        }
    }

    /// Reads a file of at most `bytes_max`.
    fn read(&self, path: &str, bytes_max: u64) -> Result<String, DriversError> {
        let failed = |source| DriversError::Kernel {
            object: path.to_owned(),
            source,
        };
        let file = self.get(path, OFlag::O_RDONLY).map_err(failed)?;
        let mut text = String::new();
        let read = file.take(bytes_max + 1).read_to_string(&mut text);
        if read.map_err(failed)? as u64 > bytes_max {
            return Err(mistake(path, format!("it has more than {bytes_max} bytes")));
        }
        Ok(text)
    }

    /// Where a path of the image really leads, as a path of the guest.
    fn real(&self, path: &str) -> io::Result<PathBuf> {
        let place = self.get(path, OFlag::O_PATH)?;
        std::fs::read_link(files::descriptor_path(&place))
    }
}

/// An image that is in use.
#[derive(Debug)]
pub(crate) struct Drivers {
    tree: Tree,
    /// By their files' names.
    specs: Vec<(String, cdi::Spec)>,
}

impl Drivers {
    /// Takes the image that is mounted at `root` into use: firmware, modules, specifications.
    pub(crate) fn set_up(root: &Path) -> Result<Self, DriversError> {
        let drivers = Self::read(root)?;
        if drivers.tree.has(FIRMWARE)? {
            set_firmware_path(&root.join(FIRMWARE))?;
        }
        for module in drivers.modules()? {
            drivers.load(&module)?;
        }
        Ok(drivers)
    }

    /// Reads everything and changes nothing.
    fn read(root: &Path) -> Result<Self, DriversError> {
        let tree = Tree::open(root).map_err(|source| DriversError::Kernel {
            object: root.display().to_string(),
            source,
        })?;
        let mut is_of_use = false;
        for name in [modules::LIST, FIRMWARE, CDI] {
            is_of_use |= tree.has(name)?;
        }
        if !is_of_use {
            let place = format!("{}, {FIRMWARE}/, {CDI}/", modules::LIST);
            return Err(mistake(
                place,
                "none of these is at its root, so it is of no use",
            ));
        }
        let specs = specs(&tree)?;
        let drivers = Self { tree, specs };
        drivers.modules()?;
        for (name, spec) in &drivers.specs {
            for (field, edits) in spec.all_edits() {
                drivers.check_paths(name, &field, edits)?;
            }
        }
        Ok(drivers)
    }

    fn modules(&self) -> Result<Vec<Module>, DriversError> {
        if !self.tree.has(modules::LIST)? {
            return Ok(Vec::new());
        }
        let text = self.tree.read(modules::LIST, modules::LIST_BYTES_MAX)?;
        modules::parse(&text)
            .map_err(|(line, reason)| mistake(format!("{}:{line}", modules::LIST), reason))
    }

    fn check_paths(&self, name: &str, field: &str, edits: &cdi::Edits) -> Result<(), DriversError> {
        let mounts = edits.mounts.iter().enumerate();
        let mounts =
            mounts.map(|(index, one)| (format!("mounts[{index}].hostPath"), &one.host_path));
        let hooks = edits.hooks.iter().enumerate();
        let hooks = hooks
            .filter(|(_, one)| one.hook_name != cdi::START_CONTAINER)
            .map(|(index, one)| (format!("hooks[{index}].path"), &one.path));
        for (entry, path) in mounts.chain(hooks) {
            self.path(path)
                .map_err(|reason| mistake(format!("{name}: {field}.{entry}"), reason))?;
        }
        Ok(())
    }

    fn path(&self, path: &str) -> Result<PathBuf, String> {
        let real = self.tree.real(path);
        real.map_err(|error| format!("{path} is not in the image ({error}): put it there"))
    }

    fn load(&self, module: &Module) -> Result<(), DriversError> {
        let place = || format!("{}:{}", modules::LIST, module.line);
        let file = self.tree.get(&module.path, OFlag::O_RDONLY);
        let file = file.map_err(|error| {
            let path = &module.path;
            let reason = format!("{path} is not in the image ({error}): put it there");
            mistake(place(), reason)
        })?;
        match finit_module(&file, &module.parameters, ModuleInitFlags::empty()) {
            // There already when a sandbox is configured once more after a failure.
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(Errno::ENOSYS) => Err(mistake(
                place(),
                "the guest's kernel loads no modules: choose one that does (paths.kernel), such \
                 as that of FLAVOUR=passthrough",
            )),
            Err(error) => Err(DriversError::Module {
                line: module.line,
                path: module.path.clone(),
                release: kernel::release(),
                answer: error.into(),
                words: words_about(&kernel::log(), &modules::name(&module.path)),
            }),
        }
    }

    /// Adds to a container's specification what goes with its functions. `found` are the nodes that
    /// it has for them. Gives what further processes of the container get too.
    pub(crate) fn edit(
        &self,
        spec: &mut Spec,
        found: &mut Vec<LinuxDevice>,
        functions: &[Model],
    ) -> Result<Additions, DriversError> {
        let mut additions = Additions::default();
        let guest = Guest {
            device: device_at,
            drivers: files::read("/proc/devices").unwrap_or_default(),
            path: |path: &str| self.path(path),
        };
        for (name, one) in &self.specs {
            for (field, edits) in one.edits_for(functions) {
                guest
                    .apply(edits, spec, found)
                    .map_err(|reason| mistake(format!("{name}: {field}"), reason))?;
                additions.0.push(edits.clone());
            }
        }
        Ok(additions)
    }
}

/// Variables and groups of every process of a container, those that are executed in it too: the
/// host, which describes them, knows nothing of the image.
#[derive(Debug, Default)]
pub(crate) struct Additions(Vec<Edits>);

impl Additions {
    /// Gives them to a further process.
    pub(crate) fn apply(&self, process: &mut Process) {
        for edits in &self.0 {
            edit::add_to_process(process, edits);
        }
    }
}

fn set_firmware_path(path: &Path) -> Result<(), DriversError> {
    let written = files::write(FIRMWARE_PATH, &path.display().to_string());
    written.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => mistake(
            FIRMWARE,
            "the guest's kernel loads no firmware: choose one that does (paths.kernel), such as \
             that of FLAVOUR=passthrough",
        ),
        _ => DriversError::Kernel {
            object: FIRMWARE_PATH.to_owned(),
            source,
        },
    })
}

/// The CDI specifications of the image, in the order of their names.
fn specs(tree: &Tree) -> Result<Vec<(String, cdi::Spec)>, DriversError> {
    if !tree.has(CDI)? {
        return Ok(Vec::new());
    }
    let failed = |source| DriversError::Kernel {
        object: CDI.to_owned(),
        source,
    };
    let directory = tree.real(CDI).map_err(failed)?;
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let place = format!("{CDI}/{}", name.display());
        let ending = Path::new(&name).extension().and_then(OsStr::to_str);
        match ending {
            Some("json") => names.push(place),
            Some("yaml" | "yml") => {
                return Err(mistake(place, "only JSON is read: write it as .json"));
            }
            // As every reader of CDI does.
            _ => {}
        }
        if names.len() > SPECS_MAX {
            return Err(mistake(
                CDI,
                format!("there are more than {SPECS_MAX} files"),
            ));
        }
    }
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let text = tree.read(&name, cdi::SPEC_BYTES_MAX)?;
            let spec = cdi::Spec::parse(text.as_bytes());
            let spec = spec.map_err(|reason| mistake(name.clone(), reason))?;
            Ok((name, spec))
        })
        .collect()
}

/// The last of what the kernel's log says of a module, which it begins with the module's name.
fn words_about(log: &str, name: &str) -> String {
    let begin = format!("{name}: ");
    let text = |line: &'_ str| line.split_once("] ").map(|(_, text)| text.to_owned());
    let lines = log.lines().rev().filter_map(text);
    let lines = lines.filter(|text| text.starts_with(&begin));
    let mut words: Vec<String> = lines.take(WORDS_MAX).collect();
    words.reverse();
    match words.as_slice() {
        [] => String::new(),
        words => format!(" ({})", words.join("; ")),
    }
}

fn device_at(path: &str) -> Option<Number> {
    let metadata = std::fs::metadata(path).ok()?;
    let kind = if metadata.file_type().is_block_device() {
        LinuxDeviceType::B
    } else if metadata.file_type().is_char_device() {
        LinuxDeviceType::C
    } else {
        return None;
    };
    let number = metadata.rdev();
    let part = |value: u64| i64::try_from(value).ok();
    Some((kind, part(major(number))?, part(minor(number))?))
}

/// The list of modules and a CDI specification, of any bytes: what is taken stays in the image.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_any(data: &[u8]) {
    if let Ok(modules) = modules::parse(&String::from_utf8_lossy(data)) {
        for module in modules {
            assert!(is_beneath(&module.path), "{}", module.path);
        }
    }
    let Ok(spec) = cdi::Spec::parse(data) else {
        return;
    };
    for (_, edits) in spec.all_edits() {
        for mount in &edits.mounts {
            assert!(is_beneath(mount.host_path.trim_start_matches('/')));
        }
        let guest = Guest {
            device: |_: &str| None,
            drivers: String::from_utf8_lossy(data).into_owned(),
            path: |path: &str| Ok(PathBuf::from(path)),
        };
        let mut container = Spec::default();
        container.set_mounts(None);
        // A node of which nothing is known is refused.
        let _ = guest.apply(edits, &mut container, &mut Vec::new());
        for mount in container.mounts().iter().flatten() {
            let options = mount.options().iter().flatten();
            assert!(options.into_iter().any(|one| one == "ro" || one == "rro"));
        }
    }
}

#[cfg(test)]
mod tests;
