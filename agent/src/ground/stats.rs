//! Figures of a container or of the whole pod: cgroup v2 files, pressure, network devices, file
//! systems.
//!
//! Parsers are pure functions of a file's text. A file that is not there (a controller the kernel
//! lacks) leaves zeroes.

use std::path::Path;

use nix::sys::statvfs::statvfs;
use pericarp_protocol::guest::{
    CpuStats, FileSystemStats, HugePageStats, IoStats, MemoryStats, NetworkStats, Pressure,
    PressureLine, StatsResponse,
};

use super::{clock, files};

/// Devices with I/O figures, page sizes, and network devices that are reported, of each.
const LISTED_MAX: usize = 1024;

/// The figures of one cgroup. `file_systems` are mount points whose space is reported.
pub(crate) fn of_cgroup(cgroup: &Path, file_systems: &[impl AsRef<Path>]) -> StatsResponse {
    let text = |name: &str| files::read(cgroup.join(name)).unwrap_or_default();
    StatsResponse {
        taken_at_ns: clock::wall_clock_ns(),
        cpu: Some(CpuStats {
            pressure: pressure(&text("cpu.pressure")),
            ..cpu(&text("cpu.stat"))
        })
        .into(),
        memory: Some(memory(&text)).into(),
        pids_current: number(&text("pids.current")).unwrap_or(0),
        pids_limit: number(&text("pids.max")).unwrap_or(0),
        io: io(&text("io.stat")),
        io_pressure: pressure(&text("io.pressure")),
        huge_pages: huge_pages(cgroup),
        networks: networks(&files::read("/proc/net/dev").unwrap_or_default()),
        file_systems: file_systems
            .iter()
            .filter_map(|path| file_system(path.as_ref()))
            .collect(),
        ..Default::default()
    }
}

/// Memory of the machine: in all, and what could be had without swapping.
pub(crate) fn memory_total_and_available() -> (u64, u64) {
    let text = files::read("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse::<u64>()
                    .ok()
            })
            .map_or(0, |kibibytes| kibibytes * 1024)
    };
    (bytes("MemTotal:"), bytes("MemAvailable:"))
}

/// The number in a file; `None` for "max".
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Lines of a name and a number.
fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name, value.trim().parse().ok()?))
    })
}

fn cpu(text: &str) -> CpuStats {
    let mut cpu = CpuStats::default();
    for (name, value) in pairs(text) {
        match name {
            "usage_usec" => cpu.usage_us = value,
            "user_usec" => cpu.user_us = value,
            "system_usec" => cpu.system_us = value,
            "nr_periods" => cpu.periods = value,
            "nr_throttled" => cpu.throttled_periods = value,
            "throttled_usec" => cpu.throttled_us = value,
            _ => {}
        }
    }
    cpu
}

fn memory(text: &impl Fn(&str) -> String) -> MemoryStats {
    let owned = |name| {
        pairs(&text(name))
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    };
    MemoryStats {
        usage_bytes: number(&text("memory.current")).unwrap_or(0),
        limit_bytes: number(&text("memory.max")).unwrap_or(u64::MAX),
        peak_bytes: number(&text("memory.peak")).unwrap_or(0),
        swap_usage_bytes: number(&text("memory.swap.current")).unwrap_or(0),
        swap_limit_bytes: number(&text("memory.swap.max")).unwrap_or(u64::MAX),
        stat: owned("memory.stat"),
        events: owned("memory.events"),
        pressure: pressure(&text("memory.pressure")),
        ..Default::default()
    }
}

/// `some avg10=0.12 avg60=0.00 avg300=0.00 total=4211`, and the same for `full`
/// (Documentation/accounting/psi.rst).
fn pressure(text: &str) -> protobuf::MessageField<Pressure> {
    let line = |kind: &str| -> Option<PressureLine> {
        let rest = text
            .lines()
            .find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        let mut found = PressureLine::default();
        for word in rest.split_whitespace() {
            let (name, value) = word.split_once('=')?;
            match name {
                "avg10" => found.avg10 = hundredths(value)?,
                "avg60" => found.avg60 = hundredths(value)?,
                "avg300" => found.avg300 = hundredths(value)?,
                "total" => found.total_us = value.parse().ok()?,
                _ => {}
            }
        }
        Some(found)
    };
    let (some, full) = (line("some"), line("full"));
    if some.is_none() && full.is_none() {
        return protobuf::MessageField::none();
    }
    Some(Pressure {
        some: some.into(),
        full: full.into(),
        ..Default::default()
    })
    .into()
}

/// "12.34" as 1234.
fn hundredths(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.')?;
    let part = part.get(..2)?;
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(100)?
        .checked_add(part.parse().ok()?)
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`
fn io(text: &str) -> Vec<IoStats> {
    let parse = |line: &str| -> Option<IoStats> {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut found = IoStats {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            ..Default::default()
        };
        for word in words {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            let Ok(value) = value.parse() else { continue };
            match name {
                "rbytes" => found.read_bytes = value,
                "wbytes" => found.write_bytes = value,
                "rios" => found.read_operations = value,
                "wios" => found.write_operations = value,
                "dbytes" => found.discard_bytes = value,
                "dios" => found.discard_operations = value,
                _ => {}
            }
        }
        Some(found)
    };
    text.lines().take(LISTED_MAX).filter_map(parse).collect()
}

/// `hugetlb.2MB.current` and its siblings.
fn huge_pages(cgroup: &Path) -> Vec<HugePageStats> {
    let Ok(entries) = std::fs::read_dir(cgroup) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            // "2MB", and not "2MB.rsvd", which counts reservations.
            let page_size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            if page_size.contains('.') {
                return None;
            }
            let file = |suffix: &str| cgroup.join(format!("hugetlb.{page_size}.{suffix}"));
            let failures = files::read(file("events")).unwrap_or_default();
            Some(HugePageStats {
                usage_bytes: number(&files::read(file("current")).ok()?)?,
                // The kernel keeps no peak for huge pages.
                peak_bytes: 0,
                failures: pairs(&failures)
                    .find_map(|(name, value)| (name == "max").then_some(value))
                    .unwrap_or(0),
                page_size: page_size.to_owned(),
                ..Default::default()
            })
        })
        .take(LISTED_MAX)
        .collect()
}

/// Lines of `/proc/net/dev` after its two headings: name, eight figures received, eight sent.
fn networks(text: &str) -> Vec<NetworkStats> {
    let parse = |line: &str| -> Option<NetworkStats> {
        let (name, figures) = line.split_once(':')?;
        let figures: Vec<u64> = figures
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .ok()?;
        let at = |index: usize| figures.get(index).copied();
        Some(NetworkStats {
            name: name.trim().to_owned(),
            rx_bytes: at(0)?,
            rx_packets: at(1)?,
            rx_errors: at(2)?,
            rx_dropped: at(3)?,
            tx_bytes: at(8)?,
            tx_packets: at(9)?,
            tx_errors: at(10)?,
            tx_dropped: at(11)?,
            ..Default::default()
        })
    };
    text.lines()
        .skip(2)
        .take(LISTED_MAX)
        .filter_map(parse)
        .collect()
}

/// Reads `text` as each of the kernel's files.
#[cfg(feature = "fuzzing")]
pub(crate) fn read_any(text: &str) {
    let of = |_: &str| text.to_owned();
    let found = (cpu(text), memory(&of), pressure(text));
    drop(found);
    assert!(io(text).len() <= LISTED_MAX && networks(text).len() <= LISTED_MAX);
}

fn file_system(mount_point: &Path) -> Option<FileSystemStats> {
    let found = statvfs(mount_point).ok()?;
    let unit = found.fragment_size();
    Some(FileSystemStats {
        mount_point: mount_point.to_str()?.to_owned(),
        // What a file system says that the host serves may be anything.
        capacity_bytes: found.blocks().saturating_mul(unit),
        available_bytes: found.blocks_available().saturating_mul(unit),
        used_bytes: found
            .blocks()
            .saturating_sub(found.blocks_free())
            .saturating_mul(unit),
        inodes: found.files(),
        inodes_used: found.files().saturating_sub(found.files_free()),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_to_the_hundredth() {
        let text = "some avg10=1.05 avg60=0.00 avg300=99.99 total=4211\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let pressure = pressure(text);
        assert_eq!(pressure.some.avg10, 105);
        assert_eq!(pressure.some.avg300, 9999);
        assert_eq!(pressure.some.total_us, 4211);
        assert_eq!(pressure.full.total_us, 7);
        assert!(super::pressure("").is_none());
        assert!(super::pressure("some avg10=x\n").is_none());
    }

    #[test]
    fn lines_of_devices_are_read_by_name() {
        let found = io("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nx\n259:1 wios=9\n");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].discard_operations, 6);
        assert_eq!((found[1].major, found[1].write_operations), (259, 9));
    }

    #[test]
    fn network_devices_follow_two_headings() {
        let text = "Inter-|\n face |\n  lo: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\nbad: 1\n";
        let found = networks(text);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].tx_dropped), ("lo", 8));
    }

    #[test]
    fn limits_that_are_not_set_are_the_largest() {
        let memory = memory(&|name: &str| match name {
            "memory.max" => "max\n".to_owned(),
            "memory.current" => "4096\n".to_owned(),
            _ => String::new(),
        });
        assert_eq!((memory.limit_bytes, memory.usage_bytes), (u64::MAX, 4096));
    }
}
