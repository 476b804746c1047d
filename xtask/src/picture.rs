//! docs/img: drawn from what was recorded in docs/data, by the commands that record it.

use crate::bench;
use crate::peers;
use crate::svg::{SERIES, Svg};
use crate::tool::{Result, make_directory, root, shown};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A recorded run: what its comments say, and its lines by column.
pub struct Run {
    notes: BTreeMap<String, String>,
    lines: Vec<BTreeMap<String, String>>,
}

impl Run {
    /// None if there is none.
    pub fn read(path: &Path) -> Option<Run> {
        Some(Run::parse(&fs::read_to_string(path).ok()?))
    }

    fn parse(text: &str) -> Run {
        let mut run = Run { notes: BTreeMap::new(), lines: Vec::new() };
        let mut columns: Vec<&str> = Vec::new();
        for line in text.lines() {
            if let Some((name, value)) = line.strip_prefix("# ").and_then(|l| l.split_once(": ")) {
                run.notes.insert(name.to_string(), value.to_string());
            } else if columns.is_empty() {
                columns = line.split(',').collect();
            } else {
                let cells = columns.iter().zip(line.split(','));
                run.lines.push(cells.map(|(c, v)| (c.to_string(), v.to_string())).collect());
            }
        }
        run
    }

    fn note(&self, name: &str) -> &str {
        self.notes.get(name).map_or("", String::as_str)
    }

    /// Where and when, and what has to be known besides.
    fn footing(&self) -> String {
        let note = self.note("note");
        let note = if note.is_empty() { String::new() } else { format!(" ({note})") };
        format!("{}; {}{note}", self.note("machine"), self.note("date"))
    }
}

fn cell<'a>(line: &'a BTreeMap<String, String>, column: &str) -> &'a str {
    line.get(column).map_or("", String::as_str)
}

fn number(line: &BTreeMap<String, String>, column: &str) -> Option<f64> {
    cell(line, column).parse().ok()
}

/// Draws what there is a record of.
pub fn draw() -> Result {
    let directory = root().join("docs/img");
    make_directory(&directory)?;
    let write = |name: &str, picture: Option<String>| -> Result {
        let Some(picture) = picture else { return Ok(()) };
        let path = directory.join(name);
        fs::write(&path, picture)
            .map_err(|error| format!("cannot write {}: {error}", shown(&path)))?;
        println!("drew {}", shown(&path));
        Ok(())
    };
    if let Some(run) = Run::read(&root().join(bench::RECORD)) {
        write("throughput.svg", throughput(&run))?;
    }
    if let Some(run) = Run::read(&root().join(peers::RECORD)) {
        write("peers.svg", against_peers(&run, "f32"))?;
        write("peers-bf16.svg", against_peers(&run, "bf16"))?;
    }
    Ok(())
}

/// Kernels with their limits, a panel each.
const PANELS: [(&str, &str, &str, &str); 4] = [
    ("forward", "limit-read", "Forward", "reading"),
    ("in-place", "limit-scale", "Forward + backward, in place", "scaling in place"),
    ("both", "limit-copy", "Forward + backward, out of place", "copying"),
    ("backward", "limit-copy", "Backward, out of place", "copying"),
];

/// Throughput against the number of classes, on one thread and on all.
fn throughput(run: &Run) -> Option<String> {
    let set = ["avx512", "avx2", "neon", "portable"]
        .into_iter()
        .find(|set| run.lines.iter().any(|line| cell(line, "set") == *set))?;
    // By call, threads and classes.
    let mut points: BTreeMap<(String, u32), BTreeMap<u64, f64>> = BTreeMap::new();
    for line in &run.lines {
        let (what, shape) = (cell(line, "what"), cell(line, "shape"));
        let is_sweep = ["read", "scale", "copy"].contains(&cell(line, "of"));
        let of_set = is_sweep && cell(line, "set") == set;
        let is_rows = shape.split('x').count() == 2 && !shape.starts_with('T');
        if cell(line, "dtype") == "f32" && is_rows && (of_set || what.starts_with("limit-")) {
            let key = (what.to_string(), number(line, "threads")? as u32);
            let classes = number(line, "classes")? as u64;
            points.entry(key).or_default().insert(classes, number(line, "gelements")?);
        }
    }
    let threads: Vec<u32> = {
        let mut threads: Vec<u32> =
            points.keys().filter(|(what, _)| what == "forward").map(|(_, n)| *n).collect();
        threads.sort_unstable();
        threads
    };
    let (width, height) = (470.0, 300.0);
    let mut svg = Svg::new(width * 2.0, 60.0 + height * 2.0 + 24.0);
    svg.text(
        16.0,
        24.0,
        "title",
        &format!(
            "Throughput against the number of classes, f32, {set}: kernels and their memory limits"
        ),
    );
    svg.text(16.0, 42.0, "note", &run.footing());
    for (i, (kernel, limit, title, limit_name)) in PANELS.into_iter().enumerate() {
        let origin = ((i % 2) as f64 * width, 60.0 + (i / 2) as f64 * height);
        let mut series = Vec::new();
        for (j, &threads) in threads.iter().rev().enumerate() {
            let plural = if threads == 1 { "" } else { "s" };
            let of = |what: &str| points.get(&(what.to_string(), threads)).cloned();
            let colour = SERIES[j % SERIES.len()];
            series.push((of(kernel)?, colour, "", format!("xent, {threads} thread{plural}")));
            series.push((of(limit)?, colour, "thin", format!("{limit_name}, {threads}")));
        }
        panel(&mut svg, origin, (width, height), title, &series);
    }
    let foot = 60.0 + height * 2.0 + 12.0;
    svg.text(
        16.0,
        foot,
        "note",
        "Dashed: the same logits only read, scaled or copied. 64 MiB of logits.",
    );
    Some(svg.finish(
        "Throughput of xent's kernels against the number of classes, beside memory's limits",
    ))
}

type Series = (BTreeMap<u64, f64>, &'static str, &'static str, String);

/// One chart: classes on a logarithmic axis, Gelement/s on a linear one.
fn panel(svg: &mut Svg, origin: (f64, f64), size: (f64, f64), title: &str, series: &[Series]) {
    let (left, right, top, bottom) = (54.0, 132.0, 48.0, 44.0);
    let (x0, x1) = (origin.0 + left, origin.0 + size.0 - right);
    let (y0, y1) = (origin.1 + size.1 - bottom, origin.1 + top);
    let classes = || series.iter().flat_map(|(points, ..)| points.keys().copied());
    let (low, high) = (classes().min().unwrap_or(1) as f64, classes().max().unwrap_or(10) as f64);
    let most = series.iter().flat_map(|(points, ..)| points.values().copied()).fold(0.1, f64::max);
    let step = step(most / 4.0);
    let top_value = (most / step).ceil() * step;
    let x = |classes: f64| x0 + (classes / low).ln() / (high / low).ln().max(1e-9) * (x1 - x0);
    let y = |value: f64| y0 - value / top_value * (y0 - y1);

    svg.text(origin.0 + 16.0, origin.1 + 18.0, "label", title);
    let mut tick = 0.0;
    while tick <= top_value + step / 2.0 {
        svg.line((x0, y(tick)), (x1, y(tick)), if tick == 0.0 { "axis" } else { "grid" });
        svg.text(
            x0 - 6.0,
            y(tick) + 4.0,
            "tick end",
            &format!("{}", (tick * 100.0).round() / 100.0),
        );
        tick += step;
    }
    let mut power = 1.0;
    while power <= high {
        if power >= low {
            svg.line((x(power), y0), (x(power), y0 + 4.0), "axis");
            let text = match power {
                1e6.. => format!("{}M", power / 1e6),
                1e3.. => format!("{}k", power / 1e3),
                _ => format!("{power}"),
            };
            svg.text(x(power), y0 + 17.0, "tick middle", &text);
        }
        power *= 10.0;
    }
    svg.text((x0 + x1) / 2.0, y0 + 34.0, "tick middle", "classes");
    svg.text(x0 - 38.0, y1 - 12.0, "tick", "Gelement/s");

    // Labels beside the ends of the lines, moved apart where they would overlap.
    let mut labels: Vec<(f64, &str, &str)> = Vec::new();
    for (points, colour, dash, name) in series {
        let path: Vec<(f64, f64)> =
            points.iter().map(|(&classes, &value)| (x(classes as f64), y(value))).collect();
        svg.path(&path, &format!("s{colour} {dash}"));
        if let Some(&(_, end)) = path.last() {
            labels.push((end, colour, name));
        }
    }
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut floor = f64::NEG_INFINITY;
    for (at, colour, name) in labels {
        let at = f64::max(at, floor);
        svg.text(x1 + 6.0, at + 4.0, &format!("f{colour}"), name);
        floor = at + 15.0;
    }
}

/// 1, 2 or 5 times a power of ten, at least `at_least`.
fn step(at_least: f64) -> f64 {
    let power = 10f64.powf(at_least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|f| f * power).find(|s| *s >= at_least).unwrap_or(power)
}

/// What a peer is called in print.
fn shown_name(peer: &str) -> &str {
    match peer {
        "c" => "plain C",
        "onednn" => "oneDNN",
        "torch" => "PyTorch",
        "torch-warm" => "PyTorch, warm",
        "torch-compile" => "torch.compile",
        "jax" => "JAX",
        "tensorflow" => "TensorFlow",
        other => other,
    }
}

/// Time of a call by xent and by each peer, for each shape and kind: bars on a logarithmic axis.
fn against_peers(run: &Run, dtype: &str) -> Option<String> {
    // A peer, its time, and the times of xent's.
    type Bar = (String, f64, f64);
    // By shape and kind, in the order of the record.
    let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
    for line in run.lines.iter().filter(|line| cell(line, "dtype") == dtype) {
        let (Some(time), Some(ratio)) = (number(line, "ms"), number(line, "ratio")) else {
            continue;
        };
        let mut peer = shown_name(cell(line, "peer")).to_string();
        let kind = match (cell(line, "kind"), cell(line, "peer")) {
            ("forward", _) => "forward",
            ("both", _) => "forward + backward",
            // Beside what others can do: out of place. That of C is held against xent's in place.
            (_, "xent") => {
                peer += ", in place";
                "forward + backward"
            }
            _ => continue,
        };
        let name = format!("{}, {kind}", cell(line, "shape").replace('x', " × "));
        let bar = (peer, time, ratio);
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, bars)) => bars.push(bar),
            None => groups.push((name, vec![bar])),
        }
    }
    if groups.is_empty() {
        return None;
    }
    for (_, bars) in &mut groups {
        bars.sort_by(|a, b| a.1.total_cmp(&b.1));
    }
    let (row, width) = (19.0, 470.0);
    let tallest = groups.iter().map(|(_, bars)| bars.len()).max()? as f64;
    let height = 34.0 + tallest * row + 18.0;
    let lines = groups.len().div_ceil(2) as f64;
    let mut svg = Svg::new(width * 2.0, 60.0 + lines * height);
    let title = format!(
        "Milliseconds a call, {dtype}, xent beside others (logarithmic; shorter is better)"
    );
    svg.text(16.0, 24.0, "title", &title);
    svg.text(16.0, 42.0, "note", &run.footing());
    for (i, (name, bars)) in groups.iter().enumerate() {
        let (left, top) = ((i % 2) as f64 * width, 60.0 + (i / 2) as f64 * height);
        svg.text(left + 16.0, top + 18.0, "label", name);
        let (x0, room) = (left + 140.0, width - 140.0 - 116.0);
        let (low, high) = (bars.first()?.1 * 0.5, bars.last()?.1);
        for (j, (peer, time, ratio)) in bars.iter().enumerate() {
            let y = top + 30.0 + j as f64 * row;
            let is_ours = peer.starts_with("xent");
            let class = if is_ours { "tick end label fa" } else { "tick end" };
            svg.text(x0 - 6.0, y + 11.0, class, peer);
            let length = (time / low).ln() / (high / low).ln() * room;
            svg.bar(x0, y, length, row - 5.0, if is_ours { "fa" } else { "fc" });
            let times = if is_ours { String::new() } else { format!("  ({ratio:.1}×)") };
            let digits = if *time < 10.0 { 2 } else { 1 };
            svg.text(x0 + length + 6.0, y + 11.0, "tick", &format!("{time:.digits$} ms{times}"));
        }
    }
    Some(svg.finish("Time of a call by xent and by other libraries"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_become_pictures() {
        let run = Run::parse(
            "# machine: a machine\n# date: today\n\
             what,dtype,shape,classes,set,threads,gelements,ratio,of,target,verdict\n\
             limit-read,f32,8x1000,1000,,2,8.0,,,,\nlimit-scale,f32,8x1000,1000,,2,4.0,,,,\n\
             limit-copy,f32,8x1000,1000,,2,3.0,,,,\nlimit-read,f32,8x10,10,,2,8.0,,,,\n\
             forward,f32,8x10,10,avx512,2,1.0,0.1,read,,\n\
             forward,f32,8x1000,1000,avx512,2,7.0,0.9,read,,\n\
             in-place,f32,8x1000,1000,avx512,2,3.0,0.8,scale,,\n\
             both,f32,8x1000,1000,avx512,2,2.0,0.7,copy,,\n\
             backward,f32,8x1000,1000,avx512,2,2.0,0.7,copy,,\n",
        );
        let picture = throughput(&run).expect("all there is to draw");
        assert!(picture.contains("a machine; today") && picture.contains("xent, 2 threads"));
        // Forward and its limit, of two points each: four panels of two lines.
        assert_eq!(picture.matches("<polyline").count(), 8);

        let run = Run::parse(
            "peer,dtype,shape,kind,threads,ms,ratio\nxent,f32,2x3,forward,2,1.0,1.00\n\
             torch,f32,2x3,forward,2,9.5,9.25\nc,bf16,2x3,forward,2,2.0,2.00\n",
        );
        let picture = against_peers(&run, "f32").expect("all there is to draw");
        assert!(picture.contains("9.50 ms  (9.2×)") || picture.contains("9.50 ms  (9.3×)"));
        assert!(!picture.contains("plain C"));
        assert!(against_peers(&run, "f64").is_none());
    }
}
