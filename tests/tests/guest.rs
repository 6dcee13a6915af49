//! The recipes of the guest: the image is the same bit for bit, and what is wrong fails in one
//! line.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// The tests need a static program in the agent's place, not the agent; Debian's packages hold one.
const STATIC_PROGRAM: &str = "/bin/busybox";

fn recipe(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../rootfs")
        .join(name)
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder can be made")
}

fn build_image(agent: &Path, out: &Path) -> Output {
    Command::new(recipe("image/build"))
        .arg("--agent")
        .arg(agent)
        .arg("--out")
        .arg(out)
        .output()
        .expect("the recipe starts")
}

/// Runs `check-config` on two files with these contents.
fn check_config(asked: &str, got: &str) -> Output {
    let folder = folder();
    fs::write(folder.path().join("asked"), asked).expect("a file can be written");
    fs::write(folder.path().join("got"), got).expect("a file can be written");
    Command::new(recipe("kernel/check-config"))
        .arg(folder.path().join("asked"))
        .arg(folder.path().join("got"))
        .output()
        .expect("the recipe starts")
}

#[test]
fn image_is_reproducible() {
    let folder = folder();
    let mut images = Vec::new();
    for name in ["one", "another"] {
        let agent = folder.path().join(name);
        fs::copy(STATIC_PROGRAM, &agent).expect("busybox-static is installed");
        let out = folder.path().join(format!("{name}-out"));
        let output = build_image(&agent, &out);
        assert!(output.status.success(), "{output:?}");
        images.push(
            ["guest.erofs", "guest.cpio"]
                .map(|file| fs::read(out.join(file)).expect("the recipe has made the image")),
        );
        let left = fs::read_dir(&out).expect("the folder is readable").count();
        assert_eq!(left, 2, "only the two images are left in {}", out.display());
    }
    assert!(
        images[0] == images[1],
        "the same agent gives the same bytes"
    );
}

#[test]
fn image_fits_pages_of_pmem() {
    let folder = folder();
    let output = build_image(Path::new(STATIC_PROGRAM), folder.path());
    assert!(output.status.success(), "{output:?}");
    let image = fs::read(folder.path().join("guest.erofs")).expect("the recipe has made it");
    assert_eq!(image.len() % (2 << 20), 0);
    // EROFS on-disk format: the superblock's magic number at byte 1024.
    assert_eq!(image[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
}

#[test]
fn missing_agent_is_one_line() {
    let folder = folder();
    let output = build_image(&folder.path().join("nowhere"), folder.path());
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(words.lines().count(), 1, "{words}");
    assert!(
        words.contains("there is no agent at") && words.contains("--agent"),
        "{words}"
    );
    let left = fs::read_dir(folder.path())
        .expect("the folder is readable")
        .count();
    assert_eq!(left, 0, "nothing is left behind");
}

#[test]
fn dynamic_agent_is_refused() {
    let folder = folder();
    let output = build_image(Path::new("/bin/ls"), folder.path());
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("is not static"), "{words}");
}

#[test]
fn config_that_has_all_is_accepted() {
    let output = check_config(
        "CONFIG_A=y\nCONFIG_N=64\nCONFIG_S=\"x y\"\nCONFIG_OFF=n\nCONFIG_GONE=n\n",
        "CONFIG_A=y\nCONFIG_N=64\nCONFIG_S=\"x y\"\n# CONFIG_OFF is not set\n",
    );
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn config_that_lacks_an_option_is_refused() {
    for (asked, got, word) in [
        (
            "CONFIG_A=y\n",
            "# CONFIG_A is not set\n",
            "CONFIG_A=y is asked",
        ),
        ("CONFIG_A=y\n", "CONFIG_AB=y\n", "unknown"),
        ("CONFIG_N=256\n", "CONFIG_N=64\n", "CONFIG_N=64"),
        ("CONFIG_A=n\n", "CONFIG_A=y\n", "asked to be off"),
    ] {
        let output = check_config(asked, got);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{asked} {got}");
        assert!(words.contains(word), "{asked} {got}: {words}");
    }
}

#[test]
fn kernel_source_with_a_wrong_sum_is_refused() {
    let folder = folder();
    let tarball = folder.path().join("linux.tar.xz");
    fs::write(&tarball, "not a kernel").expect("a file can be written");
    let output = Command::new(recipe("kernel/build"))
        .env("PERICARP_CACHE", folder.path().join("cache"))
        .env("KERNEL_SOURCE", &tarball)
        .output()
        .expect("the recipe starts");
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(words.lines().count(), 1, "{words}");
    assert!(
        words.contains("sha256") && words.contains("source.pin"),
        "{words}"
    );
}

#[test]
fn unknown_kernel_flavour_names_the_known() {
    let folder = folder();
    let output = Command::new(recipe("kernel/build"))
        .env("PERICARP_CACHE", folder.path())
        .env("FLAVOUR", "vanilla")
        .output()
        .expect("the recipe starts");
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("default passthrough"), "{words}");
}
