//! Measures pods under Pericarp, those that go on from a template and those that boot, beside pods
//! under runc, in turn in one node, so that whatever else loads the computer loads all.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::node::images::BUSYBOX;
use crate::node::{Command, Containerd, Node};
use crate::pods::{container_config, log_folder, pod_config};

/// What measures one pod, in bash: a program of the node takes the times, not the control channel.
const SCRIPT: &str = include_str!("bench.sh");

/// Where it lies in the node.
const SCRIPT_FILE: &str = "/run/bench/bench.sh";

/// Time that one pod gets.
const POD_TIMEOUT_S: u64 = 600;

/// What is measured.
#[derive(Debug, Clone, Copy)]
struct Side {
    /// Its column.
    name: &'static str,
    /// The handler of containerd.
    handler: &'static str,
    /// Whether its pods go on from a template.
    forks: bool,
}

const fn side(name: &'static str, handler: &'static str, forks: bool) -> Side {
    Side {
        name,
        handler,
        forks,
    }
}

/// The control, and what is measured.
const SIDES: [Side; 3] = [
    side("runc", "runc", false),
    side("pericarp", "pericarp", true),
    side("booted", "pericarp", false),
];

/// Turns templates off while it is there.
const WITHOUT_TEMPLATES: &str = "/etc/pericarp/config.d/99-bench.toml";

/// Sum of the resident memory of all processes of a pod, as [`SCRIPT`] names it.
const PSS: &str = "pss_kib";

/// How a figure is judged.
#[derive(Debug, Clone, Copy)]
enum Bar {
    /// At most that many times runc's.
    Ratio(f64),
    /// At most that much.
    Value(f64),
    /// It is only told.
    None,
}

/// A row of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    /// Divides what [`SCRIPT`] prints.
    scale: f64,
    bar: Bar,
}

const fn seconds(name: &'static str, what: &'static str, bar: Bar) -> Row {
    Row {
        name,
        what,
        unit: "s",
        scale: 1e6,
        bar,
    }
}

/// Every row; the bars are those of SPEC.md.
const ROWS: [Row; 10] = [
    seconds("runp", "sandbox ready (crictl runp)", Bar::Ratio(3.0)),
    seconds("create", "create", Bar::None),
    seconds("start", "start", Bar::None),
    seconds(
        "first_output",
        "create + start to first output",
        Bar::Ratio(2.0),
    ),
    seconds("exec", "exec true", Bar::Ratio(2.0)),
    seconds("rmp", "delete (crictl rmp -f)", Bar::Ratio(2.0)),
    Row {
        name: PSS,
        what: "idle pod, PSS of all processes",
        unit: "MiB",
        scale: 1024.0,
        bar: Bar::Ratio(2.0),
    },
    Row {
        name: "exits_ready",
        what: "KVM exits when the sandbox is ready",
        unit: "",
        scale: 1.0,
        bar: Bar::None,
    },
    Row {
        name: "exits_settling_per_s",
        what: "KVM exits a second just after exec",
        unit: "",
        scale: 1.0,
        bar: Bar::None,
    },
    Row {
        name: "exits_idle_per_s",
        what: "KVM exits a second when idle",
        unit: "",
        scale: 1.0,
        bar: Bar::Value(20.0),
    },
];

/// What one pod gave: figures by name, and the PSS of each of its processes in KiB.
#[derive(Debug, Default, Clone, PartialEq)]
struct Sample {
    figures: BTreeMap<String, f64>,
    processes: BTreeMap<String, f64>,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Pods per handler.
    pub runs: usize,
    /// How long an idle pod is watched, and how long it may settle before.
    pub idle_s: u64,
}

/// Measures, prints the table, and leaves `bench.json` in the folder of results.
pub fn run(node: &Node, containerd: &Containerd, options: Options) -> Result<()> {
    ensure!(options.runs > 0, "--runs must be at least 1");
    let mut samples = SIDES.map(|_| Vec::new());
    node.shell("pericarp template build")?;
    // The first pod of each side reads its files from the disk: it is not counted.
    for round in 0..=options.runs {
        for (side, samples) in SIDES.iter().zip(&mut samples) {
            let name = side.name;
            let off = (!side.forks).then_some("[vm]\ntemplate = \"off\"\n");
            match off {
                Some(text) => node.write(WITHOUT_TEMPLATES, text)?,
                None => drop(node.shell(&format!("rm -f {WITHOUT_TEMPLATES}"))?),
            }
            let sample = one_pod(node, containerd, *side, round, options.idle_s)
                .with_context(|| format!("pod {round} of {name}"))?;
            eprintln!(
                "node bench: {round}/{} {name}: {}",
                options.runs,
                short(&sample)
            );
            let forked = sample.figures.get("forked") == Some(&1.0);
            ensure!(
                forked == side.forks,
                "pod {round} of {name}: forked is {forked}"
            );
            if round > 0 {
                samples.push(sample);
            }
        }
    }
    node.shell(&format!("rm -f {WITHOUT_TEMPLATES}"))?;
    let file = node.results().join("bench.json");
    let named = SIDES.iter().zip(&samples);
    let json: serde_json::Map<_, _> = named
        .map(|(side, samples)| (side.name.to_owned(), figures(samples)))
        .collect();
    let json = serde_json::Value::Object(json);
    std::fs::write(&file, format!("{json:#}\n"))
        .with_context(|| format!("cannot write {}", file.display()))?;
    print!("{}", table(&samples));
    println!(
        "medians over {} runs each; every figure: {}",
        options.runs,
        file.display()
    );
    Ok(())
}

fn one_pod(
    node: &Node,
    containerd: &Containerd,
    side: Side,
    round: usize,
    idle_s: u64,
) -> Result<Sample> {
    let name = format!("bench-{}-{round}", side.name);
    let pod = format!("/run/bench/{name}.pod.json");
    let container = format!("/run/bench/{name}.container.json");
    node.write(&pod, &pod_config(&name).to_string())?;
    let line = "echo ready; exec sleep 3600";
    node.write(
        &container,
        &container_config("c", BUSYBOX, line).to_string(),
    )?;
    node.write(SCRIPT_FILE, SCRIPT)?;
    let mut command = Command::new("bash")
        .arg(SCRIPT_FILE)
        .timeout_s(POD_TIMEOUT_S);
    command.env = containerd.crictl().env;
    // Without a VM there are no exits to count.
    let idle_s = if side.handler == "runc" {
        idle_s.min(1)
    } else {
        idle_s
    };
    let command = command
        .env("HANDLER", side.handler)
        .env("POD", &pod)
        .env("CONTAINER", &container)
        .env("LOG", format!("{}/c.log", log_folder(&name)))
        .env("IDLE_S", idle_s.to_string());
    Ok(parse(&node.text(&command)?))
}

/// Reads what [`SCRIPT`] printed; lines of another form are not its own.
fn parse(text: &str) -> Sample {
    let mut sample = Sample::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [PSS, process, value] => {
                let value = value.parse().unwrap_or(f64::NAN);
                *sample.processes.entry(process.to_owned()).or_default() += value;
                *sample.figures.entry(PSS.to_owned()).or_default() += value;
            }
            [name, value] => {
                if let Ok(value) = value.parse() {
                    sample.figures.insert(name.to_owned(), value);
                }
            }
            _ => {}
        }
    }
    sample
}

fn short(sample: &Sample) -> String {
    let show = |row: &Row| {
        let value = sample.figures.get(row.name)? / row.scale;
        Some(
            format!("{} {value:.2} {}", row.name, row.unit)
                .trim()
                .to_owned(),
        )
    };
    ROWS.iter().filter_map(show).collect::<Vec<_>>().join(", ")
}

fn figures(samples: &[Sample]) -> serde_json::Value {
    let all = samples
        .iter()
        .map(|sample| json!({"figures": sample.figures, "pss_kib_of_processes": sample.processes}));
    json!({"runs": all.collect::<Vec<_>>()})
}

/// The median of one figure, in the row's unit.
fn median(samples: &[Sample], row: &Row) -> Option<f64> {
    let values = samples
        .iter()
        .filter_map(|sample| sample.figures.get(row.name));
    let mut values: Vec<f64> = values.map(|value| value / row.scale).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

fn table(samples: &[Vec<Sample>; 3]) -> String {
    let [control, ours, booted] = SIDES.map(|side| side.name);
    let mut text = format!(
        "{:<38}{control:>12}{ours:>12}{:>9}{booted:>12}{:>9}   {}\n",
        "", "ratio", "ratio", "bar"
    );
    for row in &ROWS {
        let [control, ours, booted] = [0, 1, 2].map(|index| median(&samples[index], row));
        let show = |value: Option<f64>| match value {
            Some(value) if row.unit.is_empty() => format!("{value:.0}"),
            Some(value) => format!("{value:.2} {}", row.unit),
            None => "-".to_owned(),
        };
        let ratio_of = |value: Option<f64>| match (control, value) {
            (Some(control), Some(value)) if control > 0.0 => Some(value / control),
            _ => None,
        };
        let times = |ratio: Option<f64>| {
            ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2} x"))
        };
        text.push_str(&format!(
            "{:<38}{:>12}{:>12}{:>9}{:>12}{:>9}   {}\n",
            row.what,
            show(control),
            show(ours),
            times(ratio_of(ours)),
            show(booted),
            times(ratio_of(booted)),
            verdict(row.bar, ours, ratio_of(ours)),
        ));
    }
    text
}

fn verdict(bar: Bar, ours: Option<f64>, ratio: Option<f64>) -> String {
    let (text, got, most) = match bar {
        Bar::None => return String::new(),
        Bar::Ratio(most) => (format!("<= {most} x"), ratio, most),
        Bar::Value(most) => (format!("<= {most}"), ours, most),
    };
    match got {
        Some(got) if got <= most => format!("{text}  holds"),
        Some(_) => format!("{text}  MISSED"),
        None => format!("{text}  not measured"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(runp: f64) -> Sample {
        parse(&format!(
            "runp {runp}\npss_kib shim 1000\npss_kib shim 24\nnoise\n"
        ))
    }

    #[test]
    fn processes_are_summed_and_other_lines_ignored() {
        let sample = sample(5.0);
        assert_eq!(sample.figures[PSS], 1024.0);
        assert_eq!(sample.processes["shim"], 1024.0);
        assert_eq!(sample.figures.len(), 2);
    }

    #[test]
    fn medians_and_verdicts_stand_in_the_table() {
        let control = vec![sample(1e6), sample(3e6)];
        let ours = vec![sample(7e6), sample(9e6), sample(50e6)];
        let booted = vec![sample(6e6)];
        let table = table(&[control, ours, booted]);
        let row = table.lines().nth(1).unwrap();
        assert!(row.contains("2.00 s") && row.contains("9.00 s"), "{row}");
        assert!(
            row.contains("4.50 x") && row.contains("3.00 x") && row.ends_with("<= 3 x  MISSED"),
            "{row}"
        );
        assert!(table.contains("<= 2 x  holds"), "{table}");
        assert!(table.contains("<= 20  not measured"), "{table}");
    }
}
