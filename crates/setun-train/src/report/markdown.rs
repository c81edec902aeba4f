//! Tables as text that reads well raw and rendered.

use std::fmt::Write;

/// Rows as a Markdown table whose source is aligned too; the first row is its head.
pub(crate) fn markdown_table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max();
    let widths: Vec<usize> = (0..N).map(|i| width(i).unwrap_or(0).max(2)).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (i, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            _ = match i {
                0 => write!(text, "| {cell:<width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text.push_str("|\n");
        if index == 0 {
            for (i, &width) in widths.iter().enumerate() {
                let dashes = "-".repeat(width);
                _ = match i {
                    0 => write!(text, "|-{dashes}-"),
                    _ => write!(text, "|-{dashes}:"),
                };
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = [["a", "loss"], ["long name", "1"]].map(|row| row.map(str::to_owned));
        let expected = "| a         | loss |\n|-----------|-----:|\n| long name |    1 |\n";
        assert_eq!(markdown_table(&rows), expected);
    }
}
