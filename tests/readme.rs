//! README.md is also the page of the crate's registry, where a path of this repository leads nowhere.

use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The text without its blocks of code.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// Where each `[text](place)` and `![text](place)` leads, and each `src` or `href` of HTML.
fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (start, end) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
        found.extend(text.split(start).skip(1).filter_map(|rest| rest.split(end).next()));
    }
    // A definition, `[name]: place`.
    let definitions = text.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: "));
    found.extend(definitions.map(|(_, place)| place));
    found
}

/// The anchors of a document's headings, as GitHub, crates.io and rustdoc make them.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = |c: &char| c.is_alphanumeric() || ['-', '_', ' '].contains(c);
        heading.chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_leads_somewhere_on_crates_io_too() {
    let readme = prose(&read("README.md"));
    let links = links(&readme);
    assert!(links.len() >= 4, "{links:?}");
    for link in links {
        if let Some(anchor) = link.strip_prefix('#') {
            assert!(anchors(&readme).iter().any(|one| one == anchor), "no heading makes {link}");
            continue;
        }
        assert!(link.starts_with("https://"), "{link} is a path: name the file without a link");
        // What rustdoc shows is a document of this repository.
        let Some(page) = link.strip_prefix("https://docs.rs/xent/latest/xent/") else { continue };
        let (module, anchor) = page.split_once('#').unwrap_or((page, ""));
        let module = module.strip_suffix("/index.html").expect("a module");
        let document = format!("docs/{module}.md");
        let included = format!("#[doc = include_str!(\"../{document}\")]\npub mod {module} {{}}");
        assert!(read("src/lib.rs").contains(&included), "rustdoc has no {module}");
        let known = anchor.is_empty() || anchors(&prose(&read(&document))).contains(&anchor.into());
        assert!(known, "{document} has no heading for {link}");
    }
}

#[test]
fn it_stays_short() {
    assert!(read("README.md").lines().count() <= 250);
}
