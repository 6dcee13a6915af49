//! Rules about the folders of each crate: which may use which, and no circles between them.
//!
//! Folders are floors. Each uses only floors below its own, so a reader who knows a folder and
//! those below it knows all that it depends on. `FLOORS_LIST=shim cargo test -p pericarp-tests
//! --test tidy floors -- --nocapture` prints every edge of a crate, `FLOORS_LIST=all` of each.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    env,
};

use crate::{
    edges::members,
    files, judge,
    references::{Edge, Sources, edges},
};

/// A floor, and the floors that it may use.
///
/// A floor is a folder directly beneath `src`, or several names after a title: `ground: files log`.
/// A file directly in `src` is named without `.rs`; those that no floor names are on the floor `.`.
type Floor = (&'static str, &'static str);

/// Crate, and its floors from the top down. A floor may use only floors below it.
const FLOORS: &[(&str, &[Floor])] = &[
    ("protocol", &[(".", ""), ("machine", "")]),
    ("sys", &[(".", "")]),
    ("runtime-config", &[(".", "")]),
    (
        "vmm",
        &[
            ("fuzzing", ". machine event_loop devices arch pci control"),
            (".", "machine event_loop devices arch pci control"),
            ("machine", "event_loop devices arch pci control"),
            ("event_loop", "devices pci"),
            ("devices", "pci"),
            ("arch", ""),
            ("pci", ""),
            ("control", ""),
        ],
    ),
    (
        "agent",
        &[
            ("fuzzing", "rpc container drivers ground"),
            (".", "rpc pod container drivers storage network ground"),
            ("rpc", "pod container drivers storage network ground"),
            (
                "pod: forward oom pod pod_init process reaper stdio streams table",
                "container drivers storage network ground",
            ),
            ("container", "ground"),
            ("drivers", "ground"),
            ("storage", "ground"),
            ("network", "ground"),
            (
                "ground: devices errors events files init log stats uevents",
                "",
            ),
        ],
    ),
    (
        "shim",
        &[
            ("main", "containerd"),
            (
                "containerd",
                "pod storage passthrough machine network guest host errors",
            ),
            (
                "pod",
                "storage passthrough machine network guest host errors",
            ),
            ("storage", "machine guest host errors"),
            ("passthrough", "machine guest host errors"),
            ("machine", "network guest host errors"),
            ("network", "guest host errors"),
            ("guest", "host errors"),
            ("host", "errors"),
            ("errors", ""),
        ],
    ),
    (
        "ctl",
        &[
            (".", "check device_plugin cli elf"),
            ("check", "cli elf"),
            ("device_plugin", "cli"),
            ("cli", ""),
            ("elf", ""),
        ],
    ),
    (
        "tests",
        &[
            (".", ""),
            ("bin", "verbs pods bars node"),
            ("verbs", "pods node"),
            ("pods", "node"),
            ("bars", "node"),
            ("node", ""),
        ],
    ),
    ("tests/fuzz", &[(".", "")]),
];

/// What to do about an edge or a circle.
const REMEDY: &str = "take the handle or value that you need instead, or change FLOORS and \
                      ARCHITECTURE.md";

/// A violation as [`judge`] takes it.
type Violation = (String, usize, String);

/// Files of different folders that all depend on each other.
#[derive(Debug)]
struct Circle<'a> {
    files: BTreeSet<&'a str>,
    /// The shortest circle through two folders.
    steps: Vec<&'a Edge>,
}

/// One crate: its folder in the repository and its files.
#[derive(Debug)]
struct Tree {
    member: String,
    sources: Sources,
    edges: Vec<Edge>,
}

impl Tree {
    fn new(member: &str, sources: Sources) -> Self {
        let name = member.rsplit('/').next().unwrap_or(member);
        let library = format!("pericarp_{}", name.replace('-', "_"));
        let edges = edges(&sources, &library);
        Self {
            member: member.to_owned(),
            sources,
            edges,
        }
    }

    /// Every crate of the workspace as it stands on disk.
    fn all() -> Vec<Self> {
        let files = files(&[".rs"]);
        FLOORS
            .iter()
            .map(|(member, _)| {
                let folder = format!("{member}/src/");
                let sources = files
                    .iter()
                    .filter_map(|file| {
                        let path = file
                            .path
                            .strip_prefix(&folder)
                            .filter(|_| !file.is_test())?;
                        Some((path.to_owned(), file.text.clone()))
                    })
                    .collect();
                Self::new(member, sources)
            })
            .collect()
    }

    fn place(&self, file: &str) -> String {
        format!("{}/src/{file}", self.member)
    }

    /// The title of the floor that a file is on, or its folder's name if no floor has that.
    fn floor<'a>(&self, file: &'a str, floors: &'a [Floor]) -> &'a str {
        let name = match file.split_once('/') {
            Some((folder, _)) => folder,
            None => file.trim_end_matches(".rs"),
        };
        let found = floors
            .iter()
            .map(|(floor, _)| split(floor))
            .find(|(_, names)| names.contains(&name));
        match found {
            Some((title, _)) => title,
            None if file.contains('/') || self.has_folder(name) => name,
            None => ".",
        }
    }

    /// Whether a file is the one called `name` in the table, or in the folder of that name.
    fn is_of(&self, file: &str, name: &str, floors: &[Floor]) -> bool {
        if name == "." {
            return self.floor(file, floors) == ".";
        }
        let rest = file.strip_prefix(name);
        rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    }

    fn has_folder(&self, stem: &str) -> bool {
        let folder = format!("{stem}/");
        self.sources.keys().any(|path| path.starts_with(&folder))
    }

    /// The folder whose modules a file is among: its own if it has submodules in files.
    fn folder<'a>(&self, file: &'a str) -> &'a str {
        let stem = file.trim_end_matches(".rs");
        if self.has_folder(stem) {
            return stem;
        }
        file.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    /// Edges between floors, by the names of both.
    fn floor_edges<'a>(
        &'a self,
        floors: &'a [Floor],
    ) -> BTreeMap<(&'a str, &'a str), Vec<&'a Edge>> {
        let mut found: BTreeMap<_, Vec<&Edge>> = BTreeMap::new();
        for edge in &self.edges {
            let pair = (self.floor(&edge.from, floors), self.floor(&edge.to, floors));
            if pair.0 != pair.1 {
                found.entry(pair).or_default().push(edge);
            }
        }
        found
    }

    /// Edges that the table does not allow, folders without a line, and lines without a folder.
    fn floor_violations(&self, floors: &[Floor]) -> Vec<Violation> {
        let mut violations = Vec::new();
        for ((from, to), edges) in self.floor_edges(floors) {
            if may_use(floors, from, to) {
                continue;
            }
            for edge in edges {
                let paths: Vec<&str> = edge.paths.iter().map(String::as_str).collect();
                let what = format!(
                    "{from} -> {to}, {} ({}): {REMEDY}",
                    refusal(floors, from, to),
                    paths.join(", ")
                );
                violations.push((self.place(&edge.from), edge.line, what));
            }
        }
        let mut present = BTreeSet::new();
        for file in self.sources.keys() {
            let floor = self.floor(file, floors);
            let is_new = present.insert(floor);
            if is_new && height(floors, floor).is_none() {
                let what = format!(
                    "`{floor}` has no line in FLOORS: move the file into a folder, or add the line"
                );
                violations.push((self.place(file), 0, what));
            }
        }
        for name in floors.iter().flat_map(|(floor, _)| split(floor).1) {
            if !self
                .sources
                .keys()
                .any(|file| self.is_of(file, name, floors))
            {
                let what = format!("FLOORS has `{name}`, the crate has not: remove it there");
                violations.push((self.place(""), 0, what));
            }
        }
        violations
    }

    /// The files that each file uses.
    fn uses(&self) -> BTreeMap<&str, Vec<&Edge>> {
        let mut uses: BTreeMap<&str, Vec<&Edge>> = BTreeMap::new();
        for edge in &self.edges {
            uses.entry(&edge.from).or_default().push(edge);
        }
        uses
    }

    /// The circles between folders, one for each set of files that all depend on each other.
    fn circles(&self) -> Vec<Circle<'_>> {
        let uses = self.uses();
        let mut circles: Vec<Circle<'_>> = Vec::new();
        for edge in &self.edges {
            if self.folder(&edge.from) == self.folder(&edge.to) {
                continue;
            }
            let Some(mut steps) = shortest(&uses, &edge.to, &edge.from) else {
                continue;
            };
            steps.insert(0, edge);
            let known = circles
                .iter_mut()
                .find(|circle| circle.files.contains(&*edge.from));
            match known {
                Some(known) if known.steps.len() <= steps.len() => {}
                Some(known) => known.steps = steps,
                None => circles.push(Circle {
                    files: self.entangled(&uses, &edge.from),
                    steps,
                }),
            }
        }
        circles
    }

    fn circle_violations(&self) -> Vec<Violation> {
        self.circles()
            .into_iter()
            .map(|circle| {
                let first = circle.steps[0];
                let steps: Vec<String> = circle
                    .steps
                    .iter()
                    .map(|edge| format!("{}:{} -> ", edge.from, edge.line))
                    .collect();
                let what = format!(
                    "a circle between folders, {} files in all, the shortest way {}{}: {REMEDY}",
                    circle.files.len(),
                    steps.concat(),
                    first.from
                );
                (self.place(&first.from), first.line, what)
            })
            .collect()
    }

    /// The files that `file` depends on and that depend on `file`.
    fn entangled<'a>(
        &'a self,
        uses: &BTreeMap<&'a str, Vec<&'a Edge>>,
        file: &'a str,
    ) -> BTreeSet<&'a str> {
        self.sources
            .keys()
            .map(String::as_str)
            .filter(|other| {
                *other == file
                    || shortest(uses, file, other).is_some()
                        && shortest(uses, other, file).is_some()
            })
            .collect()
    }

    /// Every edge between floors, and those that close circles, for whoever moves files.
    fn listing(&self, floors: &[Floor]) -> String {
        let member = &self.member;
        let mut text = String::new();
        for ((from, to), edges) in self.floor_edges(floors) {
            let is_allowed = may_use(floors, from, to);
            let mark = if is_allowed { "" } else { ", NOT ALLOWED" };
            text += &format!("{member}: {from} -> {to}: {} edges{mark}\n", edges.len());
            text.extend(edges.into_iter().map(show));
        }
        for circle in self.circles() {
            let count = circle.files.len();
            text += &format!("{member}: a circle of {count} files, its edges between folders:\n");
            let is_across = |edge: &&Edge| {
                circle.files.contains(&*edge.from)
                    && circle.files.contains(&*edge.to)
                    && self.folder(&edge.from) != self.folder(&edge.to)
            };
            text.extend(self.edges.iter().filter(is_across).map(show));
        }
        text
    }
}

/// A line of the listing.
fn show(edge: &Edge) -> String {
    let paths: Vec<&str> = edge.paths.iter().map(String::as_str).collect();
    let Edge { from, line, to, .. } = edge;
    format!("    {from}:{line} -> {to} ({})\n", paths.join(", "))
}

/// The title of a floor, and the names of its folders and files.
fn split(floor: &str) -> (&str, Vec<&str>) {
    let (title, names) = floor.split_once(": ").unwrap_or((floor, floor));
    (title, names.split(' ').collect())
}

/// How far from the top a floor is.
fn height(floors: &[Floor], title: &str) -> Option<usize> {
    floors.iter().position(|(floor, _)| split(floor).0 == title)
}

fn may_use(floors: &[Floor], from: &str, to: &str) -> bool {
    height(floors, from).is_some_and(|index| floors[index].1.split(' ').any(|used| used == to))
}

/// Why there is no such edge in the table.
fn refusal(floors: &[Floor], from: &str, to: &str) -> &'static str {
    match (height(floors, from), height(floors, to)) {
        (Some(from), Some(to)) if to < from => "an upward edge",
        (Some(_), Some(_)) => "no edge of FLOORS",
        _ => "an edge of a folder without a line in FLOORS",
    }
}

/// The fewest edges that lead from one file to another.
fn shortest<'a>(
    uses: &BTreeMap<&'a str, Vec<&'a Edge>>,
    from: &str,
    to: &str,
) -> Option<Vec<&'a Edge>> {
    let mut reached: BTreeMap<&str, &Edge> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(file) = queue.pop_front() {
        for edge in uses.get(file).into_iter().flatten() {
            if edge.to != from && !reached.contains_key(&*edge.to) {
                reached.insert(&edge.to, edge);
                queue.push_back(&edge.to);
            }
        }
    }
    let mut way = vec![*reached.get(to)?];
    while way[0].from != from {
        way.insert(0, reached[&*way[0].from]);
    }
    Some(way)
}

#[test]
fn folder_edges() {
    let trees = Tree::all();
    let violations = trees
        .iter()
        .zip(FLOORS)
        .flat_map(|(tree, (_, floors))| tree.floor_violations(floors))
        .collect();
    judge("folder-edges", violations);
}

#[test]
fn no_circles() {
    let violations = Tree::all()
        .iter()
        .flat_map(Tree::circle_violations)
        .collect();
    judge("no-circles", violations);
}

#[test]
fn every_member_has_floors() {
    let mut known: Vec<&str> = FLOORS.iter().map(|(member, _)| *member).collect();
    known.sort_unstable();
    assert_eq!(
        members(),
        known,
        "FLOORS names each member of the workspace"
    );
}

#[test]
fn floors_use_lower_ones() {
    for (member, floors) in FLOORS {
        for (index, (floor, allowed)) in floors.iter().enumerate() {
            for used in allowed.split_whitespace() {
                let is_below = height(floors, used).is_some_and(|other| other > index);
                assert!(
                    is_below,
                    "FLOORS of {member}: no line `{used}` below `{floor}`"
                );
            }
        }
    }
}

#[test]
fn listing() {
    let Ok(wanted) = env::var("FLOORS_LIST") else {
        return;
    };
    for (tree, (member, floors)) in Tree::all().iter().zip(FLOORS) {
        if wanted == "all" || wanted == *member {
            println!("{}", tree.listing(floors));
        }
    }
}
