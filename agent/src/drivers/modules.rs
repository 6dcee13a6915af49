//! `modules.load` of a driver image: which modules the guest's kernel loads, in which order.
//!
//! ```text
//! # comment
//! modules/i2c-algo-bit.ko
//! modules/igb.ko max_vfs=0
//! ```

use std::{ffi::CString, path::Path};

use super::is_beneath;

/// Its name in the image.
pub(super) const LIST: &str = "modules.load";

/// Largest list in bytes: each of its modules may have a page of parameters.
pub(super) const LIST_BYTES_MAX: u64 = 1 << 20;

/// Modules of one image. The largest of vendors' drivers have a dozen.
const MODULES_MAX: usize = 256;

/// Longest parameters of a module in bytes.
const PARAMETERS_BYTES_MAX: usize = 4096;

/// A line: a file of the image that the kernel must load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// Where it stands, from 1 on.
    pub(super) line: usize,
    /// Relative to the image's root, and beneath it.
    pub(super) path: String,
    /// As the kernel takes them (Documentation/admin-guide/kernel-parameters.rst).
    pub(super) parameters: CString,
}

/// Reads the list. The error is of the line with that number.
pub(super) fn parse(text: &str) -> Result<Vec<Module>, (usize, String)> {
    let mut modules: Vec<Module> = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if modules.len() == MODULES_MAX {
            return Err((line, format!("there are more than {MODULES_MAX} modules")));
        }
        let module = parse_line(line, text).map_err(|reason| (line, reason))?;
        if let Some(other) = modules.iter().find(|other| other.path == module.path) {
            let reason = format!("{} stands in line {} already", module.path, other.line);
            return Err((line, reason));
        }
        modules.push(module);
    }
    Ok(modules)
}

fn parse_line(line: usize, text: &str) -> Result<Module, String> {
    let (path, parameters) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    if !is_beneath(path) {
        return Err(format!(
            "{path:?} is not a path in the image: write it relative to the image's root, \
                without `..`"
        ));
    }
    match Path::new(path)
        .extension()
        .and_then(|ending| ending.to_str())
    {
        Some("ko") => {}
        Some("xz" | "gz" | "zst") => {
            return Err(format!("{path} is compressed: unpack it in the image"));
        }
        _ => {
            return Err(format!(
                "{path} is not a module: its name does not end in .ko"
            ));
        }
    }
    let parameters = parameters.trim_start();
    if parameters.len() > PARAMETERS_BYTES_MAX {
        let reason = format!("parameters of more than {PARAMETERS_BYTES_MAX} bytes");
        return Err(reason);
    }
    let parameters = CString::new(parameters).map_err(|_| "it holds a NUL".to_owned())?;
    Ok(Module {
        line,
        path: path.to_owned(),
        parameters,
    })
}

/// The kernel's name of a module in this file: it writes it before what it says about the module.
pub(super) fn name(path: &str) -> String {
    let stem = Path::new(path).file_stem().and_then(|stem| stem.to_str());
    stem.unwrap_or_default().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_in_its_order() {
        let text = "# what igb needs\n\nb/i2c-algo-bit.ko\n  a/igb.ko \t max_vfs=2 debug=\"1 2\"\n";
        let modules = parse(text).unwrap();
        let found: Vec<_> = modules
            .iter()
            .map(|one| {
                (
                    one.line,
                    one.path.as_str(),
                    one.parameters.to_str().unwrap(),
                )
            })
            .collect();
        let wanted = [
            (3, "b/i2c-algo-bit.ko", ""),
            (4, "a/igb.ko", "max_vfs=2 debug=\"1 2\""),
        ];
        assert_eq!(found, wanted);
        assert_eq!(name(&modules[0].path), "i2c_algo_bit");
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let long = format!("a.ko {}", "x".repeat(PARAMETERS_BYTES_MAX + 1));
        let many: String = (0..=MODULES_MAX)
            .map(|number| format!("{number}.ko\n"))
            .collect();
        for (text, line, words) in [
            ("a.ko\n../b.ko", 2, "not a path in the image"),
            ("/a.ko", 1, "not a path in the image"),
            ("#\n\na/./../b.ko", 3, "not a path in the image"),
            ("a.ko.xz", 1, "unpack it"),
            ("a.so", 1, ".ko"),
            ("a.ko\nb.ko\na.ko x=1", 3, "line 1 already"),
            ("a.ko x\0", 1, "NUL"),
            (long.as_str(), 1, "4096 bytes"),
            (many.as_str(), 257, "more than 256"),
        ] {
            let (found, reason) = parse(text).unwrap_err();
            assert_eq!(found, line, "{reason}");
            assert!(reason.contains(words), "{reason}");
        }
    }
}
