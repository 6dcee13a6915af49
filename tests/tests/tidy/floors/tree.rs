//! Compares the edges between the files of one crate with the table of its floors, and finds cycles
//! between folders.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Floor;
use crate::references::{Edge, Sources, edges};

/// What to do about a forbidden edge.
const EDGE_REMEDY: &str = "take the handle or value that you need as a parameter, or change \
                           FLOORS and ARCHITECTURE.md";
/// What to do about a cycle.
const CYCLE_REMEDY: &str = "move what both need into a lower file, or take it as a parameter";

/// A violation in the form that [`crate::judge`] takes.
pub(super) type Violation = (String, usize, String);

/// Files of different folders that all depend on each other.
#[derive(Debug)]
struct Cycle<'a> {
    files: BTreeSet<&'a str>,
    /// The shortest cycle through two folders.
    steps: Vec<&'a Edge>,
}

/// One crate: its folder in the repository, its files, and the edges between them.
#[derive(Debug)]
pub(super) struct Tree {
    member: String,
    sources: Sources,
    edges: Vec<Edge>,
}

impl Tree {
    pub(super) fn new(member: &str, sources: Sources) -> Self {
        let name = member.rsplit('/').next().unwrap_or(member);
        let library = format!("pericarp_{}", name.replace('-', "_"));
        let edges = edges(&sources, &library);
        Self {
            member: member.to_owned(),
            sources,
            edges,
        }
    }

    /// The folder of the crate in the repository.
    pub(super) fn member(&self) -> &str {
        &self.member
    }

    fn place(&self, file: &str) -> String {
        format!("{}/src/{file}", self.member)
    }

    /// Returns the title of the floor that a file is on, or the name of its folder if the table
    /// has no line for that.
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

    /// Whether `name` in the table covers a file.
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

    /// Returns the folder of a file. `x.rs` with submodules belongs to `x`, as `x/mod.rs` does.
    fn folder<'a>(&self, file: &'a str) -> &'a str {
        let stem = file.trim_end_matches(".rs");
        if self.has_folder(stem) {
            return stem;
        }
        file.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    /// Groups the edges between floors by the titles of both.
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

    /// Lists edges that the table does not allow, folders without a line, and lines without a
    /// folder.
    pub(super) fn floor_violations(&self, floors: &[Floor]) -> Vec<Violation> {
        let mut violations = Vec::new();
        for ((from, to), edges) in self.floor_edges(floors) {
            let (Some(from_at), Some(to_at)) = (position(floors, from), position(floors, to))
            else {
                // Reported below, once.
                continue;
            };
            if may_use(floors, from, to) {
                continue;
            }
            let why = if to_at < from_at {
                "an upward edge"
            } else {
                "an edge that FLOORS does not list"
            };
            for edge in edges {
                let paths = edge.paths();
                let what = format!("{from} -> {to}, {why} ({paths}): {EDGE_REMEDY}");
                violations.push((self.place(&edge.from), edge.line, what));
            }
        }
        let mut present = BTreeSet::new();
        for file in self.sources.keys() {
            let floor = self.floor(file, floors);
            let is_new = present.insert(floor);
            if is_new && position(floors, floor).is_none() {
                let what = format!(
                    "`{floor}` has no line in FLOORS: move the file into a folder, or add the line"
                );
                violations.push((self.place(file), 0, what));
            }
        }
        for name in floors.iter().flat_map(|(floor, _)| split(floor).1) {
            let is_present = |file: &String| self.is_of(file, name, floors);
            if !self.sources.keys().any(is_present) {
                let what = format!("FLOORS names `{name}`, which the crate lacks: remove the name");
                violations.push((self.place(""), 0, what));
            }
        }
        violations
    }

    /// Groups the edges by the file that they start at.
    fn uses(&self) -> BTreeMap<&str, Vec<&Edge>> {
        let mut uses: BTreeMap<&str, Vec<&Edge>> = BTreeMap::new();
        for edge in &self.edges {
            uses.entry(&edge.from).or_default().push(edge);
        }
        uses
    }

    /// Finds cycles between folders: one for each set of files that all depend on each other.
    fn cycles(&self) -> Vec<Cycle<'_>> {
        let uses = self.uses();
        let mut cycles: Vec<Cycle<'_>> = Vec::new();
        for edge in &self.edges {
            if self.folder(&edge.from) == self.folder(&edge.to) {
                continue;
            }
            let Some(mut steps) = shortest(&uses, &edge.to, &edge.from) else {
                continue;
            };
            steps.insert(0, edge);
            let known = cycles
                .iter_mut()
                .find(|cycle| cycle.files.contains(&*edge.from));
            match known {
                Some(known) if known.steps.len() <= steps.len() => {}
                Some(known) => known.steps = steps,
                None => cycles.push(Cycle {
                    files: self.entangled(&uses, &edge.from),
                    steps,
                }),
            }
        }
        cycles
    }

    /// Lists each cycle between folders by its shortest path.
    pub(super) fn cycle_violations(&self) -> Vec<Violation> {
        self.cycles()
            .into_iter()
            .map(|cycle| {
                let first = cycle.steps[0];
                let steps: Vec<String> = cycle
                    .steps
                    .iter()
                    .map(|edge| format!("{}:{} -> ", edge.from, edge.line))
                    .collect();
                let what = format!(
                    "a cycle between folders: {}{} ({} files depend on each other): {CYCLE_REMEDY}",
                    steps.concat(),
                    first.from,
                    cycle.files.len()
                );
                (self.place(&first.from), first.line, what)
            })
            .collect()
    }

    /// Returns the files that `file` depends on and that depend on `file`.
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

    /// Prints every edge between floors, and the edges between folders of each cycle.
    pub(super) fn listing(&self, floors: &[Floor]) -> String {
        let member = &self.member;
        let mut text = String::new();
        for ((from, to), edges) in self.floor_edges(floors) {
            let is_allowed = may_use(floors, from, to);
            let mark = if is_allowed { "" } else { ", NOT ALLOWED" };
            text += &format!("{member}: {from} -> {to}: {} edges{mark}\n", edges.len());
            text.extend(edges.into_iter().map(show));
        }
        for cycle in self.cycles() {
            let count = cycle.files.len();
            text += &format!("{member}: a cycle of {count} files, its edges between folders:\n");
            let is_across = |edge: &&Edge| {
                cycle.files.contains(&*edge.from)
                    && cycle.files.contains(&*edge.to)
                    && self.folder(&edge.from) != self.folder(&edge.to)
            };
            text.extend(self.edges.iter().filter(is_across).map(show));
        }
        text
    }
}

/// Formats one edge for the listing.
fn show(edge: &Edge) -> String {
    let Edge { from, line, to, .. } = edge;
    format!("    {from}:{line} -> {to} ({})\n", edge.paths())
}

/// Splits the first string of a floor into its title and the names of its folders and files.
pub(super) fn split(floor: &str) -> (&str, Vec<&str>) {
    let (title, names) = floor.split_once(": ").unwrap_or((floor, floor));
    (title, names.split(' ').collect())
}

/// Returns the position of a floor, counted from the top.
pub(super) fn position(floors: &[Floor], title: &str) -> Option<usize> {
    floors.iter().position(|(floor, _)| split(floor).0 == title)
}

fn may_use(floors: &[Floor], from: &str, to: &str) -> bool {
    position(floors, from).is_some_and(|index| floors[index].1.split(' ').any(|used| used == to))
}

/// Finds the shortest path from one file to another.
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
    let mut path = vec![*reached.get(to)?];
    while path[0].from != from {
        path.insert(0, reached[&*path[0].from]);
    }
    Some(path)
}
