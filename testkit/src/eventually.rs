//! Bounded waiting for a condition that another process or thread brings about.

use std::time::{Duration, Instant};

/// How long between two looks at a condition that nothing announces.
const POLL_MS: u64 = 5;

/// The moment at which a test gives up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// A deadline `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit)
    }

    /// Whether it has passed.
    pub fn passed(&self) -> bool {
        Instant::now() >= self.0
    }
}

/// Calls `probe` until it returns `Some`, at most for `limit`; `None` when the limit passed.
pub fn eventually<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        if deadline.passed() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(POLL_MS));
    }
}

/// Asserts that an expression becomes true within a bound: `assert_eventually!(seconds, condition, "message {}", args)`.
#[macro_export]
macro_rules! assert_eventually {
    ($seconds:expr, $condition:expr $(,)?) => {
        $crate::assert_eventually!($seconds, $condition, "{}", stringify!($condition))
    };
    ($seconds:expr, $condition:expr, $($message:tt)+) => {{
        let limit = ::std::time::Duration::from_secs_f64(f64::from($seconds));
        assert!(
            $crate::eventually(limit, || $condition.then_some(())).is_some(),
            "not within {limit:?}: {}",
            format_args!($($message)+),
        );
    }};
}

/// The same for an async condition: `assert_eventually_async!(seconds, async-expression-of-bool, "message")`.
/// Needs tokio in the test's crate.
#[macro_export]
macro_rules! assert_eventually_async {
    ($seconds:expr, $condition:expr, $($message:tt)+) => {{
        let limit = ::std::time::Duration::from_secs_f64(f64::from($seconds));
        let deadline = $crate::Deadline::after(limit);
        loop {
            if $condition {
                break;
            }
            assert!(!deadline.passed(), "not within {limit:?}: {}", format_args!($($message)+));
            ::tokio::time::sleep(::std::time::Duration::from_millis(5)).await;
        }
    }};
}
