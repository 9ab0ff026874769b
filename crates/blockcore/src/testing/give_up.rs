// SPDX-License-Identifier: MIT OR Apache-2.0
//! Futures that are given up half way.

use std::pin::pin;

use futures::FutureExt;

/// Polls a future `rounds` times, letting every other task of a current-thread runtime run in between, and then drops it. `Some`: it has ended before.
///
/// With a runtime and drivers that do the same every time, the numbers 0, 1, 2 ... up to the first `Some` are all the places at which the future, or a
/// task that works for it, can be found when it is dropped.
///
/// ```
/// use blockcore::testing::given_up_after;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let twice = async || { tokio::task::yield_now().await; tokio::task::yield_now().await; 7 };
/// assert_eq!(given_up_after(2, twice()).await, None);
/// assert_eq!(given_up_after(3, twice()).await, Some(7));
/// # }
/// ```
pub async fn given_up_after<T>(rounds: u32, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..rounds {
        if let Some(done) = future.as_mut().now_or_never() {
            return Some(done);
        }
        tokio::task::yield_now().await;
    }
    None
}
