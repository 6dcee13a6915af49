//! The command as a person or a script calls it: exit status and output go together.

use std::process::{Command, Output};

fn pericarp(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pericarp"))
        .args(arguments)
        .output()
        .expect("cargo has built the command for this test")
}

#[test]
fn the_status_of_check_agrees_with_its_document() {
    let output = pericarp(&["check", "--json"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["ok"] == true, output.status.success());
    let findings = document["findings"].as_array().unwrap();
    for check in [
        "kvm.device",
        "config",
        "kernel.tun",
        "cgroup",
        "assets.kernel",
    ] {
        assert!(
            findings.iter().any(|finding| finding["check"] == check),
            "{check}"
        );
    }
    // Whoever has to do something is told what.
    for finding in findings {
        assert_eq!(
            finding["level"] == "ok",
            finding.get("action").is_none(),
            "{finding}"
        );
    }
}

#[test]
fn a_wrong_configuration_is_told_a_line_each_with_status_1() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    std::fs::write(&file, "[vm]\nx = 1\ndefault_vcpus = 0\n").unwrap();
    let output = pericarp(&["config", "check", "--config", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    let places: Vec<&str> = text
        .lines()
        .map(|line| line.split(": ").next().unwrap())
        .collect();
    let expected = [":2:1", ":3:17"].map(|place| format!("{}{place}", file.display()));
    assert_eq!(places, expected, "{text}");
}

#[test]
fn other_failures_go_to_standard_error() {
    let output = pericarp(&["config", "check", "--config", "/nonexistent/config.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("/nonexistent/config.toml"), "{text}");
    assert_eq!(pericarp(&["no-such-command"]).status.code(), Some(2));
    assert!(pericarp(&["version"]).status.success());
    assert!(
        pericarp(&["list", "--run-dir", "/nonexistent"])
            .status
            .success()
    );
}
