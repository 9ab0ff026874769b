// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`ClusterMap`]: something about each host cluster of a file. Holes, which a file of a few bytes may have any number of, take up next to nothing.

/// How many clusters are kept together. Few, so that forged entries which point far apart don't make much.
pub const PAGE_CLUSTERS: u64 = 128;

/// A value for each host cluster, up to the end of the file.
#[derive(Debug)]
pub struct ClusterMap<T> {
    pages: Vec<Option<Box<[T]>>>,
    len: u64,
}

impl<T: Copy + Default> ClusterMap<T> {
    /// The default for each of `len` clusters.
    pub fn new(len: u64) -> ClusterMap<T> {
        let mut map = ClusterMap {
            pages: Vec::new(),
            len: 0,
        };
        map.grow(len);
        map
    }

    /// The number of clusters.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Makes it `len` clusters long, if it is shorter.
    pub fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
        let pages = self.len.div_ceil(PAGE_CLUSTERS) as usize;
        self.pages.resize_with(pages, || None);
    }

    /// Whether all clusters that are kept together with this one have the default value.
    pub fn is_untouched(&self, cluster: u64) -> bool {
        self.page(cluster).is_none()
    }

    fn page(&self, cluster: u64) -> Option<&[T]> {
        self.pages
            .get((cluster / PAGE_CLUSTERS) as usize)?
            .as_deref()
    }

    /// The value of a cluster; the default past the end.
    pub fn get(&self, cluster: u64) -> T {
        self.page(cluster)
            .map_or_else(T::default, |page| page[(cluster % PAGE_CLUSTERS) as usize])
    }

    /// The value of a cluster, to be changed; `None` past the end.
    pub fn get_mut(&mut self, cluster: u64) -> Option<&mut T> {
        if cluster >= self.len {
            return None;
        }
        let page = self.pages[(cluster / PAGE_CLUSTERS) as usize]
            .get_or_insert_with(|| vec![T::default(); PAGE_CLUSTERS as usize].into());
        Some(&mut page[(cluster % PAGE_CLUSTERS) as usize])
    }
}
