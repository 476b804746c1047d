//! docs/recipes.md: its snippets run, and are those of the examples.

use std::fs;
use std::path::Path;

#[path = "../examples/recipes.rs"]
mod recipes;

/// The C++ snippets are run by `cargo xtask test examples`.
#[test]
fn gradients_are_those_of_their_losses() {
    recipes::main().unwrap();
}

#[test]
fn snippets_are_those_of_the_examples() {
    let read =
        |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let document = read("docs/recipes.md");
    let mut counts = [0; 2];
    for (count, (fence, source)) in counts
        .iter_mut()
        .zip([("```rust\n", "examples/recipes.rs"), ("```cpp\n", "examples/cpp/recipes.cpp")])
    {
        let source = read(source);
        for snippet in document.split(fence).skip(1) {
            let (snippet, _) = snippet.split_once("```\n").unwrap();
            assert!(source.contains(&format!("\n\n{snippet}")), "no example has\n{snippet}");
            *count += 1;
        }
    }
    assert_eq!(document.matches("```").count(), 2 * counts.iter().sum::<usize>());
    assert_eq!(counts, [8, 6]);
}
