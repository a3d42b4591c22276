//! The report as a picture: a bar to the median, a whisker from p10 to p90.

use std::fmt::Write;

use crate::report::Report;

const WIDTH_PX: f64 = 760.0;
const LABEL_PX: f64 = 190.0;
const BAR_PX: f64 = 420.0;
const LINE_PX: f64 = 22.0;

/// An SVG document.
pub(crate) fn draw(report: &Report) -> String {
    let mut body = String::new();
    let mut y = LINE_PX;
    for figure in &report.figures {
        text(&mut body, 8.0, y, "bold", &format!("{} ({})", figure.name, figure.unit));
        y += LINE_PX;
        let medians = figure.rows.iter().filter_map(|row| row.summary.as_ref()).map(|of| of.p90.max(of.median));
        let scale = BAR_PX / medians.fold(f64::MIN_POSITIVE, f64::max);
        for (index, row) in figure.rows.iter().enumerate() {
            text(&mut body, 16.0, y, "normal", &row.who);
            match &row.summary {
                Some(of) => {
                    let fill = if index == 0 { "#0b7285" } else { "#adb5bd" };
                    let (width, top, middle) = (of.median * scale, y - 12.0, y - 5.0);
                    let (low, high) = (LABEL_PX + of.p10 * scale, LABEL_PX + of.p90 * scale);
                    body += &format!(
                        "<rect x=\"{LABEL_PX}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"14\" fill=\"{fill}\"/>\n\
                         <line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"#212529\"/>\n"
                    );
                    text(&mut body, LABEL_PX + BAR_PX + 12.0, y, "normal", &format!("{:.2}", of.median));
                }
                None => text(&mut body, LABEL_PX, y, "normal", "failed"),
            }
            y += LINE_PX;
        }
        y += LINE_PX / 2.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH_PX}\" height=\"{y:.0}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn text(body: &mut String, x: f64, y: f64, weight: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" font-weight=\"{weight}\">{words}</text>")
        .expect("a string takes any text");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Figure;

    #[test]
    fn bars_are_to_scale_and_words_are_escaped() {
        let measured = [("a<b".to_owned(), Ok(vec![5.0])), ("peer".to_owned(), Ok(vec![10.0]))];
        let figures = vec![Figure::compare("run", "ms", &measured)];
        let picture = draw(&Report { kernel: String::new(), cpus: 1, figures });
        assert!(picture.contains("width=\"210.0\"") && picture.contains("width=\"420.0\""), "{picture}");
        assert!(picture.contains("a&lt;b"), "{picture}");
    }
}
