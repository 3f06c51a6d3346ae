//! Plots as SVG.
//!
//! Pure.

use std::{ops::Range, time::Duration};

use plotters::{
    coord::ranged1d::{AsRangedCoord, ValueFormatter},
    element::{PathElement, Rectangle},
    prelude::{Cartesian2d, ChartContext, SVGBackend, SeriesLabelPosition},
    prelude::{ChartBuilder, IntoDrawingArea as _, IntoLogRange as _, LineSeries, Ranged},
    style::{Color as _, RGBColor, ShapeStyle},
};

use super::FaultWindow;

/// Size in pixels, before the page scales it.
const SIZE: (u32, u32) = (960, 260);
/// Colours that people with colour vision deficiency can distinguish (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];
const FAULT: RGBColor = RGBColor(230, 159, 0);
/// Shortest time that a fault is drawn, so that it is visible.
const FAULT_MIN: Duration = Duration::from_millis(50);

/// A plot.
pub(super) struct Plot<'a> {
    /// Labels of the axes.
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// Names and points.
    pub(super) lines: Vec<(&'a str, Vec<(f64, f64)>)>,
    /// Faults to shade, if x is time in seconds.
    pub(super) marks: &'a [FaultWindow],
    /// Whether the y axis is logarithmic.
    pub(super) logarithmic: bool,
}

/// A plot cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot plot {y}: {why}")]
pub(crate) struct PlotError {
    y: String,
    why: String,
}

impl Plot<'_> {
    /// Draws the plot as an `svg` element.
    pub(super) fn svg(&self) -> Result<String, PlotError> {
        let mut svg = String::new();
        let drawn = self.draw(&mut svg).map_err(|error| error.to_string());
        match drawn {
            Ok(()) => Ok(svg),
            Err(why) => Err(PlotError { y: self.y.to_owned(), why }),
        }
    }

    fn draw<'a>(&'a self, svg: &'a mut String) -> Result<(), Box<dyn std::error::Error + 'a>> {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let fold = |values: &mut dyn Iterator<Item = f64>, start, of: fn(f64, f64) -> f64| {
            values.fold(start, of)
        };
        let x_min = fold(&mut points().map(|point| point.0), f64::INFINITY, f64::min);
        let x_max = fold(&mut points().map(|point| point.0), x_min, f64::max);
        let x = if x_max > x_min { x_min..x_max } else { 0.0..1.0 };
        let top = fold(&mut points().map(|point| point.1), 0.0, f64::max);
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut builder = ChartBuilder::on(&area);
        builder.margin(8).x_label_area_size(36).y_label_area_size(64);
        if self.logarithmic {
            let bottom = points().map(|point| point.1).filter(|y| *y > 0.0);
            let bottom = bottom.fold(f64::INFINITY, f64::min);
            let bottom = if bottom.is_finite() { bottom } else { 0.1 };
            let range = bottom * 0.8..top.max(bottom) * 4.0;
            self.fill(builder.build_cartesian_2d(x, range.clone().log_scale())?, range)?;
        } else {
            let range = 0.0..(top * 1.3).max(1.0);
            self.fill(builder.build_cartesian_2d(x, range.clone())?, range)?;
        }
        Ok(area.present()?)
    }

    fn fill<'a, X, Y>(
        &'a self,
        mut chart: ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
        height: Range<f64>,
    ) -> Result<(), Box<dyn std::error::Error + 'a>>
    where
        X: Ranged<ValueType = f64> + ValueFormatter<f64> + AsRangedCoord,
        Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
    {
        let marks = self.marks.iter().map(|mark| {
            let until = mark.until.max(mark.from + FAULT_MIN).as_secs_f64();
            let corners = [(mark.from.as_secs_f64(), height.start), (until, height.end)];
            Rectangle::new(corners, FAULT.mix(0.25).filled())
        });
        chart.draw_series(marks)?;
        chart
            .configure_mesh()
            .x_desc(self.x)
            .y_desc(self.y)
            .light_line_style(ShapeStyle::from(&RGBColor(240, 240, 240)))
            .bold_line_style(ShapeStyle::from(&RGBColor(220, 220, 220)))
            .y_label_formatter(&|value| short(*value))
            .x_label_formatter(&|value| short(*value))
            .draw()?;
        for ((name, points), colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            // Zero has no place on a logarithmic axis.
            let shown = points.iter().filter(|point| !self.logarithmic || point.1 > 0.0).copied();
            let stroke = colour.stroke_width(2);
            let path = move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 16, y)], stroke);
            chart.draw_series(LineSeries::new(shown, stroke))?.label(*name).legend(path);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(RGBColor(255, 255, 255).mix(0.8))
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
        Ok(())
    }
}

/// Formats a number for an axis.
fn short(value: f64) -> String {
    match value.abs() {
        large if large >= 1e6 => format!("{}M", value / 1e6),
        large if large >= 1e4 => format!("{}k", value / 1e3),
        whole if whole >= 10.0 => format!("{value:.0}"),
        _ => format!("{}", (value * 1000.0).round() / 1000.0),
    }
}
