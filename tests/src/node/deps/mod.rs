//! Builds the real components at pinned versions, once, into the cache outside the checkout.
//!
//! Each component lies in `<cache>/node/<name>-<hash of its recipe>/`. A folder appears there by a
//! rename when everything in it is complete, so an interrupted build leaves nothing that looks
//! finished. A lock per component keeps two builds apart.

mod cargo;
mod go;
mod table;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use super::{paths, tools};

pub use table::{COMPONENTS, Component, Group, Recipe};

/// Hexadecimal digits of a hash that name a cache folder.
const KEY_DIGITS: usize = 16;

/// Shortens a hash of inputs to the key of a cache folder.
#[must_use]
pub fn cache_key(inputs: impl AsRef<[u8]>) -> String {
    let mut text = hex(&Sha256::digest(inputs.as_ref()));
    text.truncate(KEY_DIGITS);
    text
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

impl Component {
    /// Where it lies, built or not.
    pub fn folder(&self) -> Result<PathBuf> {
        let key = cache_key(format!("{:?}", self.recipe));
        Ok(paths::node_cache()?.join(format!("{}-{key}", self.name)))
    }

    /// Where it lies; an error that says what to do when it is not built.
    pub fn built(&self) -> Result<PathBuf> {
        let folder = self.folder()?;
        if !folder.is_dir() {
            bail!(
                "{} {} is not built ({} does not exist): run `make node-deps` or `node deps {}`",
                self.name,
                self.version(),
                folder.display(),
                self.group.name()
            );
        }
        Ok(folder)
    }
}

/// Finds a component by its name.
pub fn component(name: &str) -> Result<&'static Component> {
    let found = COMPONENTS.iter().find(|component| component.name == name);
    found.with_context(|| format!("there is no component {name}"))
}

/// Builds the missing components of the given groups; [`super::ensure`] makes their images too.
pub fn ensure(groups: &[Group]) -> Result<()> {
    tools::install_missing()?;
    let wanted = COMPONENTS.iter().filter(|c| groups.contains(&c.group));
    let wanted: Vec<&Component> = wanted.collect();
    for (index, component) in wanted.iter().enumerate() {
        let folder = component.folder()?;
        let place = format!("node deps [{}/{}]", index + 1, wanted.len());
        if folder.is_dir() {
            continue;
        }
        eprintln!(
            "{place}: {} {}: building (about {} s on two cores)",
            component.name,
            component.version(),
            component.seconds
        );
        let start = Instant::now();
        once(&folder, |partial| build(component, partial))
            .with_context(|| format!("cannot build {} {}", component.name, component.version()))?;
        eprintln!(
            "{place}: {} built in {} s",
            component.name,
            start.elapsed().as_secs()
        );
    }
    Ok(())
}

fn build(component: &Component, into: &Path) -> Result<()> {
    match &component.recipe {
        Recipe::Go(recipe) => go::build(component.name, recipe, into),
        Recipe::OwnGo(recipe) => go::build_own(component.name, recipe, into),
        Recipe::Cargo(recipe) => cargo::build(recipe, into),
    }
}

/// Makes `folder` by `make`, unless it is there: under a lock, in a partial folder renamed at the
/// end.
pub fn once(folder: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let beside = |suffix: &str| {
        let mut name = folder.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let lock_path = beside(".lock");
    let file = File::create(&lock_path)
        .with_context(|| format!("cannot make the lock {}", lock_path.display()))?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {}", lock_path.display()))?;
    if folder.is_dir() {
        return Ok(());
    }
    let partial = beside(".partial");
    remove(&partial)?;
    std::fs::create_dir_all(&partial)
        .with_context(|| format!("cannot make {}", partial.display()))?;
    let made = make(&partial);
    if let Err(error) = made {
        remove(&partial)?;
        return Err(error);
    }
    std::fs::rename(&partial, folder)
        .with_context(|| format!("cannot rename {} to its place", partial.display()))
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", folder.display())),
    }
}

/// Runs a build step; its output goes to `log`, and a failure names it.
fn step(command: &mut std::process::Command, what: &str, log: &Path) -> Result<()> {
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the build log {}", log.display()))?;
    {
        use std::io::Write;
        writeln!(file, "+ {command:?}").context("cannot write the build log")?;
    }
    let errors = file.try_clone().context("cannot share the build log")?;
    let status = command
        .stdin(std::process::Stdio::null())
        .stdout(file)
        .stderr(errors)
        .status();
    let status = status.with_context(|| format!("cannot start {what}"))?;
    if !status.success() {
        bail!(
            "{what} failed ({status}): its output is in {}",
            log.display()
        );
    }
    Ok(())
}

/// Where the output of a component's build goes: it stays after a failure.
fn build_log(name: &str) -> Result<PathBuf> {
    let log = paths::node_cache()?.join(format!("{name}.log"));
    File::create(&log).with_context(|| format!("cannot make the build log {}", log.display()))?;
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_build_leaves_nothing_that_looks_finished() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("thing-1");
        let failed = once(&folder, |partial| {
            std::fs::write(partial.join("half"), "").unwrap();
            bail!("no")
        });
        assert!(failed.is_err());
        assert!(!folder.exists());
        assert!(!cache.path().join("thing-1.partial").exists());
        once(&folder, |partial| {
            Ok(std::fs::write(partial.join("whole"), "")?)
        })
        .unwrap();
        assert!(folder.join("whole").exists());
        once(&folder, |_| bail!("must not run again")).unwrap();
    }

    #[test]
    fn the_driver_is_of_the_release_of_the_kubelet() {
        let recipe = |name| &component(name).unwrap().recipe;
        let (Recipe::Go(kubelet), Recipe::OwnGo(driver)) =
            (recipe("kubernetes"), recipe("dra-driver"))
        else {
            panic!("both are Go");
        };
        let line = format!(
            "\tk8s.io/dynamic-resource-allocation {}\n",
            kubelet.staging.unwrap()
        );
        assert!(driver.go_mod.contains(&line), "{}", driver.go_mod);
    }

    #[test]
    fn every_component_has_a_folder_of_its_own() {
        let mut folders: Vec<_> = COMPONENTS.iter().map(|c| c.folder().unwrap()).collect();
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), COMPONENTS.len());
    }
}
