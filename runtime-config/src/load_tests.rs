//! Which files are read, in which order, and what is said when that fails.

use super::*;

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[test]
fn drop_ins_are_laid_over_the_file_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    write(
        &file,
        "[vm]\ndefault_vcpus = 2\ndefault_memory_mib = 256\n[log]\nlevel = 'warn'\n",
    );
    let drop_in = |name: &str, text: &str| write(&folder.path().join("config.d").join(name), text);
    drop_in("20-b.toml", "[vm]\ndefault_vcpus = 4\n");
    drop_in(
        "10-a.toml",
        "[vm]\ndefault_vcpus = 3\ndefault_memory_mib = 128\n",
    );
    drop_in(".30-hidden.toml", "nonsense");
    drop_in("40-c.toml~", "nonsense");
    let settings = Config::load(Some(&file), true).unwrap().settings;
    assert_eq!(
        (settings.vm.default_vcpus, settings.vm.default_memory_mib),
        (4, 128)
    );
    assert_eq!(settings.log.level, crate::LogLevel::Warn);
    assert_eq!(
        Config::load(Some(&file), false)
            .unwrap()
            .settings
            .vm
            .default_vcpus,
        2
    );
}

#[test]
fn problems_of_all_files_are_told_together() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    write(&file, "[vm]\nx = 1\n");
    write(
        &folder.path().join("config.d/1.toml"),
        "\n[log]\nlewel = 'warn'\n",
    );
    let error = Config::load(Some(&file), true).unwrap_err().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert!(
        lines[0].ends_with("unknown key; the nearest valid key is `vm.huge_pages`")
            || lines[0].contains("config.toml:2:1: `vm.x`")
    );
    assert!(lines[1].contains(
        "config.d/1.toml:3:1: `log.lewel`: unknown key; the nearest valid key is `log.level`"
    ));
}

#[test]
fn a_named_file_must_exist_and_have_a_sensible_size() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    let error = Config::load(Some(&file), true).unwrap_err();
    assert!(
        matches!(&error, LoadError::Read { path, .. } if *path == file),
        "{error}"
    );
    write(
        &file,
        &"#".repeat(usize::try_from(FILE_BYTES_MAX).unwrap() + 1),
    );
    assert!(matches!(
        Config::load(Some(&file), true),
        Err(LoadError::TooLarge { .. })
    ));
    write(&file, "");
    for number in 0..=DROP_INS_MAX {
        write(&folder.path().join(format!("config.d/{number}.toml")), "");
    }
    assert!(matches!(
        Config::load(Some(&file), true),
        Err(LoadError::TooManyDropIns { .. })
    ));
}
