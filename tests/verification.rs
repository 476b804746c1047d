//! The table of bugs in docs/verification.md: every test that a row names exists, is a test, and names all
//! bugs of the row in its name or its comment.

use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The file and the name of a test that is called `edges::in_all_shapes::name`.
fn place(test: &str) -> (String, &str) {
    let (module, name) = test.rsplit_once("::").expect("a test is module::name");
    (format!("tests/{}.rs", module.replace("::", "/")), name)
}

/// The comments and attributes above `fn name(`; `None` if there is no such function.
fn above(source: &str, name: &str) -> Option<String> {
    let lines: Vec<&str> = source.lines().collect();
    let is_it = |line: &&str| {
        let rest = line.trim_start().strip_prefix("fn ").and_then(|rest| rest.strip_prefix(name));
        rest.is_some_and(|rest| rest.starts_with(['(', '<']))
    };
    let at = lines.iter().position(is_it)?;
    let start = lines[..at].iter().rposition(|line| {
        let line = line.trim_start();
        !(line.starts_with("//") || line.starts_with("#["))
    });
    Some(lines[start.map_or(0, |start| start + 1)..at].join("\n"))
}

/// A function is a test by its attribute, or because a macro makes a test of each name in a list.
fn is_test(source: &str, name: &str, above: &str) -> bool {
    let lists = source.lines().any(|line| line.trim().trim_end_matches(',') == name);
    above.contains("#[test]") || source.contains("macro_rules! both") && lists
}

/// Whether the text names the bug, also in a list of a project's bugs: `pytorch#32049, #39769`.
fn names(text: &str, bug: &str) -> bool {
    if text.contains(bug) {
        return true;
    }
    let Some((project, number)) = bug.split_once('#') else { return false };
    let mut last = "";
    let is_end = |c: char| c == ',' || c == ':' || c == ';' || c == '.' || c.is_whitespace();
    for word in text.split(is_end).filter(|word| word.contains('#')) {
        let (owner, digits) = word.split_once('#').expect("has one");
        if !owner.is_empty() {
            last = owner.trim_start_matches('(');
        }
        if last == project && digits.trim_end_matches(')') == number {
            return true;
        }
    }
    false
}

#[test]
fn the_table_of_bugs_names_tests_that_exist() {
    let document = read("docs/verification.md");
    let (_, table) = document.split_once("| seen in |").expect("the table");
    let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 29, "rows of the table");
    let mut wrong = Vec::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [bugs, _, tests] = cells[..] else { panic!("not three cells: {row}") };
        let mut comments = String::new();
        for test in tests.split(", ").map(|test| test.trim_matches('`')) {
            let (file, name) = place(test);
            let source = read(&file);
            let Some(above) = above(&source, name) else {
                wrong.push(format!("{test} is not in {file}"));
                continue;
            };
            if !is_test(&source, name, &above) {
                wrong.push(format!("{test} is no test"));
            }
            // A macro has the comments where it lists the tests.
            let listed = source.lines().rev().skip_while(|line| line.trim() != name).skip(1);
            let listed: Vec<&str> =
                listed.take_while(|line| line.trim().starts_with("///")).collect();
            comments +=
                &format!("{above}\n{}\n", listed.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let comments = comments.replace("\n///", " ").replace("\n    ///", " ");
        for bug in bugs.split(", ") {
            let bug = bug.replace('`', "");
            if !names(&comments.replace('`', ""), &bug) {
                wrong.push(format!("no test of the row names {bug}"));
            }
        }
    }
    assert!(wrong.is_empty(), "docs/verification.md:\n{}", wrong.join("\n"));
}

#[test]
fn what_is_not_there_is_seen() {
    let source = "/// TE#1, #2 and\n/// ROCm TE#3.\n#[test]\nfn real() {}\n\nfn helper() {}\n";
    let comment = above(source, "real").unwrap();
    assert!(is_test(source, "real", &comment));
    assert!(!is_test(source, "helper", &above(source, "helper").unwrap()));
    assert_eq!(above(source, "rea"), None);
    for (bug, named) in [("TE#1", true), ("TE#2", true), ("TE#3", true), ("TE#4", false)] {
        assert_eq!(names(&comment, bug), named, "{bug}");
    }
    assert!(!names(&comment, "pytorch#1"));
}
