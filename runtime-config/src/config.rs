//! The configuration of a node, and of one pod on it.

use std::collections::BTreeMap;

use crate::keys::{self, Settings};
use crate::kind::Value;
use crate::nearest::nearest;
use crate::problem::{Place, Problem};
use crate::raw::Layer;

/// The configuration of a node: what every pod gets unless its flavour or its annotations say
/// otherwise.
#[derive(Clone, Debug)]
pub struct Config {
    /// Settings of a pod without annotations, with the chosen flavour in them.
    pub settings: Settings,
    /// The flavour that was chosen.
    pub flavour: Option<String>,
    base: Layer,
    flavours: BTreeMap<String, Layer>,
}

/// The configuration of one pod.
#[derive(Clone, Debug)]
pub struct PodConfig {
    /// Settings, with the pod's overrides in them.
    pub settings: Settings,
    /// The flavour that was chosen.
    pub flavour: Option<String>,
    /// Keys that the pod's annotations set.
    pub overridden: Vec<&'static str>,
}

/// A flavour that the configuration does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no flavour {name:?} in the configuration{}; add a table [flavour.{name}.<section>] or change \
        `flavour` in \
     the options of containerd's runtime handler",
    .nearest.as_ref().map_or(String::new(), |nearest| format!(" (the nearest is {nearest:?})"))
)]
pub struct FlavourError {
    /// What was asked for.
    pub name: String,
    /// The nearest flavour that exists.
    pub nearest: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self::build(Layer::new(), BTreeMap::new())
            .expect("a test proves that the defaults do not contradict each other")
    }
}

impl Config {
    /// Puts layers together; the problems are contradictions between keys.
    pub(crate) fn build(
        base: Layer,
        flavours: BTreeMap<String, Layer>,
    ) -> Result<Self, Vec<Problem>> {
        let settings = settings(&base);
        let mut problems = contradictions(&settings, &base);
        for (name, layer) in &flavours {
            let merged = over(&base, layer);
            for mut problem in contradictions(&self::settings(&merged), &merged) {
                problem.message = format!("in flavour {name:?}: {}", problem.message);
                problems.push(problem);
            }
        }
        if problems.is_empty() {
            Ok(Self {
                settings,
                flavour: None,
                base,
                flavours,
            })
        } else {
            Err(problems)
        }
    }

    /// The names of all flavours.
    pub fn flavours(&self) -> impl Iterator<Item = &str> {
        self.flavours.keys().map(String::as_str)
    }

    /// The same configuration with a flavour's settings laid over it.
    pub fn with_flavour(mut self, name: &str) -> Result<Self, FlavourError> {
        let Some(layer) = self.flavours.get(name) else {
            let nearest = nearest(name, self.flavours.keys().map(String::as_str));
            return Err(FlavourError {
                name: name.to_owned(),
                nearest: nearest.map(str::to_owned),
            });
        };
        self.base = over(&self.base, layer);
        self.settings = settings(&self.base);
        self.flavour = Some(name.to_owned());
        Ok(self)
    }

    /// The value of a key and the place that set it; `None` for the default's place.
    #[must_use]
    pub fn value(&self, key: &'static str) -> Option<(Value, Option<&Place>)> {
        match self.base.get(key) {
            Some((value, place)) => Some((value.clone(), Some(place))),
            None => keys::key(key).map(|key| (key.default_value(), None)),
        }
    }

    pub(crate) fn with_overrides(&self, overrides: &BTreeMap<&'static str, Value>) -> Settings {
        Settings::of(|path| {
            overrides
                .get(path)
                .cloned()
                .unwrap_or_else(|| in_layer(&self.base, path))
        })
    }
}

fn in_layer(layer: &Layer, path: &'static str) -> Value {
    match layer.get(path) {
        Some((value, _)) => value.clone(),
        None => keys::key(path)
            .expect("only the table's own paths are looked up")
            .default_value(),
    }
}

fn settings(layer: &Layer) -> Settings {
    Settings::of(|path| in_layer(layer, path))
}

fn over(base: &Layer, layer: &Layer) -> Layer {
    let mut merged = base.clone();
    merged.extend(layer.iter().map(|(key, value)| (*key, value.clone())));
    merged
}

fn contradictions(settings: &Settings, layer: &Layer) -> Vec<Problem> {
    contradiction_rules(settings)
        .map(|(keys, message)| {
            // The place of the first of the two keys that a file sets: that is what the operator
            // can change.
            let placed = keys
                .iter()
                .find_map(|key| layer.get(key).map(|(_, place)| (*key, place)));
            let key = placed.map_or(keys[0], |(key, _)| key);
            Problem {
                place: placed.map(|(_, place)| place.clone()),
                key: key.to_owned(),
                message,
            }
        })
        .collect()
}

/// Keys that are each in range and yet cannot hold together.
pub(crate) fn contradiction_rules(
    settings: &Settings,
) -> impl Iterator<Item = ([&'static str; 2], String)> {
    let vm = &settings.vm;
    let at_most = |name: &'static str, value: u64, max_name: &'static str, max: u64| {
        (max != 0 && value > max).then(|| {
            (
                [name, max_name],
                format!("`{name}` = {value} is more than `{max_name}` = {max}"),
            )
        })
    };
    [
        at_most(
            "vm.default_vcpus",
            vm.default_vcpus.into(),
            "vm.max_vcpus",
            vm.max_vcpus.into(),
        ),
        at_most(
            "vm.default_memory_mib",
            vm.default_memory_mib + vm.guest_reserve_mib,
            "vm.max_memory_mib",
            vm.max_memory_mib,
        ),
        at_most(
            "vm.min_memory_mib",
            vm.min_memory_mib,
            "vm.max_memory_mib",
            vm.max_memory_mib,
        ),
    ]
    .into_iter()
    .flatten()
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
