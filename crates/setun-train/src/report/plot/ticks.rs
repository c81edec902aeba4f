//! Axes: round values, and how they are written.

use super::{Unit, compact, grouped};

/// Round values along an axis.
pub(super) struct Ticks {
    /// Where they lie, ascending.
    pub values: Vec<f64>,
    /// Distance of two ticks; none on a logarithmic axis, where each tick is written with
    /// its own digits.
    step: Option<f64>,
}

impl Ticks {
    /// About `count` multiples of 1, 2 or 5 times a power of ten within `low..=high`.
    pub fn linear(low: f64, high: f64, count: f64) -> Self {
        let step = round_step((high - low) / count);
        let first = (low / step - 1e-9).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        let values = (first..=last).map(|n| n as f64 * step).collect();
        Self {
            values,
            step: Some(step),
        }
    }

    /// What is written beside the tick at `value`.
    pub fn text(&self, value: f64, unit: Unit) -> String {
        let factor = if unit == Unit::Share { 100.0 } else { 1.0 };
        let text = match self.step {
            Some(step) => tick_text(value * factor, step * factor),
            None => compact(value * factor),
        };
        if unit == Unit::Share {
            format!("{text}\u{a0}%")
        } else {
            text
        }
    }
}

/// Ticks and a range that ends on ticks.
pub(super) fn linear_axis(low: f64, high: f64, count: f64) -> (Ticks, (f64, f64)) {
    let margin = if low == high {
        low.abs().max(1.0) * 0.05
    } else {
        0.0
    };
    let (low, high) = (low - margin, high + margin);
    let step = round_step((high - low) / count);
    let low = (low / step + 1e-9).floor() * step;
    let high = (high / step - 1e-9).ceil() * step;
    (Ticks::linear(low, high, (high - low) / step), (low, high))
}

/// Ticks at powers of ten, with 2 and 5 between them where there is room; at round steps
/// when the range is short.
pub(super) fn log_axis(low: f64, high: f64, count: f64) -> (Ticks, (f64, f64)) {
    let (low, high) = (low / 1.15, high * 1.15);
    let exponents = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
    let within = |&value: &f64| (low..=high).contains(&value);
    let decades: Vec<f64> = exponents.map(|n| 10f64.powi(n)).collect();
    let fine: Vec<f64> = decades
        .iter()
        .flat_map(|d| [*d, 2.0 * d, 5.0 * d])
        .filter(within)
        .collect();
    if fine.len() < 3 {
        return (Ticks::linear(low, high, 1.5 * count), (low, high));
    }
    let coarse: Vec<f64> = decades.into_iter().filter(within).collect();
    let values = if fine.len() as f64 <= count + 2.0 {
        fine
    } else {
        coarse
    };
    let stride = (values.len() as f64 / (count + 2.0)).ceil().max(1.0) as usize;
    let values = values.into_iter().step_by(stride).collect();
    (Ticks { values, step: None }, (low, high))
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    // Below this, neighbouring ticks would be the same f64 or divide by zero.
    let step = step.max(1e-300);
    let power = 10f64.powi(step.log10().floor() as i32);
    let factors = [1.0, 2.0, 5.0, 10.0];
    let factor = factors
        .into_iter()
        .find(|f| f * power >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

/// A tick with just the digits that `step` needs; all ticks of an axis look alike.
fn tick_text(value: f64, step: f64) -> String {
    let value = if value.abs() < step * 1e-6 {
        0.0
    } else {
        value
    };
    if step >= 1e6 {
        return format!("{:.0}M", value / 1e6);
    }
    if step >= 1e3 {
        return if value == 0.0 {
            "0".to_owned()
        } else {
            format!("{:.0}k", value / 1e3)
        };
    }
    if step >= 1.0 {
        let sign = if value < 0.0 { "-" } else { "" };
        return format!("{sign}{}", grouped(value.abs().round() as u64));
    }
    let decimals = (-step.log10() - 1e-9).ceil() as usize;
    if decimals <= 4 || value == 0.0 {
        return format!("{value:.*}", decimals.min(4));
    }
    // The exponent of the step for all ticks: 2e-5, 4e-5, ... 12e-5.
    format!("{:.0}e-{decimals}", value * 10f64.powi(decimals as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(low: f64, high: f64, count: f64) -> Vec<String> {
        let ticks = Ticks::linear(low, high, count);
        ticks
            .values
            .iter()
            .map(|v| ticks.text(*v, Unit::Plain))
            .collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(
            texts(0.0, 1000.0, 5.0),
            ["0", "200", "400", "600", "800", "1,000"]
        );
        assert_eq!(texts(1.0, 30_000.0, 4.0), ["10k", "20k", "30k"]);
        assert_eq!(texts(0.0, 3e6, 3.0), ["0M", "1M", "2M", "3M"]);
        assert_eq!(texts(2.93, 3.31, 4.0), ["3.0", "3.1", "3.2", "3.3"]);
        assert_eq!(
            texts(0.0, 0.001, 5.0),
            ["0.0000", "0.0002", "0.0004", "0.0006", "0.0008", "0.0010"]
        );
        assert_eq!(texts(0.0, 1e-5, 2.0), ["0.0000", "5e-6", "10e-6"]);
        assert_eq!(texts(-0.3, 0.3, 3.0), ["-0.2", "0.0", "0.2"]);
    }

    #[test]
    fn a_linear_axis_ends_on_ticks_around_its_values() {
        for (low, high) in [
            (2.93, 7.31),
            (0.0, 1e-9),
            (5.0, 5.0),
            (-3.0, 1e6),
            (0.0, 0.0),
        ] {
            let (ticks, range) = linear_axis(low, high, 5.0);
            assert!(
                range.0 <= low && high <= range.1 && range.0 < range.1,
                "{low} {high}"
            );
            assert!((2..=12).contains(&ticks.values.len()), "{:?}", ticks.values);
            assert!((ticks.values[0] - range.0).abs() <= 1e-9 * (range.1 - range.0));
        }
    }

    #[test]
    fn a_log_axis_has_powers_of_ten_or_finer_ticks() {
        assert_eq!(
            log_axis(0.001, 100.0, 5.0).0.values,
            [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
        );
        assert_eq!(log_axis(0.6, 11.0, 5.0).0.values, [1.0, 2.0, 5.0, 10.0]);
        assert_eq!(log_axis(3.1, 3.9, 3.0).0.values, [3.0, 3.5, 4.0]);
    }
}
