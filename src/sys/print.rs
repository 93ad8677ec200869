//! What libbpf says: into our errors, never to the standard error of the program that links us.
//!
//! libbpf has one print function a process. Ours keeps what is said while [`capture`] runs, of that thread alone; lines of
//! other threads are somebody else's, and go to the function that was there before.

use std::{
    cell::RefCell,
    ptr,
    sync::{Mutex, PoisonError},
};

use libbpf_rs::{PrintCallback, PrintLevel, get_print, set_print};

thread_local! {
    /// What was said so far; `None` outside of a capture.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

static BEFORE: Mutex<Option<(PrintLevel, PrintCallback)>> = Mutex::new(None);

/// Runs a call of libbpf; answers what it said on the way, too, without libbpf's prefix.
pub(crate) fn capture<R>(call: impl FnOnce() -> R) -> (R, String) {
    install();
    let outer = SAID.replace(Some(String::new()));
    let result = call();
    let said = SAID.replace(outer).unwrap_or_default();
    let lines: Vec<&str> = said.lines().map(|line| line.strip_prefix("libbpf: ").unwrap_or(line).trim()).collect();
    (result, lines.join("\n"))
}

/// Anew each time: the program may have set a function of its own meanwhile.
fn install() {
    let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    let now = get_print();
    if !now.is_some_and(|(_, function)| ptr::fn_addr_eq(function, keep as PrintCallback)) {
        let level = now.map_or(PrintLevel::Info, |(level, _)| level.max(PrintLevel::Info));
        *before = set_print(Some((level, keep)));
    }
}

fn keep(level: PrintLevel, line: String) {
    let ours = SAID.with_borrow_mut(|said| {
        if let Some(said) = said
            && level <= PrintLevel::Info
        {
            said.push_str(&line);
        }
        said.is_some()
    });
    if ours {
        return;
    }
    let before = *BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((most, function)) = before
        && level <= most
    {
        function(level, line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static ELSEWHERE: Mutex<Vec<String>> = Mutex::new(Vec::new());

    #[test]
    fn lines_of_a_capture_are_kept_and_others_go_where_they_went() {
        fn elsewhere(_: PrintLevel, line: String) {
            ELSEWHERE.lock().unwrap().push(line);
        }
        set_print(Some((PrintLevel::Warn, elsewhere)));
        let (answer, _) = capture(|| 7);
        assert_eq!(answer, 7);
        let ((), said) = capture(|| {
            keep(PrintLevel::Warn, "libbpf: one\n".into());
            keep(PrintLevel::Debug, "libbpf: chatter\n".into());
            let ((), inner) = capture(|| keep(PrintLevel::Info, "libbpf: two\n".into()));
            assert_eq!(inner, "two");
            std::thread::spawn(|| keep(PrintLevel::Warn, "libbpf: of another thread\n".into())).join().unwrap();
        });
        assert_eq!(said, "one");
        keep(PrintLevel::Info, "libbpf: less than is asked for\n".into());
        let mut went = ELSEWHERE.lock().unwrap().clone();
        // Other tests of this process may say something, too.
        went.retain(|line| line.contains("another thread") || line.contains("less than"));
        assert_eq!(went, ["libbpf: of another thread\n"]);
    }
}
