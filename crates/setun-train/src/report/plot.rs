//! Line plots as inline SVG: no script, no font, no network. Colours come from the CSS
//! variables of [`COLORS`], so that a plot follows the page's light or dark scheme.

mod ticks;

use std::fmt::Write;

use super::{compact, escape, grouped, percent};
use ticks::{Ticks, linear_axis, log_axis};

/// CSS with the colours of pages and of the first three series, in light and dark schemes.
pub const COLORS: &str = "\
:root{color-scheme:light dark;--page:#f5f6f8;--surface:#fff;--ink:#1a1e25;--muted:#586172;
--line:#e3e6eb;--axis:#9aa3b1;--good:#17693b;--good-bg:#e4f4ea;--bad:#a52714;--bad-bg:#fdebe7;
--info:#2456b3;--info-bg:#e7effc;--mark:#fff0b8;--series-0:#2563c9;--series-1:#c2560c;--series-2:#17803d}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--surface:#171b21;--ink:#e6e9ee;--muted:#9ba5b4;
--line:#2a303a;--axis:#667080;--good:#74d69a;--good-bg:#15301f;--bad:#ff9d8f;--bad-bg:#3a1b17;
--info:#8fb8ff;--info-bg:#17263f;--mark:#4d3f0e;--series-0:#7fb0ff;--series-1:#f6a55c;--series-2:#74d69a}}
";

/// CSS that plots need beside [`COLORS`].
pub const STYLE: &str = "\
svg text{font:12px system-ui,sans-serif;fill:var(--muted);font-variant-numeric:tabular-nums}
svg .axis{stroke:var(--axis);fill:none}
svg .grid{stroke:var(--line);fill:none}
svg .label{font-weight:600;fill:var(--ink)}
svg .s0{--c:var(--series-0)}
svg .s1{--c:var(--series-1)}
svg .s2{--c:var(--series-2)}
svg .s3{--c:var(--series-3)}
svg .s4{--c:var(--series-4)}
svg .s5{--c:var(--series-5)}
svg .s6{--c:var(--series-6)}
svg .s7{--c:var(--series-7)}
svg .s8{--c:var(--series-8)}
svg .s9{--c:var(--series-9)}
svg .s10{--c:var(--series-10)}
svg .s11{--c:var(--series-11)}
svg .curve{stroke:var(--c);fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dashed{stroke-dasharray:6 4}
svg .thin{stroke-width:1}
svg .raw{stroke-width:1;opacity:.28}
svg .dot{fill:var(--c);stroke:var(--surface)}
svg .end{fill:var(--c);font-weight:600}
svg .best{stroke:var(--c);stroke-dasharray:2 3;fill:none}
svg .ring{stroke:var(--c);stroke-width:2;fill:var(--surface)}
svg .rug{stroke:var(--bad);stroke-width:1.5;fill:none}
";

const LEFT: f64 = 68.0;
const RIGHT: f64 = 64.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 44.0;
/// Distance of two lines of text.
const LINE_HEIGHT: f64 = 14.0;
/// Series with fewer points are drawn as they are.
const MIN_POINTS_TO_SMOOTH: usize = 24;
/// Values beyond this are not drawn: the axis around them would overflow.
const LARGEST: f64 = 1e300;
/// A smoothed line has at most about this many points.
const MAX_SMOOTH_POINTS: usize = 600;
/// Share of all points that each point of a smoothed line follows from.
const SMOOTHING: f64 = 1.0 / 32.0;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A line.
    Line,
    /// A faint line through all points under a smoothed one.
    Noisy,
    /// The smoothed line alone, thin: for many series in one plot.
    Smooth,
    /// A dashed line with a dot at each point: tells it from the others without colour.
    Dots,
}

/// Unit of the values on the y axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Plain numbers.
    Plain,
    /// Shares, written in percent.
    Share,
}

/// One line of a plot. Points that cannot be drawn (not finite, or not positive on a
/// logarithmic axis) leave a gap.
#[derive(Clone, Debug)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// `(x, y)`, x ascending.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub style: Style,
    /// Value to write at the line's end instead of its last one.
    pub end_value: Option<f64>,
    /// Written before the value at the line's end: tells lines apart without colour.
    pub tag: String,
}

impl Series {
    /// A series whose end shows its last value.
    pub fn new(name: &str, style: Style, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_owned(),
            points,
            style,
            end_value: None,
            tag: String::new(),
        }
    }
}

/// A plot of several series over the steps of a training.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Unique on the page; names the SVG's title and description.
    pub id: String,
    /// Title, for readers who cannot see the plot too.
    pub title: String,
    /// What the plot shows, in a sentence with its numbers.
    pub description: String,
    /// Whether y is logarithmic.
    pub log_y: bool,
    /// Whether a linear y axis begins at 0.
    pub from_zero: bool,
    /// Unit of y.
    pub unit: Unit,
    /// Width and height in SVG units (pixels, when the page is wide enough).
    pub size: (f64, f64),
    /// Name of the x axis.
    pub x_name: String,
    /// Whether the names of the series stand along the top.
    pub legend: bool,
    /// Number of colours, at most 12: series `i` has the colour `i % num_colors`.
    pub num_colors: usize,
    /// Series whose values stand at the ends of their lines: the first so many.
    pub num_end_labels: usize,
    /// The lines; three fit into the legend.
    pub series: Vec<Series>,
    /// A point of a series (its index) to point out, with its label.
    pub marker: Option<(usize, (f64, f64), String)>,
    /// Values of x to tick at the bottom, with their name in the legend.
    pub rug: Option<(String, Vec<f64>)>,
}

impl Plot {
    /// An empty plot with a linear y axis.
    pub fn new(id: &str, title: &str, size: (f64, f64)) -> Self {
        Self {
            id: id.to_owned(),
            title: title.to_owned(),
            description: String::new(),
            log_y: false,
            from_zero: false,
            unit: Unit::Plain,
            size,
            x_name: "step".to_owned(),
            legend: true,
            num_colors: 3,
            num_end_labels: usize::MAX,
            series: Vec::new(),
            marker: None,
            rug: None,
        }
    }

    /// The plot as an `<svg>` element; without a point to draw, a sentence that says so.
    pub fn to_svg(&self) -> String {
        let drawn: Vec<Drawn> = self.series.iter().map(|series| self.draw(series)).collect();
        let Some(frame) = Frame::new(self, &drawn) else {
            return format!(
                "<p class=\"none\">{}: nothing recorded.</p>",
                escape(&self.title)
            );
        };
        let (id, (width, height)) = (escape(&self.id), self.size);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\
             <title id=\"{id}-t\">{}</title><desc id=\"{id}-d\">{}</desc>\
             <clipPath id=\"{id}-c\"><rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>\
             </clipPath>",
            escape(&self.title),
            escape(&self.description),
            LEFT - 5.0,
            TOP - 4.0,
            frame.right() - LEFT + 10.0,
            frame.bottom() - TOP + 8.0,
        );
        svg.push_str(&self.axes_svg(&frame));
        _ = write!(svg, "<g clip-path=\"url(#{id}-c)\">");
        for (index, drawn) in drawn.iter().enumerate() {
            svg.push_str(&drawn.svg(self.color(index), &frame));
        }
        let (rug, marker) = (self.rug_svg(&frame), self.marker_svg(&frame));
        let end_labels = self.end_labels_svg(&drawn, &frame);
        svg + "</g>" + &rug + &marker + &end_labels + &self.legend_svg() + "</svg>"
    }

    fn color(&self, index: usize) -> usize {
        index % self.num_colors
    }

    /// Splits a series into what is drawn strongly and what is drawn faintly.
    fn draw(&self, series: &Series) -> Drawn {
        let valid = |y: f64| y.abs() <= LARGEST && (!self.log_y || y >= 1.0 / LARGEST);
        let clean = |&(x, y): &(f64, f64)| (x, if valid(y) { y } else { f64::NAN });
        let points: Vec<_> = series.points.iter().map(clean).collect();
        let noisy = matches!(series.style, Style::Noisy | Style::Smooth);
        let (line, raw) = if noisy && points.len() >= MIN_POINTS_TO_SMOOTH {
            // A fitted line can dip below zero.
            let line = smooth(&points).iter().map(clean).collect();
            let shown = series.style == Style::Noisy;
            (line, if shown { points } else { vec![] })
        } else {
            (points, vec![])
        };
        let last = line.iter().rev().map(|p| p.1).find(|y| y.is_finite());
        let end_value = series.end_value.filter(|&y| valid(y)).or(last);
        Drawn {
            line,
            raw,
            style: series.style,
            end_value,
        }
    }

    fn axes_svg(&self, frame: &Frame) -> String {
        let mut svg = String::new();
        let (right, bottom) = (frame.right(), frame.bottom());
        for tick in &frame.y_ticks.values {
            let y = frame.y(*tick);
            let text = frame.y_ticks.text(*tick, self.unit);
            _ = write!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                LEFT - 8.0,
                y + 4.0
            );
        }
        for tick in &frame.x_ticks.values {
            let x = frame.x(*tick);
            let text = frame.x_ticks.text(*tick, Unit::Plain);
            _ = write!(
                svg,
                "<path class=\"axis\" d=\"M{x:.1} {bottom:.1}v5\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                bottom + 18.0
            );
        }
        _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{LEFT} {bottom:.1}H{right:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + right) / 2.0,
            bottom + 36.0,
            escape(&self.x_name),
        );
        svg
    }

    /// Names of the series along the top, each with a piece of its line. A lone series that
    /// is named like the plot needs none.
    fn legend_svg(&self) -> String {
        if !self.legend || matches!(self.series.as_slice(), [only] if only.name == self.title) {
            return String::new();
        }
        let mut svg = String::new();
        let mut x = LEFT;
        for (index, series) in self.series.iter().enumerate() {
            let dashed = if series.style == Style::Dots {
                " dashed"
            } else {
                ""
            };
            _ = write!(
                svg,
                "<g class=\"s{}\"><path class=\"curve{dashed}\" d=\"M{x:.1} 12h22\"/>",
                self.color(index)
            );
            if series.style == Style::Dots {
                _ = write!(
                    svg,
                    "<circle class=\"dot\" cx=\"{:.1}\" cy=\"12\" r=\"4\"/>",
                    x + 11.0
                );
            }
            _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"16\">{}</text></g>",
                x + 28.0,
                escape(&series.name)
            );
            x += 28.0 + text_width(&series.name) + 20.0;
        }
        if let Some((name, _)) = &self.rug {
            _ = write!(
                svg,
                "<path class=\"rug\" d=\"M{:.1} 7v10\"/><text x=\"{:.1}\" y=\"16\">{}</text>",
                x + 4.0,
                x + 12.0,
                escape(name)
            );
        }
        svg
    }

    /// Values at the right ends of the lines, moved apart where they would overlap.
    fn end_labels_svg(&self, drawn: &[Drawn], frame: &Frame) -> String {
        let mut labels: Vec<(f64, usize, String)> = Vec::new();
        for (index, drawn) in drawn.iter().enumerate().take(self.num_end_labels) {
            if let Some(value) = drawn.end_value {
                let (tag, value_text) = (&self.series[index].tag, unit_text(value, self.unit));
                let text = format!("{} {value_text}", escape(tag));
                labels.push((frame.y(value), index, text.trim_start().to_owned()));
            }
        }
        labels.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut previous = f64::NEG_INFINITY;
        for label in &mut labels {
            label.0 = label.0.max(previous + LINE_HEIGHT);
            previous = label.0;
        }
        let excess = (previous - frame.bottom()).max(0.0);
        let mut svg = String::new();
        for (y, index, text) in labels {
            _ = write!(
                svg,
                "<g class=\"s{}\"><text class=\"end\" x=\"{:.1}\" y=\"{:.1}\">{text}</text></g>",
                self.color(index),
                frame.right() + 7.0,
                y - excess + 4.0
            );
        }
        svg
    }

    fn marker_svg(&self, frame: &Frame) -> String {
        let Some((index, point, label)) = &self.marker else {
            return String::new();
        };
        let (x, y) = (frame.x(point.0), frame.y(point.1));
        if !(x.is_finite() && y.is_finite()) {
            return String::new();
        }
        let half = text_width(label) / 2.0;
        // In the middle over the point, or as near to it as the frame allows.
        let text_x = x.clamp(LEFT + half, (frame.right() - half).max(LEFT + half));
        let index = self.color(*index);
        format!(
            "<g class=\"s{index}\"><path class=\"best\" d=\"M{x:.1} {:.1}V{:.1}\"/>\
             <circle class=\"ring\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\"/>\
             <text class=\"label\" x=\"{text_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></g>",
            TOP + 16.0,
            frame.bottom(),
            TOP + 11.0,
            escape(label)
        )
    }

    fn rug_svg(&self, frame: &Frame) -> String {
        let Some((_, values)) = &self.rug else {
            return String::new();
        };
        let mut path = String::new();
        for x in values.iter().map(|&x| frame.x(x)) {
            _ = write!(path, "M{x:.1} {:.1}v10", frame.bottom() - 10.0);
        }
        format!("<path class=\"rug\" d=\"{path}\"/>")
    }
}

/// A series ready to draw: NaN marks what cannot be drawn.
struct Drawn {
    line: Vec<(f64, f64)>,
    raw: Vec<(f64, f64)>,
    style: Style,
    end_value: Option<f64>,
}

impl Drawn {
    fn svg(&self, index: usize, frame: &Frame) -> String {
        let mut svg = format!("<g class=\"s{index}\">");
        if !self.raw.is_empty() {
            let path = path(&envelope(&self.raw, frame.columns()), frame);
            _ = write!(svg, "<path class=\"curve raw\" d=\"{path}\"/>");
        }
        let dashed = match self.style {
            Style::Dots => " dashed",
            Style::Smooth => " thin",
            Style::Line | Style::Noisy => "",
        };
        let line = path(&envelope(&self.line, frame.columns()), frame);
        _ = write!(svg, "<path class=\"curve{dashed}\" d=\"{line}\"/>");
        if self.style == Style::Dots {
            for &(x, y) in self.line.iter().filter(|point| point.1.is_finite()) {
                let (x, y) = (frame.x(x), frame.y(y));
                _ = write!(
                    svg,
                    "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>"
                );
            }
        }
        svg + "</g>"
    }

    /// Values that decide the y range: all of the strong line, and of the faint points all
    /// but the outermost 2 %, so that one spike does not flatten the rest.
    fn range_values(&self) -> Vec<f64> {
        let mut raw: Vec<f64> = self
            .raw
            .iter()
            .map(|p| p.1)
            .filter(|y| y.is_finite())
            .collect();
        raw.sort_by(f64::total_cmp);
        let margin = raw.len() / 50;
        let line = self.line.iter().map(|p| p.1).filter(|y| y.is_finite());
        line.chain(raw[margin..raw.len() - margin].iter().copied())
            .collect()
    }
}

/// Where values lie in the picture.
struct Frame {
    size: (f64, f64),
    x_range: (f64, f64),
    y_range: (f64, f64),
    log_y: bool,
    x_ticks: Ticks,
    y_ticks: Ticks,
}

impl Frame {
    /// None when there is nothing to draw.
    fn new(plot: &Plot, drawn: &[Drawn]) -> Option<Self> {
        let points = drawn.iter().flat_map(|d| d.line.iter().chain(&d.raw));
        let xs = points.filter(|p| p.1.is_finite()).map(|p| p.0);
        let (mut x_low, mut x_high) = range(xs)?;
        if 0.0 < x_low && x_low < 0.05 * x_high {
            x_low = 0.0;
        }
        if x_low == x_high {
            (x_low, x_high) = (x_low - 1.0, x_high + 1.0);
        }
        let mut ys: Vec<f64> = drawn.iter().flat_map(Drawn::range_values).collect();
        ys.extend(drawn.iter().filter_map(|d| d.end_value));
        ys.extend(plot.from_zero.then_some(0.0).filter(|_| !plot.log_y));
        let (low, high) = range(ys.into_iter())?;
        let count = ((plot.size.1 - TOP - BOTTOM) / 42.0).max(2.0);
        let (y_ticks, y_range) = if plot.log_y {
            log_axis(low, high, count)
        } else {
            linear_axis(low, high, count)
        };
        let x_ticks = Ticks::linear(x_low, x_high, (plot.size.0 - LEFT - RIGHT) / 90.0);
        let x_range = (x_low, x_high);
        Some(Self {
            size: plot.size,
            x_range,
            y_range,
            log_y: plot.log_y,
            x_ticks,
            y_ticks,
        })
    }

    fn right(&self) -> f64 {
        self.size.0 - RIGHT
    }

    fn bottom(&self) -> f64 {
        self.size.1 - BOTTOM
    }

    /// Pixel columns.
    fn columns(&self) -> usize {
        (self.right() - LEFT) as usize
    }

    fn x(&self, x: f64) -> f64 {
        let (low, high) = self.x_range;
        LEFT + (x - low) / (high - low) * (self.right() - LEFT)
    }

    fn y(&self, y: f64) -> f64 {
        let (low, high) = self.y_range;
        let place = if self.log_y {
            (y / low).ln() / (high / low).ln()
        } else {
            (y - low) / (high - low)
        };
        self.bottom() - place * (self.bottom() - TOP)
    }
}

fn unit_text(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Plain => compact(value),
        Unit::Share => percent(value),
    }
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((f64::min(low, v), f64::max(high, v))),
    })
}

/// At each point the least-squares line through its neighbours, read at that point: a
/// moving mean that follows slopes and stays calm near the ends. Gaps are bridged.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = ((points.len() as f64 * SMOOTHING / 2.0) as usize).max(2);
    let fit = |index: usize| {
        let x0 = points[index].0;
        let window = &points[index.saturating_sub(half)..(index + half + 1).min(points.len())];
        let (mut n, mut sx, mut sy, mut sxx, mut sxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for &(x, y) in window.iter().filter(|point| point.1.is_finite()) {
            let x = x - x0;
            (n, sx, sy, sxx, sxy) = (n + 1.0, sx + x, sy + y, sxx + x * x, sxy + x * y);
        }
        let determinant = n * sxx - sx * sx;
        // With one place of x there is no slope; with none, 0 / 0 leaves the gap.
        if determinant > 0.0 {
            (sy * sxx - sx * sxy) / determinant
        } else {
            sy / n
        }
    };
    let last = points.len().saturating_sub(1);
    let places = (0..last).step_by(points.len().div_ceil(MAX_SMOOTH_POINTS).max(1));
    let places = places.chain((!points.is_empty()).then_some(last));
    places.map(|index| (points[index].0, fit(index))).collect()
}

/// At most two points (lowest and highest) for each of `columns` runs of equal length: the
/// picture stays the same and the file small. Gaps within a run vanish.
fn envelope(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    if points.len() <= 2 * columns.max(1) {
        return points.to_vec();
    }
    let mut kept = Vec::new();
    for run in points.chunks(points.len().div_ceil(columns.max(1))) {
        let finite = || run.iter().enumerate().filter(|(_, p)| p.1.is_finite());
        let low = finite().min_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let high = finite().max_by(|a, b| a.1.1.total_cmp(&b.1.1));
        match (low, high) {
            (Some(a), Some(b)) if a.0 == b.0 => kept.push(*a.1),
            (Some(a), Some(b)) if a.0 < b.0 => kept.extend([*a.1, *b.1]),
            (Some(a), Some(b)) => kept.extend([*b.1, *a.1]),
            _ => kept.push((run[0].0, f64::NAN)),
        }
    }
    kept
}

/// SVG path data; NaN lifts the pen, and a lone point becomes a dot.
fn path(points: &[(f64, f64)], frame: &Frame) -> String {
    let mut path = String::new();
    for run in points
        .split(|point| !point.1.is_finite())
        .filter(|run| !run.is_empty())
    {
        for (index, &(x, y)) in run.iter().enumerate() {
            let command = if index == 0 { 'M' } else { 'L' };
            _ = write!(path, "{command}{:.1} {:.1}", frame.x(x), frame.y(y));
        }
        if run.len() == 1 {
            path.push_str("h0");
        }
    }
    path
}

/// Estimated width of a text at 12 pixels, on the generous side.
fn text_width(text: &str) -> f64 {
    6.6 * text.chars().count() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_keeps_a_slope_and_bridges_gaps() {
        let mut points: Vec<(f64, f64)> = (0..100).map(|n| (n as f64, 2.0 * n as f64)).collect();
        for (point, smooth) in points.iter().zip(smooth(&points)) {
            assert!((point.1 - smooth.1).abs() < 1e-9);
        }
        points[50].1 = f64::NAN;
        assert!((smooth(&points)[50].1 - 100.0).abs() < 1e-9);
    }

    #[test]
    fn the_envelope_keeps_extremes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|n| (n as f64, (n % 7) as f64)).collect();
        points[4321].1 = 99.0;
        points[17].1 = -99.0;
        let kept = envelope(&points, 100);
        assert!(kept.len() <= 200);
        assert!(kept.contains(&(4321.0, 99.0)) && kept.contains(&(17.0, -99.0)));
        assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn gaps_spikes_and_single_points_are_drawn() {
        let mut plot = Plot::new("p", "A <title>", (400.0, 200.0));
        let points = vec![
            (1.0, 1.0),
            (2.0, f64::NAN),
            (3.0, 2.0),
            (4.0, f64::INFINITY),
        ];
        plot.series.push(Series::new("a & b", Style::Line, points));
        plot.marker = Some((0, (3.0, 2.0), "<best>".to_owned()));
        plot.rug = Some(("skipped".to_owned(), vec![2.0, 4.0]));
        let svg = plot.to_svg();
        assert!(svg.contains("A &lt;title&gt;") && svg.contains("a &amp; b"));
        assert!(svg.contains("&lt;best&gt;") && !svg.contains("<best>"));
        assert_eq!(svg.matches("h0").count(), 2, "two lone points: {svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn huge_and_tiny_values_have_axes() {
        for (low, high) in [
            (1.0 / LARGEST, LARGEST),
            (1e-300, 1e-300),
            (LARGEST, LARGEST),
        ] {
            assert!(
                log_axis(low, high, 5.0).0.values.len() <= 12,
                "{low} {high}"
            );
            assert!(
                linear_axis(low, high, 5.0).0.values.len() <= 12,
                "{low} {high}"
            );
        }
        let mut plot = Plot::new("p", "Norm", (400.0, 200.0));
        plot.log_y = true;
        let drop = (0..200).map(|n| (n as f64, if n < 3 { 1e9 } else { 1e-3 }));
        plot.series
            .push(Series::new("norm", Style::Noisy, drop.collect()));
        assert!(!plot.to_svg().contains("NaN"));
    }

    #[test]
    fn a_long_noisy_series_stays_small() {
        let points = (0..300_000).map(|n| (n as f64, (n % 11) as f64)).collect();
        let mut plot = Plot::new("p", "Loss", (960.0, 360.0));
        plot.series.push(Series::new("loss", Style::Noisy, points));
        assert!(plot.to_svg().len() < 60_000);
    }

    #[test]
    fn a_log_plot_leaves_out_what_is_not_positive() {
        let mut plot = Plot::new("p", "Flips", (400.0, 200.0));
        plot.log_y = true;
        plot.series.push(Series::new(
            "flips",
            Style::Line,
            vec![(0.0, 0.0), (1.0, -1.0)],
        ));
        assert_eq!(
            plot.to_svg(),
            "<p class=\"none\">Flips: nothing recorded.</p>"
        );
        plot.series[0].points.extend([(2.0, 1e-3), (3.0, 1e-5)]);
        let svg = plot.to_svg();
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"), "{svg}");
    }
}
