//! What windows of a program and of the empty one say about its cost.

use std::fmt;

/// Nanoseconds a packet above the empty program.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// The fastest window less the fastest empty one: what the program costs when nothing disturbs it.
    pub minimum: f64,
    /// The median over the rounds of window less empty window: what it costs on this machine now.
    pub median: f64,
}

impl Cost {
    /// From windows of the program and of the empty one, round by round.
    pub(super) fn new(windows: &[f64], empty: &[f64]) -> Self {
        let fastest = |windows: &[f64]| windows.iter().copied().fold(f64::MAX, f64::min);
        let mut above: Vec<f64> = windows.iter().zip(empty).map(|(window, empty)| window - empty).collect();
        above.sort_unstable_by(f64::total_cmp);
        Self { minimum: fastest(windows) - fastest(empty), median: above[above.len() / 2] }
    }
}

/// Costs by the names of their programs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// In the order of the request.
    pub rows: Vec<(String, Cost)>,
}

impl Table {
    /// Adds the rows of another table, their names behind a prefix and a slash.
    pub fn extend(&mut self, prefix: &str, other: Self) {
        self.rows.extend(other.rows.into_iter().map(|(name, cost)| (format!("{prefix}/{name}"), cost)));
    }

    /// The cost in the row of this name.
    pub fn get(&self, name: &str) -> Option<Cost> {
        let row = self.rows.iter().find(|(row, _)| row == name);
        row.map(|(_, cost)| *cost)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        write!(f, "{:width$}  {:>8}  {:>8}", "ns above empty", "minimum", "median", width = width.max(14))?;
        for (name, Cost { minimum, median }) in &self.rows {
            write!(f, "\n{name:width$}  {minimum:8.1}  {median:8.1}", width = width.max(14))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_ignores_disturbed_windows_and_the_median_a_drift() {
        let cost = Cost::new(&[15.0, 25.0, 90.0, 36.0], &[10.0, 20.0, 21.0, 30.0]);
        assert_eq!(cost, Cost { minimum: 5.0, median: 6.0 });
        let table = Table { rows: vec![("one".into(), cost)] };
        assert_eq!(table.get("one"), Some(cost));
        assert_eq!(table.get("two"), None);
        assert_eq!(table.to_string().lines().last(), Some("one                  5.0       6.0"));
    }
}
