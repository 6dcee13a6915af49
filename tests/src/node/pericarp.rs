//! Pericarp as it is installed in the node: what is built, and where it goes.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Builder, Session, paths};

/// Folder with Pericarp's binaries; without, `target/release`, else the running build's own.
pub const BUILD_VARIABLE: &str = "PERICARP_BUILD";

/// When it is set, tests take the sizes that SPEC.md promises; without, such as fit a run of CI.
const FULL_VARIABLE: &str = "PERICARP_FULL";

/// The guest kernel (an ELF with a PVH entry).
pub const KERNEL_VARIABLE: &str = "PERICARP_KERNEL";

/// The guest image (EROFS).
pub const IMAGE_VARIABLE: &str = "PERICARP_GUEST_IMAGE";

/// Where the node has what containerd and people start, as `make install` puts it.
pub const BINARY_FOLDER: &str = "/usr/bin";

/// Where the node has what only the shim starts.
pub const LIBEXEC_FOLDER: &str = "/usr/libexec/pericarp";

/// Where the node has kernel and image.
pub const SHARE_FOLDER: &str = "/usr/share/pericarp";

/// Drop-in of Pericarp's configuration that an emulated node needs.
pub(super) const EMULATED_CONFIG_FILE: &str = "/etc/pericarp/config.d/50-test-node.toml";

/// Its content. The SVM that QEMU 7.2 emulated did not intercept XSETBV, so guests must not see
/// XSAVE; and emulation is many times slower than a processor, most of all on a busy computer.
pub(super) const EMULATED_CONFIG: &str = "[vm]
cpu_features = ['-xsave']
default_memory_mib = 192

[timeouts]
agent_ready_ms = 120000
rpc_ms = 60000

[flavour.passthrough.paths]
kernel = '/usr/share/pericarp/vmlinux-passthrough'
";

/// Programs of the build that go to the node when they are there.
const PROGRAMS: [(&str, &str); 3] = [
    (SHIM, BINARY_FOLDER),
    ("pericarp", BINARY_FOLDER),
    (VMM, LIBEXEC_FOLDER),
];

/// The shim, whose presence says which build is meant.
const SHIM: &str = "containerd-shim-pericarp-v2";

/// The virtual machine monitor.
const VMM: &str = "pericarp-vmm";

/// Guest kernel and guest image, where they are built.
#[derive(Debug, Clone, Default)]
pub struct GuestFiles {
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The image.
    pub image: Option<PathBuf>,
}

/// The folder that Pericarp's binaries come from.
pub fn build_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os(BUILD_VARIABLE) {
        return Ok(PathBuf::from(folder));
    }
    let profile = paths::profile()?;
    let release = profile.with_file_name("release");
    let has_shim = release.join(SHIM).exists();
    Ok(if has_shim { release } else { profile })
}

/// Guest kernel and image: named by their variables, else where `make` puts links to them.
#[must_use]
pub fn guest_files() -> GuestFiles {
    let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    let linked = |name: &str| {
        let path = paths::checkout().join("out").join(name);
        path.exists().then_some(path)
    };
    GuestFiles {
        kernel: named(KERNEL_VARIABLE).or_else(|| linked("vmlinux")),
        image: named(IMAGE_VARIABLE).or_else(|| linked("guest.erofs")),
    }
}

/// Name of the kernel with drivers of devices.
const PASSTHROUGH: &str = "vmlinux-passthrough";

/// The kernel with drivers of devices, if it is built (`make kernel FLAVOUR=passthrough`).
#[must_use]
pub fn passthrough_kernel() -> Option<PathBuf> {
    let path = paths::checkout().join("out").join(PASSTHROUGH);
    path.exists().then_some(path)
}

/// The modules of that kernel, if they are built.
#[must_use]
pub fn passthrough_modules() -> Option<PathBuf> {
    let path = paths::checkout().join("out/modules-passthrough");
    path.canonicalize().ok()
}

/// What a pod needs and is not built, with the command that builds it.
#[must_use]
pub fn missing() -> Vec<String> {
    let guest = guest_files();
    let build = build_folder();
    let has = |program: &str| {
        build
            .as_ref()
            .is_ok_and(|folder| folder.join(program).exists())
    };
    let needed = [
        (has(SHIM), SHIM, "make build"),
        (has(VMM), VMM, "make build"),
        (guest.kernel.is_some(), "the guest kernel", "make kernel"),
        (guest.image.is_some(), "the guest image", "make guest-image"),
    ];
    let lacking = needed.iter().filter(|(is_there, _, _)| !is_there);
    lacking
        .map(|(_, what, how)| format!("{what} (`{how}`)"))
        .collect()
}

/// The node for a test that runs pods in VMs, unless what they need is not built: then the reason
/// is printed.
///
/// # Panics
///
/// When the node does not boot: the test cannot go on.
#[must_use]
pub fn session(test: &str, builder: impl FnOnce() -> Builder) -> Option<Session> {
    let missing = missing();
    if !missing.is_empty() {
        eprintln!("skipped: not built: {}", missing.join(", "));
        return None;
    }
    Some(super::session(test, builder).expect("the node boots"))
}

/// Whether tests take the sizes that SPEC.md promises.
#[must_use]
pub fn full_sizes() -> bool {
    std::env::var_os(FULL_VARIABLE).is_some()
}

/// Everything that is built: source, destination, mode.
pub(super) fn find() -> Result<Vec<(PathBuf, PathBuf, u32)>> {
    let mut files = Vec::new();
    let build = build_folder()?;
    for (program, folder) in PROGRAMS {
        files.push((build.join(program), Path::new(folder).join(program), 0o755));
    }
    let guest = guest_files();
    let share = Path::new(SHARE_FOLDER);
    files.extend(passthrough_kernel().map(|kernel| (kernel, share.join(PASSTHROUGH), 0o644)));
    files.extend(
        guest
            .kernel
            .map(|kernel| (kernel, share.join("vmlinux"), 0o644)),
    );
    files.extend(
        guest
            .image
            .map(|image| (image, share.join("guest.erofs"), 0o644)),
    );
    let virtiofsd = super::deps::component("virtiofsd")?
        .folder()?
        .join("virtiofsd");
    files.push((
        virtiofsd,
        Path::new(LIBEXEC_FOLDER).join("virtiofsd"),
        0o755,
    ));
    files.retain(|(source, _, _)| source.exists());
    for (source, _, _) in &mut files {
        *source = source.canonicalize()?;
    }
    Ok(files)
}
