//! How every benchmark measures its rows: criterion's figures first, then what each costs above the empty program.

use std::{cell::RefCell, os::fd::BorrowedFd, time::Duration};

use criterion::Criterion;
use xdpkit_lab::bench::{Harness, Table};

/// Criterion as the command line asks for it, with as many samples as a figure of nanoseconds needs.
pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .without_plots()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args()
}

/// Measures programs on the harness's packets. Criterion's figures include the wrapper; those of the table, which holds
/// the rows that criterion's filter leaves, do not: they come from `rounds` interleaved windows.
///
/// # Panics
/// When a program cannot be run.
pub(crate) fn measure<'p>(
    criterion: &mut Criterion,
    group: &str,
    harness: &Harness,
    rows: &[(&'p str, BorrowedFd<'p>)],
    rounds: u32,
) -> Table {
    let mut group = criterion.benchmark_group(group);
    let ran = RefCell::new(Vec::new());
    for (name, program) in rows {
        group.bench_function(*name, |bencher| {
            bencher.iter_custom(|packets| harness.time(*program, packets).expect("criterion measures"));
            if ran.borrow().last() != Some(name) {
                ran.borrow_mut().push(*name);
            }
        });
    }
    group.finish();
    let ran: Vec<_> = rows.iter().filter(|(name, _)| ran.borrow().contains(name)).copied().collect();
    if ran.is_empty() {
        return Table::default();
    }
    harness.table(&ran, rounds).expect("the same programs as above")
}
