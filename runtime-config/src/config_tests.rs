//! The table itself, flavours and contradictions.

use std::path::Path;

use super::*;
use crate::keys::KEYS;
use crate::kind::Kind;
use crate::load::LoadError;

fn load(text: &str) -> Result<Config, String> {
    Config::from_texts([(Path::new("c.toml"), text)]).map_err(|error: LoadError| error.to_string())
}

#[test]
fn every_row_has_a_default_of_its_kind_and_paths_are_unique() {
    for key in KEYS {
        assert!(key.kind.parse_text(key.default).is_ok(), "{}", key.path);
        assert_eq!(
            KEYS.iter().filter(|other| other.path == key.path).count(),
            1
        );
        assert!(!(matches!(key.kind, Kind::Path | Kind::OptionalPath) && key.pod_may_override));
    }
    // Also proves that each row's kind fits its field's type.
    let defaults = Config::default().settings;
    assert_eq!(defaults.vm.default_memory_mib, 512);
    assert!(defaults.security.allowed_annotations.is_empty());
    assert!(defaults.security.passthrough_devices.is_empty());
}

#[test]
fn every_end_of_every_range_fits_its_field() {
    for key in KEYS {
        let Kind::Integer { min, max, .. } = key.kind else {
            continue;
        };
        for number in [min, max] {
            Settings::of(|path| {
                if path == key.path {
                    Value::Integer(number)
                } else {
                    in_layer(&Layer::new(), path)
                }
            });
        }
    }
}

#[test]
fn the_node_has_room_for_all_user_ids_of_vmms() {
    let ends: Vec<u64> = ["security.vmm_uid_base", "security.vmm_uid_count"]
        .iter()
        .map(|path| match keys::key(path).unwrap().kind {
            Kind::Integer { max, .. } => max,
            other => panic!("{other:?}"),
        })
        .collect();
    // Beyond 2^31 - 1 tools that keep ids in signed numbers fail.
    assert!(ends.iter().sum::<u64>() < 1 << 31);
}

#[test]
fn a_flavour_lies_over_the_base() {
    let text = "[vm]\ndefault_vcpus = 2\n[flavour.gpu.vm]\ndefault_memory_mib = 4096\n";
    let config = load(text).unwrap();
    assert_eq!(config.settings.vm.default_memory_mib, 512);
    assert_eq!(config.flavours().collect::<Vec<_>>(), ["gpu"]);
    let gpu = config.clone().with_flavour("gpu").unwrap();
    assert_eq!(
        (
            gpu.settings.vm.default_vcpus,
            gpu.settings.vm.default_memory_mib
        ),
        (2, 4096)
    );
    assert_eq!(gpu.flavour.as_deref(), Some("gpu"));
    let pod = gpu.for_pod(&BTreeMap::new()).unwrap();
    assert_eq!(
        (pod.settings.vm.default_memory_mib, pod.flavour.as_deref()),
        (4096, Some("gpu"))
    );
    let error = config.with_flavour("cpu").unwrap_err().to_string();
    assert!(
        error.contains("\"cpu\"") && error.contains("\"gpu\""),
        "{error}"
    );
}

#[test]
fn contradictions_name_both_keys_and_the_place() {
    let error = load("[vm]\nmax_vcpus = 2\ndefault_vcpus = 4").unwrap_err();
    assert_eq!(
        error,
        "c.toml:3:1: `vm.default_vcpus`: `vm.default_vcpus` = 4 is more than `vm.max_vcpus` = 2"
    );
    let error = load("[flavour.s.vm]\nmax_memory_mib = 100").unwrap_err();
    assert!(
        error.starts_with("c.toml:2:1: `vm.max_memory_mib`: in flavour \"s\": "),
        "{error}"
    );
    assert!(load("[vm]\nmax_memory_mib = 64").is_err());
}

#[test]
fn a_value_is_told_with_its_place() {
    let config = load("[log]\nlevel = 'debug'").unwrap();
    let (value, place) = config.value("log.level").unwrap();
    assert_eq!(
        (value, place.unwrap().line),
        (Value::Text("debug".into()), 2)
    );
    assert_eq!(
        config.value("log.guest_kernel").unwrap(),
        (Value::Bool(true), None)
    );
    assert_eq!(config.value("log.lewel"), None);
}
