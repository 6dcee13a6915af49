//! What the parser says of wrong files: the place, the key and the way out.

use super::*;

fn problems(text: &str) -> Vec<String> {
    parse(Path::new("c.toml"), text)
        .problems
        .iter()
        .map(Problem::to_string)
        .collect()
}

#[test]
fn a_right_file_gives_values_with_places() {
    let text = "# c\n[vm]\ndefault_vcpus = 0x02\n  huge_pages = \
        \"2M\"\n[flavour.gpu.paths]\ninitramfs='/m'\n";
    let parsed = parse(Path::new("c.toml"), text);
    assert_eq!(parsed.problems, []);
    let (value, place) = &parsed.base["vm.default_vcpus"];
    assert_eq!(
        (value, place.line, place.column),
        (&Value::Integer(2), 3, 1)
    );
    let (value, place) = &parsed.base["vm.huge_pages"];
    assert_eq!(
        (value, place.line, place.column),
        (&Value::Text("2M".into()), 4, 3)
    );
    assert_eq!(
        parsed.flavours["gpu"]["paths.initramfs"].0,
        Value::Text("/m".into())
    );
}

#[test]
fn each_mistake_names_place_key_and_way_out() {
    let table = [
        (
            "[vm]\ndefault_vcpu = 1",
            "c.toml:2:1: `vm.default_vcpu`: unknown key; the nearest valid key is \
                `vm.default_vcpus`",
        ),
        (
            "[vm]\nmax_mib = 1",
            "c.toml:2:1: `vm.max_mib`: unknown key; the nearest valid key is `vm.max_vcpus`",
        ),
        (
            "[vm]\nqueues = 1",
            "c.toml:2:1: `vm.queues`: unknown key; did you mean `network.queues`?",
        ),
        (
            "[vn]\nqueues = 1",
            "c.toml:1:2: `vn`: unknown table; the nearest valid one is [vm]",
        ),
        (
            "\n queues = 1",
            "c.toml:2:2: `queues`: unknown key; the nearest valid key is `network.queues`, which \
                stands in a table of its section",
        ),
        ("vm = 1", "c.toml:1:1: `vm`: is a table: write [vm]"),
        (
            "[vm]\ndefault_vcpus = 0",
            "c.toml:2:17: `vm.default_vcpus`: found 0; allowed: 1 to 256",
        ),
        (
            "[vm]\ndefault_vcpus = -1",
            "c.toml:2:17: `vm.default_vcpus`: found -1; allowed: 1 to 256",
        ),
        (
            "[vm]\ndefault_vcpus = 1.5",
            "c.toml:2:17: `vm.default_vcpus`: found a float; allowed: 1 to 256",
        ),
        (
            "[vm]\ndefault_vcpus = \"1\"",
            "c.toml:2:17: `vm.default_vcpus`: found \"1\"; allowed: 1 to 256",
        ),
        (
            "[vm]\ndefault_memory_mib = 99999999999",
            "c.toml:2:22: `vm.default_memory_mib`: found 99999999999; allowed: 1 to 4194304 MiB",
        ),
        (
            "[vm]\nhuge_pages = \"2m\"",
            "c.toml:2:14: `vm.huge_pages`: found \"2m\"; allowed: one of \"none\", \"2M\", \"1G\"",
        ),
        (
            "[vm]\nfree_page_reporting = 1",
            "c.toml:2:23: `vm.free_page_reporting`: found 1; allowed: true or false",
        ),
        (
            "[vm]\ncpu_features = [\"xsave\"]",
            "c.toml:2:16: `vm.cpu_features`: found \"xsave\"; allowed: a list of at most 64 CPU \
                features, each \"+name\" or \"-name\"",
        ),
        (
            "[vm]\ncpu_features = [1]",
            "c.toml:2:16: `vm.cpu_features`: found a list with an integer; allowed: a list of at \
                most 64 CPU features, each \"+name\" or \"-name\"",
        ),
        (
            "[paths]\nkernel = \"vmlinux\"",
            "c.toml:2:10: `paths.kernel`: found \"vmlinux\"; allowed: an absolute path without \
                `..`",
        ),
        (
            "[paths]\nkernel = \"/a/../b\"",
            "c.toml:2:10: `paths.kernel`: found \"/a/../b\"; allowed: an absolute path without \
                `..`",
        ),
        (
            "[paths]\nkernel = 1979-05-27",
            "c.toml:2:10: `paths.kernel`: found a datetime; allowed: an absolute path without `..`",
        ),
        (
            "[security]\nallowed_annotations = [\"vm.default_vcpu\"]",
            "c.toml:2:23: `security.allowed_annotations`: found \"vm.default_vcpu\"; allowed: \
                keys that a pod may override; the nearest is \"vm.default_vcpus\"",
        ),
        (
            "[security]\nallowed_annotations = [\"paths.kernel\"]",
            "c.toml:2:23: `security.allowed_annotations`: found \"paths.kernel\"; allowed: only \
                keys that a pod may override, and this one is the node's alone",
        ),
        (
            "[flavour.gpu.vm]\ndefault_vcpu = 1",
            "c.toml:2:1: `flavour.gpu.vm.default_vcpu`: unknown key; the nearest valid key is \
                `vm.default_vcpus`",
        ),
        (
            "[flavour.gpu]\nkernel = '/k'",
            "c.toml:2:1: `flavour.gpu.kernel`: is a table: write [flavour.gpu.kernel]",
        ),
        (
            "[flavour]\ngpu = 1",
            "c.toml:2:1: `flavour.gpu`: write its settings in tables: [flavour.gpu.<section>]",
        ),
        (
            "flavour = 1",
            "c.toml:1:1: `flavour`: write a table for each flavour: [flavour.<name>.<section>]",
        ),
        (
            "[flavour.Gpu.vm]",
            "c.toml:1:10: `\"flavour.Gpu\"`: a flavour's name is 1 to 63 of a-z, 0-9, `-` and `.`, \
             like a RuntimeClass handler",
        ),
    ];
    for (text, expected) in table {
        assert_eq!(problems(text), [expected], "{text}");
    }
}

#[test]
fn a_text_that_is_no_toml_has_its_place_and_a_double_key_is_refused() {
    assert!(problems("[vm]\nx = = 1")[0].starts_with("c.toml:2:5: not TOML: "));
    assert!(
        problems("[vm]\nqueues=1\nqueues=2")[0].starts_with("c.toml:3:1: not TOML: duplicate key")
    );
}

#[test]
fn all_mistakes_are_told_at_once_up_to_a_bound() {
    assert_eq!(
        problems("[vm]\na = 1\nb = 2\n[log]\nlevel = 'loud'").len(),
        3
    );
    let many: String = (0..200).map(|number| format!("x{number} = 1\n")).collect();
    assert_eq!(problems(&many).len(), PROBLEMS_MAX);
}

proptest::proptest! {
    #[test]
    fn no_text_panics_and_places_are_inside(
        text in "\\PC{0,200}|(\\[[a-z.]{1,12}\\]\n?|\
                 [a-z_]{1,8} ?= ?[0-9\"'a-z\\[\\]]{0,6}\n?){0,8}",
    ) {
        for problem in parse(Path::new("c"), &text).problems {
            let place = problem.place.unwrap();
            proptest::prop_assert!(place.line <= text.matches('\n').count() + 1);
        }
    }
}
