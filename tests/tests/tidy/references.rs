//! Finds which source file of a crate uses which other, without a compiler.
//!
//! Starts at the crate roots and follows `mod` declarations as rustc does, except those under
//! `#[cfg(test)]`. Reads `use` declarations and paths in code, including macros, and resolves each
//! to the file of the innermost module that it names. A name that a `mod.rs` re-exports leads to
//! that `mod.rs`; the `pub use` there is an edge to the definition. Method calls and macros in
//! textual scope are not seen: they would need types and expansion.

mod tests;

use std::collections::{BTreeMap, BTreeSet};

use crate::tokens::{Token, tokens};

/// Limit of renames followed for one path, against `use` declarations that name each other.
const RENAMES_MAX: usize = 8;

/// First words of items and statements, which do not end at a comma as fields and arms do.
const ITEM_WORDS: &[&str] = &[
    "async",
    "const",
    "enum",
    "extern",
    "fn",
    "impl",
    "let",
    "macro_rules",
    "mod",
    "static",
    "struct",
    "trait",
    "type",
    "unsafe",
    "use",
];

/// Files of one crate: path relative to `src`, and text.
pub(crate) type Sources = BTreeMap<String, String>;

/// A crate root and the module names from there on.
type Module = Vec<String>;

/// One file uses another file of the same crate.
#[derive(Debug)]
pub(crate) struct Edge {
    /// The using file, relative to `src`.
    pub(crate) from: String,
    /// The used file, relative to `src`.
    pub(crate) to: String,
    /// Line of the first use in `from`.
    pub(crate) line: usize,
    /// The distinct paths as written.
    paths: BTreeSet<String>,
}

impl Edge {
    /// Formats the paths for a message.
    pub(crate) fn paths(&self) -> String {
        let paths: Vec<&str> = self.paths.iter().map(String::as_str).collect();
        paths.join(", ")
    }
}

/// A path written in a file.
#[derive(Debug)]
struct Mention {
    scope: Module,
    file: String,
    line: usize,
    segments: Vec<String>,
}

/// What the files of a crate declare and mention.
#[derive(Debug, Default)]
struct Index {
    /// The file that holds each module.
    modules: BTreeMap<Module, String>,
    /// Names that `use` brings into a module, with the path that each stands for.
    names: BTreeMap<(Module, String), Vec<String>>,
    mentions: Vec<Mention>,
}

/// Returns every edge between two files of a crate, ordered by file. `library` is the name of the
/// crate in paths.
pub(crate) fn edges(sources: &Sources, library: &str) -> Vec<Edge> {
    let mut index = Index::default();
    for root in sources.keys().filter(|path| is_root(path)) {
        read(sources, &mut index, root, vec![root.clone()]);
    }
    let mut edges: BTreeMap<(&str, &str), Edge> = BTreeMap::new();
    for mention in &index.mentions {
        let Some(to) = index.file_of(mention, library) else {
            continue;
        };
        if to == mention.file {
            continue;
        }
        let edge = edges.entry((&mention.file, to)).or_insert_with(|| Edge {
            from: mention.file.clone(),
            to: to.to_owned(),
            line: mention.line,
            paths: BTreeSet::new(),
        });
        edge.line = edge.line.min(mention.line);
        edge.paths.insert(mention.segments.join("::"));
    }
    edges.into_values().collect()
}

/// Whether cargo starts to compile at this file.
fn is_root(path: &str) -> bool {
    matches!(path, "lib.rs" | "main.rs") || (path.starts_with("bin/") && !path[4..].contains('/'))
}

impl Index {
    fn file_of(&self, mention: &Mention, library: &str) -> Option<&str> {
        let path = self.absolute(&mention.scope, &mention.segments, library, RENAMES_MAX)?;
        (1..=path.len())
            .rev()
            .find_map(|length| self.modules.get(&path[..length]))
            .map(String::as_str)
    }

    /// Resolves a path to one from a crate root; `None` if it leads to another crate or to an item.
    fn absolute(
        &self,
        scope: &[String],
        segments: &[String],
        library: &str,
        renames_left: usize,
    ) -> Option<Module> {
        let (first, rest) = segments.split_first()?;
        let base = match first.as_str() {
            "crate" => scope[..1].to_vec(),
            "self" => scope.to_vec(),
            "super" => {
                let parent = scope[..scope.len() - 1].to_vec();
                if parent.is_empty() {
                    return None;
                }
                if rest.first().is_some_and(|next| next == "super") {
                    return self.absolute(&parent, rest, library, renames_left);
                }
                parent
            }
            name if name == library => vec!["lib.rs".to_owned()],
            name => {
                let behind = self.names.get(&(scope.to_vec(), name.to_owned()));
                match behind.filter(|behind| behind[0] != name) {
                    Some(behind) if renames_left > 0 => {
                        self.absolute(scope, behind, library, renames_left - 1)?
                    }
                    _ => {
                        let child = [scope, &[name.to_owned()]].concat();
                        self.modules.get(&child)?;
                        child
                    }
                }
            }
        };
        Some([base.as_slice(), rest].concat())
    }
}

/// Reads a file and, recursively, the files of the modules that it declares.
fn read(sources: &Sources, index: &mut Index, file: &str, scope: Module) {
    let text = &sources[file];
    index.modules.insert(scope.clone(), file.to_owned());
    let mut reader = Reader {
        tokens: tokens(text),
        at: 0,
        file,
        depth: scope.len(),
        scope,
        braces: Vec::new(),
        path_attribute: None,
        children: Vec::new(),
        index,
    };
    reader.read();
    for (module, candidates) in reader.children {
        if let Some(child) = candidates.iter().find(|path| sources.contains_key(*path)) {
            read(sources, index, child, module);
        }
    }
}

/// Reads the tokens of one file.
struct Reader<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
    file: &'a str,
    /// The module around the current token.
    scope: Module,
    /// Length of the module path of the file itself.
    depth: usize,
    /// For each open brace, whether it opened a module.
    braces: Vec<bool>,
    /// The file that `#[path]` gives for the next module.
    path_attribute: Option<&'a str>,
    /// Modules in files of their own, with the possible paths of those files.
    children: Vec<(Module, Vec<String>)>,
    index: &'a mut Index,
}

impl<'a> Reader<'a> {
    /// Returns the text of the token `ahead` of the current one, empty beyond the end.
    fn peek(&self, ahead: usize) -> &'a str {
        self.tokens
            .get(self.at + ahead)
            .map_or("", |token| token.text)
    }

    fn is_name(&self, ahead: usize) -> bool {
        self.peek(ahead)
            .starts_with(|c: char| c.is_alphabetic() || c == '_')
    }

    fn read(&mut self) {
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "#" if matches!(self.peek(1), "[" | "!") => self.attribute(),
                "pub" => self.visibility(),
                "mod" if self.is_name(1) => self.module(),
                "use" if self.peek(1) != "<" => {
                    self.at += 1;
                    self.tree(&[]);
                }
                "{" => {
                    self.braces.push(false);
                    self.at += 1;
                }
                "}" => {
                    if self.braces.pop() == Some(true) {
                        self.scope.pop();
                    }
                    self.at += 1;
                }
                _ if self.is_name(0) && self.peek(1) == "::" => self.path(),
                _ => self.at += 1,
            }
        }
    }

    /// Skips an attribute, and the item behind it if that is test code.
    fn attribute(&mut self) {
        let is_inner = self.peek(1) == "!";
        self.at += if is_inner { 2 } else { 1 };
        let is_of_tests = self.peek(1) == "cfg"
            && (self.peek(3) == "test" && self.peek(4) == ")"
                || self.peek(3) == "all" && self.peek(5) == "test");
        if self.peek(1) == "path" && self.peek(2) == "=" {
            self.path_attribute = Some(self.peek(3).trim_matches('"'));
        }
        self.group();
        if is_of_tests && is_inner {
            self.at = self.tokens.len();
        } else if is_of_tests {
            self.skip_item();
        }
    }

    /// Skips a bracket, its counterpart and everything between them.
    fn group(&mut self) {
        let mut depth = 0_usize;
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth = depth.saturating_sub(1),
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                break;
            }
        }
    }

    /// Skips `pub` and `pub(..)`: the path in a visibility is not a use.
    fn visibility(&mut self) {
        self.at += 1;
        if self.peek(0) == "(" && matches!(self.peek(1), "crate" | "super" | "self" | "in") {
            self.group();
        }
    }

    /// Skips an item, a statement, a field or a match arm.
    fn skip_item(&mut self) {
        while self.peek(0) == "#" {
            self.at += 1;
            self.group();
        }
        if self.peek(0) == "pub" {
            self.visibility();
        }
        let is_item = ITEM_WORDS.contains(&self.peek(0));
        let is_import = self.peek(0) == "use";
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "(" | "[" => self.group(),
                "{" => {
                    self.group();
                    if !is_import {
                        return;
                    }
                }
                ")" | "]" | "}" => return,
                ";" => {
                    self.at += 1;
                    return;
                }
                "," if !is_item => {
                    self.at += 1;
                    return;
                }
                _ => self.at += 1,
            }
        }
    }

    fn module(&mut self) {
        let module = [self.scope.as_slice(), &[self.peek(1).to_owned()]].concat();
        let named = self.path_attribute.take();
        self.at += 3;
        if self.tokens.get(self.at - 1).map(|token| token.text) == Some("{") {
            self.index
                .modules
                .insert(module.clone(), self.file.to_owned());
            self.scope = module;
            self.braces.push(true);
            return;
        }
        let (folder, name) = self.file.rsplit_once('/').unwrap_or(("", self.file));
        let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
        if let Some(named) = named {
            parts.push(named);
            self.children.push((module, vec![parts.join("/")]));
            return;
        }
        if name != "mod.rs" && !is_root(self.file) {
            parts.push(name.trim_end_matches(".rs"));
        }
        parts.extend(module[self.depth..].iter().map(String::as_str));
        let stem = parts.join("/");
        let candidates = vec![format!("{stem}.rs"), format!("{stem}/mod.rs")];
        self.children.push((module, candidates));
    }

    /// Reads one tree of a `use` declaration behind `prefix`.
    fn tree(&mut self, prefix: &[String]) {
        let mut segments = prefix.to_vec();
        let line = self.tokens.get(self.at).map_or(0, |token| token.line);
        if self.peek(0) == "::" {
            // The empty name keeps the path from being resolved in this crate.
            segments.push(String::new());
            self.at += 1;
        }
        loop {
            match self.peek(0) {
                "{" => {
                    self.at += 1;
                    while !matches!(self.peek(0), "}" | "") {
                        self.tree(&segments);
                        if self.peek(0) == "," {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    return;
                }
                "*" => {
                    self.at += 1;
                    self.mention(line, segments);
                    return;
                }
                name => {
                    segments.push(name.to_owned());
                    self.at += 1;
                }
            }
            if self.peek(0) != "::" {
                break;
            }
            self.at += 1;
        }
        if segments.len() > 1 && segments.last().is_some_and(|last| last == "self") {
            segments.pop();
        }
        let mut name = segments.last().cloned().unwrap_or_default();
        if self.peek(0) == "as" {
            name = self.peek(1).to_owned();
            self.at += 2;
        }
        let place = (self.scope.clone(), name);
        self.index.names.insert(place, segments.clone());
        self.mention(line, segments);
    }

    /// Reads a path in code.
    fn path(&mut self) {
        let is_tail = self.at > 0 && self.tokens[self.at - 1].text == "::";
        let line = self.tokens[self.at].line;
        let mut segments = vec![self.peek(0).to_owned()];
        self.at += 1;
        while self.peek(0) == "::" && self.is_name(1) {
            segments.push(self.peek(1).to_owned());
            self.at += 2;
        }
        if segments.len() > 1 && !is_tail {
            self.mention(line, segments);
        }
    }

    fn mention(&mut self, line: usize, segments: Vec<String>) {
        self.index.mentions.push(Mention {
            scope: self.scope.clone(),
            file: self.file.to_owned(),
            line,
            segments,
        });
    }
}
