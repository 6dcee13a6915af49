//! `process.terminal`.

use std::{fs::File, io::Write};

use serde_json::json;

use crate::harness::*;

#[test]
fn a_terminal_is_the_controlling_one_and_has_its_size() {
    let mut place = Place::new();
    place.spec["process"]["terminal"] = json!(true);
    place.spec["process"]["args"] = json!([
        "sh",
        "-c",
        "tty; stty size; stat -c '%t:%T' /dev/console; test -t 0 && test -t 2 && echo all; read \
            x; echo got $x; stat -c %u $(tty)"
    ]);
    place.spec["process"]["user"] = json!({"uid": 1000, "gid": 0});
    let mut options = place.options();
    options.console_size = Some((132, 43));
    let (mut container, created) =
        Container::create(&place.id, place.parsed(), options, Stdio::default()).unwrap();
    let master = created.terminal.unwrap();
    container.start().unwrap();
    File::from(master.try_clone().unwrap())
        .write_all(b"word\n")
        .unwrap();
    let text = read(master);
    assert_eq!(wait(created.pid), 0, "{text}");
    container.delete().unwrap();
    let lines: Vec<_> = text.lines().filter(|line| *line != "word").collect();
    assert_eq!(
        lines,
        ["/dev/pts/0", "43 132", "88:0", "all", "got word", "1000"]
    );
}

#[test]
fn a_further_process_has_a_terminal_of_its_own() {
    let running = Place::new().sleeping();
    let mut exec = process(&["sh", "-c", "tty; stty size"]);
    exec["terminal"] = json!(true);
    let exec = serde_json::from_value(exec).unwrap();
    let (mut exec, created) = running
        .container()
        .exec("tty", exec, Some((80, 25)), Stdio::default())
        .unwrap();
    exec.start().unwrap();
    let text = read(created.terminal.unwrap());
    assert_eq!(wait(created.pid), 0);
    assert_eq!(text.lines().collect::<Vec<_>>(), ["/dev/pts/0", "25 80"]);
}
