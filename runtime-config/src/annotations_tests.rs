//! Which annotations a pod may carry, and what is said of the others.

use std::path::Path;

use proptest::prelude::*;

use super::*;

fn config() -> Config {
    let text = "[vm]\nmax_vcpus = 8\n[security]\nallowed_annotations = \
                ['vm.default_vcpus', 'vm.huge_pages', 'vm.free_page_reporting', \
                'kernel.extra_parameters']";
    Config::from_texts([(Path::new("c.toml"), text)]).unwrap()
}

fn for_pod(pairs: &[(&str, &str)]) -> Result<PodConfig, String> {
    let annotations = pairs
        .iter()
        .map(|(name, text)| ((*name).into(), (*text).into()))
        .collect();
    config()
        .for_pod(&annotations)
        .map_err(|error| error.to_string())
}

#[test]
fn allowed_annotations_override_and_foreign_ones_are_ignored() {
    let pod = for_pod(&[
        ("pericarp.dev/vm.default_vcpus", "4"),
        ("pericarp.dev/vm.huge_pages", "2M"),
        ("pericarp.dev.example.org/vm.default_vcpus", "x"),
        ("io.kubernetes.cri.sandbox-id", "x"),
        ("", ""),
    ])
    .unwrap();
    assert_eq!(pod.settings.vm.default_vcpus, 4);
    assert_eq!(pod.settings.vm.huge_pages, crate::HugePages::Size2Mib);
    assert_eq!(pod.overridden, ["vm.default_vcpus", "vm.huge_pages"]);
    assert_eq!(for_pod(&[]).unwrap().settings, config().settings);
}

#[test]
fn each_refusal_names_the_annotation_and_the_way_out() {
    let table = [
        (
            "pericarp.dev/vm.default_vcpu",
            "4",
            "unknown annotation \"pericarp.dev/vm.default_vcpu\"; the nearest valid one is \
                \"pericarp.dev/vm.default_vcpus\"",
        ),
        (
            "pericarp.dev/",
            "4",
            "unknown annotation \"pericarp.dev/\"; the nearest valid one is",
        ),
        (
            "pericarp.dev/paths.kernel",
            "/k",
            "annotation \"pericarp.dev/paths.kernel\": only the node's configuration can set this \
                key",
        ),
        (
            "pericarp.dev/vm.default_memory_mib",
            "1",
            "annotation \"pericarp.dev/vm.default_memory_mib\" is not allowed on this node; its \
                operator can add \"vm.default_memory_mib\" to `security.allowed_annotations`",
        ),
        (
            "pericarp.dev/vm.default_vcpus",
            "0",
            "annotation \"pericarp.dev/vm.default_vcpus\": found 0; allowed: 1 to 256",
        ),
        (
            "pericarp.dev/vm.default_vcpus",
            "+1",
            "found \"+1\"; allowed: 1 to 256",
        ),
        (
            "pericarp.dev/vm.default_vcpus",
            " 1",
            "found \" 1\"; allowed: 1 to 256",
        ),
        (
            "pericarp.dev/vm.default_vcpus",
            "",
            "found \"\"; allowed: 1 to 256",
        ),
        (
            "pericarp.dev/vm.default_vcpus",
            "99999999999999999999",
            "found \"99999999999999999999\"",
        ),
        (
            "pericarp.dev/vm.default_vcpus",
            "9",
            "annotation \"pericarp.dev/vm.default_vcpus\": `vm.default_vcpus` = 9 is more than \
                `vm.max_vcpus` = 8",
        ),
        (
            "pericarp.dev/vm.free_page_reporting",
            "yes",
            "found \"yes\"; allowed: true or false",
        ),
        (
            "pericarp.dev/kernel.extra_parameters",
            "a\nb",
            "found \"a\\nb\"; allowed: printable ASCII",
        ),
    ];
    for (name, text, expected) in table {
        let error = for_pod(&[(name, text)]).unwrap_err();
        assert!(error.contains(expected), "{error}\n{expected}");
    }
}

#[test]
fn nothing_is_allowed_by_default() {
    for key in KEYS {
        let annotations = [(
            format!("{ANNOTATION_PREFIX}{}", key.path),
            key.default.to_owned(),
        )]
        .into();
        assert!(
            Config::default().for_pod(&annotations).is_err(),
            "{}",
            key.path
        );
    }
}

#[test]
fn every_overridable_key_works_once_it_is_allowed() {
    for key in KEYS.iter().filter(|key| key.pod_may_override) {
        let text = format!("[security]\nallowed_annotations = [{:?}]", key.path);
        let config = Config::from_texts([(Path::new("c"), text.as_str())]).unwrap();
        let annotations = [(
            format!("{ANNOTATION_PREFIX}{}", key.path),
            key.default.to_owned(),
        )]
        .into();
        assert_eq!(
            config.for_pod(&annotations).unwrap().settings,
            config.settings,
            "{}",
            key.path
        );
    }
}

proptest! {
    #[test]
    fn no_annotation_panics_and_errors_stay_short(
        name in "pericarp\\.dev/(\\PC{0,300}|[a-z]{1,9}\\.[a-z_]{1,20}|vm\\.default_vcpus|\
                 kernel\\.extra_parameters)",
        text in "\\PC{0,300}|[0-9,+-]{0,30}",
    ) {
        match config().for_pod(&[(name.clone(), text)].into()) {
            Ok(pod) => {
                prop_assert!((1..=8).contains(&pod.settings.vm.default_vcpus));
                prop_assert_eq!(pod.overridden.len(), 1);
            }
            // Escaping makes at most ten characters of one.
            Err(error) => prop_assert!(error.to_string().len() < 1200),
        }
    }

    #[test]
    fn a_number_in_range_is_taken_and_any_other_is_refused(number in 0u64..600) {
        let text = number.to_string();
        let pod = for_pod(&[("pericarp.dev/vm.default_vcpus", text.as_str())]);
        prop_assert_eq!(pod.is_ok(), (1..=8).contains(&number));
    }

    #[test]
    fn lists_round_trip(features in proptest::collection::vec("[+-][a-z0-9_]{1,32}", 0..64)) {
        let kind = keys::key("vm.cpu_features").unwrap().kind;
        let parsed = kind.parse_text(&features.join(",")).unwrap();
        prop_assert_eq!(parsed, crate::kind::Value::List(features));
    }

    #[test]
    fn distance_is_a_metric_on_short_names(a in "[a-c]{0,6}", b in "[a-c]{0,6}") {
        use crate::nearest::distance;
        prop_assert_eq!(distance(&a, &b), distance(&b, &a));
        prop_assert_eq!(distance(&a, &b) == 0, a == b);
        prop_assert!(distance(&a, &b) <= a.len().max(b.len()));
    }
}
