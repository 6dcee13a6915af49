//! What `make install` puts on a node: kernel, image and programs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pericarp_runtime_config::{Config, Settings};

use super::Host;
use super::finding::Report;
use super::program::{output, version};
use crate::elf::{KernelFile, inspect};

const INSTALL: &str =
    "install Pericarp's guest files (make install), or correct the path in the configuration";
const MAKE_DRIVERS: &str =
    "make the image of drivers with mkfs.erofs (docs/gpu.md), or correct `paths.modules`";
/// EROFS on-disk format: the superblock begins at 1024 with this magic number.
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
const EROFS_MAGIC_OFFSET: u64 = 1024;
/// virtiofsd releases before it lack options that the shim uses.
const VIRTIOFSD_OLDEST: (u32, u32, u32) = (1, 10, 0);

pub(super) fn check(host: Host<'_>, settings: &Settings, report: &mut Report) {
    let paths = &settings.paths;
    let at = |path: &Path| host.root.join(path.strip_prefix("/").unwrap_or(path));
    kernel(&at(&paths.kernel), report);
    match &paths.initramfs {
        Some(path) => readable("assets.initramfs", &at(path), report),
        None => erofs("assets.image", &at(&paths.image), INSTALL, report),
    }
    if let Some(path) = &paths.modules {
        erofs("assets.modules", &at(path), MAKE_DRIVERS, report);
    }
    program("assets.vmm", &at(&paths.vmm), report);
    virtiofsd(&at(&paths.virtiofsd), report);
}

/// The guest's files of flavours, where they are others than [`check`] looked at.
pub(super) fn check_flavours(host: Host<'_>, config: &Config, report: &mut Report) {
    let base = &config.settings.paths;
    let at = |path: &Path| host.root.join(path.strip_prefix("/").unwrap_or(path));
    for name in config.flavours() {
        let Ok(flavour) = config.clone().with_flavour(name) else {
            continue;
        };
        let paths = &flavour.settings.paths;
        if paths.kernel != base.kernel {
            kernel(&at(&paths.kernel), report);
        }
        if paths.image != base.image {
            erofs("assets.image", &at(&paths.image), INSTALL, report);
        }
        if let Some(path) = paths
            .modules
            .as_ref()
            .filter(|_| paths.modules != base.modules)
        {
            erofs("assets.modules", &at(path), MAKE_DRIVERS, report);
        }
    }
}

fn kernel(path: &Path, report: &mut Report) {
    let check = "assets.kernel";
    let shown = path.display();
    let kind = File::open(path).and_then(|mut file| inspect(&mut file));
    let wrong = match kind {
        Ok(KernelFile::Pvh(entry)) => {
            return report.ok(check, format!("{shown}, PVH entry at {entry:#x}"));
        }
        Err(error) => return report.fail(check, format!("{shown}: {error}"), INSTALL),
        Ok(KernelFile::BzImage) => "is a compressed kernel (bzImage)",
        Ok(KernelFile::NoPvhNote) => "has no PVH entry note",
        Ok(KernelFile::OtherMachine) => "is not a kernel for x86-64",
        Ok(KernelFile::NotElf) => "is not a kernel",
    };
    let action = "use the ELF file `vmlinux` of a kernel with CONFIG_PVH";
    report.fail(check, format!("{shown} {wrong}"), action);
}

fn erofs(check: &'static str, path: &Path, action: &str, report: &mut Report) {
    let magic = File::open(path).and_then(|mut file| {
        let mut magic = [0; 4];
        file.seek(SeekFrom::Start(EROFS_MAGIC_OFFSET))?;
        file.read_exact(&mut magic).map(|()| magic)
    });
    match magic {
        Ok(EROFS_MAGIC) => report.ok(check, format!("{}, EROFS", path.display())),
        Ok(_) => report.fail(
            check,
            format!("{} is not an EROFS file system", path.display()),
            action,
        ),
        Err(error) => report.fail(check, format!("{}: {error}", path.display()), action),
    }
}

fn readable(check: &'static str, path: &Path, report: &mut Report) {
    match File::open(path) {
        Ok(_) => report.ok(check, path.display().to_string()),
        Err(error) => report.fail(check, format!("{}: {error}", path.display()), INSTALL),
    }
}

/// Is there a file that can be run; says so when not.
fn program(check: &'static str, path: &Path, report: &mut Report) -> bool {
    match path.metadata() {
        Err(error) => report.fail(check, format!("{}: {error}", path.display()), INSTALL),
        Ok(metadata) if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 => {
            let found = format!("{} is no program", path.display());
            report.fail(check, found, INSTALL);
        }
        Ok(_) if check == "assets.virtiofsd" => return true,
        Ok(_) => {
            report.ok(check, path.display().to_string());
            return true;
        }
    }
    false
}

fn virtiofsd(path: &Path, report: &mut Report) {
    let check = "assets.virtiofsd";
    if !program(check, path, report) {
        return;
    }
    match output(path, &["--version"]) {
        Err(error) => report.fail(check, error, "install virtiofsd 1.10 or later"),
        Ok(text) => judge_virtiofsd(path, &text, report),
    }
}

fn judge_virtiofsd(path: &Path, text: &str, report: &mut Report) {
    let check = "assets.virtiofsd";
    let action =
        "install the virtiofsd written in Rust, 1.10 or later, and name it in `paths.virtiofsd`";
    if text.contains("QEMU") {
        let found = format!("{} is the old daemon of QEMU", path.display());
        return report.fail(check, found, action);
    }
    match version(text) {
        Some(found) if found >= VIRTIOFSD_OLDEST => {
            report.ok(check, format!("{}, {}", path.display(), text.trim()));
        }
        Some(_) => report.fail(
            check,
            format!("{}: {} is too old", path.display(), text.trim()),
            action,
        ),
        None => report.warn(
            check,
            format!("{} tells no version", path.display()),
            action,
        ),
    }
}

#[cfg(test)]
mod tests {
    use pericarp_runtime_config::Config;

    use super::*;
    use crate::check::finding::Level;
    use crate::elf::tests::kernel_with_note;

    fn write(root: &Path, path: &str, bytes: &[u8], mode: u32) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_complete_installation_passes_and_each_lack_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let levels = || {
            let mut report = Report::default();
            check(
                Host {
                    root: folder.path(),
                },
                &Config::default().settings,
                &mut report,
            );
            report
                .findings
                .iter()
                .map(|finding| (finding.check, finding.level))
                .collect::<Vec<_>>()
        };
        assert!(levels().iter().all(|(_, level)| *level == Level::Fail));
        let kernel = kernel_with_note(b"Xen\0", 18, 0x100_0000);
        let mut image = vec![0; 2048];
        image[1024..1028].copy_from_slice(&EROFS_MAGIC);
        write(folder.path(), "usr/share/pericarp/vmlinux", &kernel, 0o644);
        write(
            folder.path(),
            "usr/share/pericarp/guest.erofs",
            &image,
            0o644,
        );
        write(
            folder.path(),
            "usr/libexec/pericarp/pericarp-vmm",
            b"x",
            0o755,
        );
        write(
            folder.path(),
            "usr/libexec/pericarp/virtiofsd",
            b"#!/bin/sh\necho virtiofsd 1.14.0\n",
            0o755,
        );
        assert!(
            levels().iter().all(|(_, level)| *level == Level::Ok),
            "{:?}",
            levels()
        );
        write(
            folder.path(),
            "usr/share/pericarp/guest.erofs",
            &[0; 2048],
            0o644,
        );
        write(
            folder.path(),
            "usr/libexec/pericarp/pericarp-vmm",
            b"x",
            0o644,
        );
        let failed: Vec<&str> = levels()
            .into_iter()
            .filter(|(_, level)| *level == Level::Fail)
            .map(|(check, _)| check)
            .collect();
        assert_eq!(failed, ["assets.image", "assets.vmm"]);
    }

    #[test]
    fn the_files_of_flavours_are_looked_at_too() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config.toml");
        let text = "[flavour.gpu.paths]\nkernel = '/k'\nmodules = '/drivers.erofs'\n";
        std::fs::write(&file, text).unwrap();
        let config = Config::load(Some(&file), false).unwrap();
        let found = || {
            let mut report = Report::default();
            let root = folder.path();
            check_flavours(Host { root }, &config, &mut report);
            let findings = report.findings.iter();
            findings
                .map(|finding| (finding.check, finding.level))
                .collect::<Vec<_>>()
        };
        let wanted = |level| vec![("assets.kernel", level), ("assets.modules", level)];
        assert_eq!(found(), wanted(Level::Fail));
        let kernel = kernel_with_note(b"Xen\0", 18, 0x100_0000);
        let mut image = vec![0; 2048];
        image[1024..1028].copy_from_slice(&EROFS_MAGIC);
        write(folder.path(), "k", &kernel, 0o644);
        write(folder.path(), "drivers.erofs", &image, 0o644);
        assert_eq!(found(), wanted(Level::Ok));
    }

    #[test]
    fn the_right_daemon_is_told_from_the_old_one() {
        let level = |text| {
            let mut report = Report::default();
            judge_virtiofsd(Path::new("/v"), text, &mut report);
            report.findings[0].level
        };
        assert_eq!(level("virtiofsd 1.14.0\n"), Level::Ok);
        assert_eq!(level("virtiofsd 1.5.0\n"), Level::Fail);
        assert_eq!(
            level("virtiofsd version 7.2.22\nFabrice Bellard and the QEMU Project developers"),
            Level::Fail
        );
        assert_eq!(level(""), Level::Warn);
    }
}
