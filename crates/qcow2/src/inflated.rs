// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressed clusters that were inflated lately, so that small reads one behind the other inflate each cluster once.
//!
//! They are found by where the compressed bytes lie. That place is given to other data only when every request that knew the old one is over
//! (INV QCOW2-ORD-4), and whoever is given it [forgets](Inflated::forget) what was known of it; so what is found here is never old.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// So many bytes are kept, but always one cluster.
const BYTES_MAX: usize = 4 << 20;

/// The clusters, the one used last at the end.
#[derive(Debug, Default)]
pub(crate) struct Inflated {
    clusters: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

impl Inflated {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, Arc<Vec<u8>>)>> {
        self.clusters
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// The cluster whose compressed bytes lie at `host`.
    pub fn get(&self, host: u64) -> Option<Arc<Vec<u8>>> {
        let mut clusters = self.lock();
        let at = clusters.iter().position(|c| c.0 == host)?;
        let found = clusters.remove(at)?;
        let cluster = found.1.clone();
        clusters.push_back(found);
        Some(cluster)
    }

    /// Keeps a cluster for a while. The caller is inside the epoch in which it looked up `host`.
    pub fn keep(&self, host: u64, cluster: Arc<Vec<u8>>) {
        let mut clusters = self.lock();
        clusters.retain(|c| c.0 != host);
        let room = (BYTES_MAX / cluster.len().max(1)).max(1);
        while clusters.len() >= room {
            clusters.pop_front();
        }
        clusters.push_back((host, cluster));
    }

    /// Other bytes are about to be written to `host`.
    pub fn forget(&self, host: u64) {
        self.lock().retain(|c| c.0 != host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_lately_stays_and_what_is_forgotten_goes() {
        let inflated = Inflated::default();
        let cluster = Arc::new(vec![1; BYTES_MAX / 3]);
        for host in 0..3 {
            inflated.keep(host, cluster.clone());
        }
        assert!(inflated.get(0).is_some());
        inflated.keep(3, cluster.clone());
        assert!(inflated.get(1).is_none(), "the one not used for longest");
        assert!(inflated.get(0).is_some());
        inflated.forget(0);
        assert!(inflated.get(0).is_none());
    }
}
