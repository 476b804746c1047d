//! docs/img: drawn by plotters from what was recorded in docs/data, by the commands that record it.

use crate::tool::{Result, root, shell, shown};
use crate::{bench, peers};
use anyhow::Context;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::collections::BTreeMap;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const FONT: &str = "sans-serif";
const GREY: RGBColor = RGBColor(110, 119, 129);
const COLOURS: [RGBColor; 2] = [RGBColor(9, 105, 218), RGBColor(188, 76, 0)];

/// A recorded run: the notes in its comments, and its lines by column.
struct Run {
    notes: BTreeMap<String, String>,
    lines: Vec<BTreeMap<String, String>>,
}

impl Run {
    fn parse(text: &str) -> Run {
        let notes = text.lines().filter_map(|line| line.strip_prefix("# ")?.split_once(": "));
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        let columns: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
        let cells = |line: &str| {
            let cells = columns.iter().zip(line.split(','));
            cells.map(|(column, value)| (column.to_string(), value.to_string())).collect()
        };
        Run {
            notes: notes.map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            lines: lines.map(cells).collect(),
        }
    }

    /// A title, and below it where and when the run was recorded. Returns the area below.
    fn heading<'a>(&self, area: &Area<'a>, title: &str) -> Result<Area<'a>> {
        let note = |name: &str| self.notes.get(name).map_or("", String::as_str);
        area.fill(&WHITE)?;
        let area = area.titled(title, (FONT, 18))?;
        let note = format!("{}; {} {}", note("machine"), note("date"), note("note"));
        Ok(area.titled(note.trim(), (FONT, 13).into_font().color(&GREY))?)
    }
}

fn number(line: &BTreeMap<String, String>, column: &str) -> Option<f64> {
    line.get(column)?.parse().ok()
}

/// Draws what there is a record of.
pub fn draw() -> Result {
    let sh = shell()?;
    let images = root().join("docs/img");
    sh.create_dir(&images)?;
    type Picture = fn(&Run) -> Result<String>;
    let pictures: [(&str, &str, Picture); 3] = [
        (bench::RECORD, "throughput.svg", throughput),
        (peers::RECORD, "peers.svg", |run| against_peers(run, "f32")),
        (peers::RECORD, "peers-bf16.svg", |run| against_peers(run, "bf16")),
    ];
    for (record, name, picture) in pictures {
        if root().join(record).is_file() {
            let path = images.join(name);
            sh.write_file(&path, picture(&Run::parse(&sh.read_file(record)?))?)?;
            println!("drew {}", shown(&path));
        }
    }
    Ok(())
}

/// Draws on an area of this size and returns the SVG.
fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Result) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&area)?;
        area.present()?;
    }
    Ok(text)
}

/// Kernels with their limits, a panel each.
const PANELS: [(&str, &str, &str, &str); 4] = [
    ("forward", "limit-read", "Forward", "reading"),
    ("in-place", "limit-scale", "Forward + backward, in place", "scaling in place"),
    ("both", "limit-copy", "Forward + backward, out of place", "copying"),
    ("backward", "limit-copy", "Backward, out of place", "copying"),
];

/// Throughput against the number of classes, on one thread and on all.
fn throughput(run: &Run) -> Result<String> {
    let has = |set: &&str| run.lines.iter().any(|line| line["set"] == *set);
    let set = ["avx512", "avx2", "neon", "portable"].into_iter().find(has);
    let set = set.context("the record has no figures of a set")?;
    // Classes and throughput, by call and threads.
    let mut points: BTreeMap<(&str, u32), BTreeMap<u64, f64>> = BTreeMap::new();
    for line in run.lines.iter().filter(|line| line["dtype"] == "f32") {
        let (what, shape) = (line["what"].as_str(), &line["shape"]);
        let of_set = ["read", "scale", "copy"].contains(&&*line["of"]) && line["set"] == set;
        let is_rows = shape.split('x').count() == 2 && !shape.starts_with('T');
        if is_rows && (of_set || what.starts_with("limit-")) {
            let figures =
                [number(line, "threads"), number(line, "classes"), number(line, "gelements")];
            if let [Some(threads), Some(classes), Some(speed)] = figures {
                points.entry((what, threads as u32)).or_default().insert(classes as u64, speed);
            }
        }
    }
    let threads: Vec<u32> =
        points.keys().filter(|key| key.0 == "forward").map(|key| key.1).rev().collect();
    svg((940, 700), |area| {
        let title =
            format!("Throughput by number of classes, f32, {set}; dashed: the memory's limits");
        let area = run.heading(area, &title)?;
        for ((kernel, limit, title, limit_name), area) in
            PANELS.iter().zip(area.split_evenly((2, 2)))
        {
            let mut series = Vec::new();
            for (&threads, colour) in threads.iter().zip(COLOURS) {
                for (what, name, dashed) in [(kernel, "xent", false), (limit, *limit_name, true)] {
                    let points = points.get(&(*what, threads)).context("the record has gaps")?;
                    let points: Vec<_> = points.iter().map(|(&x, &y)| (x as f64, y)).collect();
                    series.push((
                        points,
                        colour,
                        dashed,
                        format!("{name}, {threads} thread{}", if threads == 1 { "" } else { "s" }),
                    ));
                }
            }
            let all = || series.iter().flat_map(|series| &series.0);
            let low = all().map(|point| point.0).fold(f64::INFINITY, f64::min);
            let high = all().map(|point| point.0).fold(low * 2.0, f64::max);
            let most = all().map(|point| point.1).fold(0.0, f64::max) * 1.05;
            let mut chart = ChartBuilder::on(&area)
                .caption(title, (FONT, 15))
                .margin(10)
                .x_label_area_size(36)
                .y_label_area_size(44)
                .build_cartesian_2d((low..high).log_scale(), 0.0..most)?;
            let mesh = &mut chart.configure_mesh();
            mesh.light_line_style(TRANSPARENT)
                .x_desc("classes")
                .y_desc("Gelement/s")
                .x_label_formatter(&thousands)
                .draw()?;
            for (points, colour, dashed, name) in series {
                let drawn = if dashed {
                    chart.draw_series(DashedLineSeries::new(
                        points,
                        5,
                        4,
                        colour.stroke_width(1),
                    ))?
                } else {
                    chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                };
                let width = if dashed { 1 } else { 3 };
                drawn.label(name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(width))
                });
            }
            let legend = &mut chart.configure_series_labels();
            legend.position(SeriesLabelPosition::LowerRight).label_font((FONT, 11)).draw()?;
        }
        Ok(())
    })
}

fn thousands(number: &f64) -> String {
    match *number {
        1e6.. => format!("{}M", number / 1e6),
        1e3.. => format!("{}k", number / 1e3),
        _ => format!("{number}"),
    }
}

/// A peer's name in print.
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
fn against_peers(run: &Run, dtype: &str) -> Result<String> {
    // A peer, its time, and the times of xent's; by shape and kind, in the order of the record.
    type Bar = (String, f64, f64);
    let mut groups: Vec<(String, Vec<Bar>)> = Vec::new();
    for line in run.lines.iter().filter(|line| line["dtype"] == dtype) {
        let (Some(time), Some(ratio)) = (number(line, "ms"), number(line, "ratio")) else {
            continue;
        };
        let mut peer = shown_name(&line["peer"]).to_string();
        let kind = match (&*line["kind"], &*line["peer"]) {
            ("forward", _) => "forward",
            ("both", _) => "forward + backward",
            // Among the calls out of place: the others have none in place.
            (_, "xent") => {
                peer += ", in place";
                "forward + backward"
            }
            _ => continue,
        };
        let name = format!("{}, {kind}", line["shape"].replace('x', " × "));
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, bars)) => bars.push((peer, time, ratio)),
            None => groups.push((name, vec![(peer, time, ratio)])),
        }
    }
    let rows = groups.len().div_ceil(2);
    svg((940, 60 + 240 * rows as u32), |area| {
        let title = format!("Milliseconds a call, {dtype} (logarithmic; shorter is better)");
        let area = run.heading(area, &title)?;
        for ((name, bars), area) in groups.iter_mut().zip(area.split_evenly((rows, 2))) {
            bars.sort_by(|a, b| a.1.total_cmp(&b.1));
            let (low, high) = (bars[0].1 * 0.5, bars[bars.len() - 1].1);
            // Names and times stand beside the bars.
            let mut chart = ChartBuilder::on(&area)
                .caption(name, (FONT, 15))
                .margin_left(120)
                .margin_right(110)
                .build_cartesian_2d((low..high).log_scale(), 0.0..bars.len() as f64)?;
            for (j, (peer, time, ratio)) in bars.iter().enumerate() {
                let middle = (bars.len() - j) as f64 - 0.5;
                let is_ours = peer.starts_with("xent");
                let colour = if is_ours { COLOURS[0] } else { GREY };
                let corners = [(low, middle - 0.35), (*time, middle + 0.35)];
                chart.draw_series([Rectangle::new(corners, colour.filled())])?;
                let times = if is_ours { String::new() } else { format!("  ({ratio:.1}×)") };
                let digits = if *time < 10.0 { 2 } else { 1 };
                let label = format!("\u{a0}{time:.digits$} ms{times}");
                let style =
                    |side| (FONT, 12).into_font().color(&BLACK).pos(Pos::new(side, VPos::Center));
                chart.draw_series([
                    Text::new(format!("{peer}\u{a0}"), (low, middle), style(HPos::Right)),
                    Text::new(label, (*time, middle), style(HPos::Left)),
                ])?;
            }
        }
        Ok(())
    })
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
        assert!(picture.contains("a machine; today"));
        // A legend in each of four panels.
        assert_eq!(picture.matches("xent, 2 threads").count(), 4);

        let run = Run::parse(
            "peer,dtype,shape,kind,threads,ms,ratio\nxent,f32,2x3,forward,2,1.0,1.00\n\
             torch,f32,2x3,forward,2,9.5,9.25\nc,bf16,2x3,forward,2,2.0,2.00\n",
        );
        let picture = against_peers(&run, "f32").expect("all there is to draw");
        assert!(picture.contains("9.50 ms  (9.2×)") || picture.contains("9.50 ms  (9.3×)"));
        assert!(!picture.contains("plain C"));
    }
}
