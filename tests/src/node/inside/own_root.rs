//! This computer as the node: a root of our own above the computer's, in a mount namespace of our
//! own, so that nothing that a test writes stays.

use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// Where the new root is put together; exists on every computer (hier(7)) and is empty.
const PLACE: &str = "/mnt";

/// File systems of the kernel that the new root shares with the old one.
const KERNEL_FOLDERS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Puts a tmpfs over the computer's root and goes there; `results` stays writable.
pub(super) fn enter(results: &Path) -> Result<()> {
    let none = MsFlags::empty();
    mount(Some("tmpfs"), PLACE, Some("tmpfs"), none, Some("mode=755"))
        .context("cannot mount a tmpfs for the node's root")?;
    for folder in ["upper", "work", "root"] {
        let path = Path::new(PLACE).join(folder);
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let root = Path::new(PLACE).join("root");
    let options = format!("lowerdir=/,upperdir={PLACE}/upper,workdir={PLACE}/work");
    mount(
        Some("overlay"),
        &root,
        Some("overlay"),
        none,
        Some(options.as_str()),
    )
    .context("cannot mount the overlay of the node's root")?;
    for folder in KERNEL_FOLDERS.map(Path::new).into_iter().chain([results]) {
        let target = root.join(folder.strip_prefix("/").unwrap_or(folder));
        std::fs::create_dir_all(&target)
            .with_context(|| format!("cannot make {}", target.display()))?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(folder), &target, None::<&str>, flags, None::<&str>)
            .with_context(|| format!("cannot bind {}", folder.display()))?;
    }
    nix::unistd::chroot(&root).context("cannot go to the node's root")?;
    nix::unistd::chdir("/").context("cannot go to the node's root")
}
