//! Figures that have limits: each row is measured once, printed beside its limit, and judged in the end.

use std::io::{self, Write};
use std::process::ExitCode;

/// Rows of what was measured and what is allowed, printed as they come.
#[derive(Debug, Default)]
pub struct Checks {
    /// What the name of a row has to begin with.
    filter: String,
    rows: usize,
    missed: Vec<String>,
}

impl Checks {
    /// Of the rows whose name begins with `filter`: all of them where it is empty.
    pub fn new(filter: &str) -> Self {
        Self { filter: filter.to_owned(), ..Self::default() }
    }

    /// Measures a group of rows, whose names all begin with its name, unless none of them is asked for.
    pub fn group(&mut self, name: &str, measure: impl FnOnce(&mut Self)) {
        if name.starts_with(&self.filter) || self.filter.starts_with(name) {
            measure(self);
        }
    }

    /// Judges one row: what was measured, in `unit`, is at most the limit. It prints the name, both figures, and what part
    /// of the limit was measured.
    pub fn at_most(&mut self, name: &str, unit: &str, measured: f64, limit: f64) {
        if !name.starts_with(&self.filter) {
            return;
        }
        // What is no number is no success.
        let holds = measured <= limit;
        if self.rows == 0 {
            println!("{:<56} {:>10} {:>10}    {:>6}", "", "measured", "limit", "ratio");
        }
        let verdict = if holds { "" } else { "  MISSED" };
        println!("{name:<56} {measured:>10.1} {limit:>10.1} {unit:<2} {:>6.2}{verdict}", measured / limit);
        let _ = io::stdout().flush();
        self.rows += 1;
        if !holds {
            self.missed.push(name.to_owned());
        }
    }

    /// Says how many rows hold. It fails when one does not, or when there was none.
    pub fn finish(self) -> ExitCode {
        let Self { filter, rows, missed } = self;
        if rows == 0 {
            eprintln!("no row begins with `{filter}`");
            return ExitCode::FAILURE;
        }
        println!("{} of {rows} limits hold", rows - missed.len());
        if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(filter: &str, rows: &[(&str, f64)]) -> (usize, ExitCode) {
        let mut checks = Checks::new(filter);
        let mut measured = 0;
        checks.group("nat/new", |checks| {
            for (name, figure) in rows {
                checks.at_most(name, "ns", *figure, 10.0);
                measured += 1;
            }
        });
        (measured, checks.finish())
    }

    #[test]
    fn one_row_over_its_limit_fails_all() {
        assert_eq!(outcome("", &[("nat/new/ipv4", 10.0), ("nat/new/ipv6", 1.0)]), (2, ExitCode::SUCCESS));
        for over in [10.1, f64::NAN, f64::INFINITY] {
            assert_eq!(outcome("", &[("nat/new/ipv4", 1.0), ("nat/new/ipv6", over)]), (2, ExitCode::FAILURE));
        }
    }

    #[test]
    fn a_filter_leaves_rows_out_and_groups_too() {
        let rows = [("nat/new/ipv4", 1.0), ("nat/new/ipv6", 99.0)];
        assert_eq!(outcome("nat/new/ipv4", &rows), (2, ExitCode::SUCCESS));
        assert_eq!(outcome("nat", &rows), (2, ExitCode::FAILURE));
        // The group is not measured, and nothing at all is no success.
        assert_eq!(outcome("firewall", &rows), (0, ExitCode::FAILURE));
    }
}
