//! Bar charts as SVG, for documents.

use std::fmt::Write as _;

/// Panels of horizontal bars, one below the other.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// What the chart shows.
    pub title: String,
    /// Where and how it was measured, in small print.
    pub note: String,
    /// The panels.
    pub panels: Vec<Panel>,
}

/// Bars with a scale of their own.
#[derive(Clone, Debug, Default)]
pub struct Panel {
    /// What is measured, with its unit and which way is better.
    pub title: String,
    /// The bars.
    pub bars: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, Default)]
pub struct Bar {
    /// Whose.
    pub label: String,
    /// How long; not negative.
    pub value: f64,
    /// What stands behind it.
    pub text: String,
    /// Whether it is the one that the chart is about.
    pub ours: bool,
}

const WIDTH: f64 = 760.0;
const LABELS: f64 = 190.0;
const LONGEST: f64 = 400.0;
const BAR: f64 = 18.0;
const STEP: f64 = 24.0;

impl Chart {
    /// Draws it: an SVG document for light and dark pages.
    pub fn svg(&self) -> String {
        let mut body = String::new();
        let mut y = 34.0;
        text(&mut body, 16.0, y, "title", &self.title);
        y += 12.0;
        for panel in &self.panels {
            y += 28.0;
            text(&mut body, 16.0, y, "panel", &panel.title);
            y += 10.0;
            let most = panel.bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
            for bar in &panel.bars {
                let (length, class) = (bar.value / most * LONGEST, if bar.ours { "ours" } else { "bar" });
                let middle = y + BAR - 5.0;
                text(&mut body, 16.0, middle, "label", &bar.label);
                let _ = writeln!(
                    body,
                    r#"<rect class="{class}" x="{LABELS}" y="{y:.0}" width="{length:.1}" height="{BAR}" rx="2"/>"#
                );
                text(&mut body, LABELS + length + 8.0, middle, "label", &bar.text);
                y += STEP;
            }
        }
        y += 22.0;
        for line in self.note.lines() {
            text(&mut body, 16.0, y, "note", line);
            y += 16.0;
        }
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0}" width="{WIDTH}" height="{y:.0}" role="img">
<style>
text {{ font-family: system-ui, sans-serif; fill: #1f2328 }}
.title {{ font-size: 17px; font-weight: 600 }}
.panel {{ font-size: 13px; font-weight: 600 }}
.label {{ font-size: 13px }}
.note {{ font-size: 11px; fill: #59636e }}
.page {{ fill: #ffffff }}
.bar {{ fill: #9aa4af }}
.ours {{ fill: #1f7a3d }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #f0f6fc }} .note {{ fill: #9198a1 }} .page {{ fill: #0d1117 }} .bar {{ fill: #59636e }} .ours {{ fill: #3fb950 }}
}}
</style>
<rect class="page" width="100%" height="100%" rx="6"/>
{body}</svg>
"##
        )
    }
}

fn text(body: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(body, r#"<text class="{class}" x="{x:.0}" y="{y:.0}">{escaped}</text>"#);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(values: [f64; 2]) -> String {
        let bar = |(label, value): (&str, f64)| Bar {
            label: label.into(),
            value,
            text: format!("{value} µs"),
            ours: value < 2.0,
        };
        let panel = Panel { title: "a < b & c".into(), bars: [("x", values[0]), ("y", values[1])].map(bar).into() };
        Chart { title: "costs".into(), note: "first\nsecond".into(), panels: vec![panel] }.svg()
    }

    /// The widths of the bars.
    fn widths(svg: &str) -> Vec<f64> {
        let bars =
            svg.lines().filter(|line| line.contains("<rect class=\"bar\"") || line.contains("<rect class=\"ours\""));
        let width = |line: &str| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok();
        bars.map(|line| width(line).unwrap()).collect()
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let svg = chart([1.0, 4.0]);
        assert_eq!(widths(&svg), [LONGEST / 4.0, LONGEST]);
        assert!(svg.contains(">1 µs<") && svg.contains(">second<") && svg.contains("class=\"ours\" x="));
        assert_eq!(widths(&chart([0.0, 0.0])), [0.0, 0.0], "nothing is divided by nothing");
    }

    #[test]
    fn it_is_well_formed() {
        let svg = chart([1.0, 4.0]);
        assert!(svg.contains("a &lt; b &amp; c"));
        let opened = svg.matches("<text").count();
        assert_eq!((opened, svg.matches("</text>").count()), (8, 8));
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
