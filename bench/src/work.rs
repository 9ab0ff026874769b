// SPDX-License-Identifier: MIT OR Apache-2.0
//! The work of one library, in a process of its own: open an image, do so many requests with so many in flight, flush, and say how long the requests took.

use std::cell::Cell;
use std::path::Path;
use std::time::Instant;

use futures::stream::{FuturesUnordered, StreamExt};

/// What every byte of the images is, and what is written.
pub const PATTERN: u8 = 0x5a;

/// What a process is asked to do.
#[derive(Clone, Debug)]
pub struct Job {
    pub peer: String,
    pub kind: Kind,
    pub image: String,
    pub depth: usize,
    pub count: u64,
    pub bytes: usize,
    pub step: u64,
    pub direct: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zero,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Zero => "zero",
        }
    }
}

impl Job {
    /// The arguments that ask for this.
    pub fn arguments(&self) -> Vec<String> {
        [
            "work",
            &self.peer,
            self.kind.name(),
            &self.image,
            &self.depth.to_string(),
            &self.count.to_string(),
            &self.bytes.to_string(),
            &self.step.to_string(),
            if self.direct { "direct" } else { "cached" },
        ]
        .map(str::to_owned)
        .to_vec()
    }

    pub fn parse(words: &[String]) -> Option<Job> {
        let [peer, kind, image, depth, count, bytes, step, cache] = words else {
            return None;
        };
        let kinds = [Kind::Read, Kind::Write, Kind::Zero];
        Some(Job {
            peer: peer.clone(),
            kind: kinds.into_iter().find(|k| k.name() == kind)?,
            image: image.clone(),
            depth: depth.parse().ok()?,
            count: count.parse().ok()?,
            bytes: bytes.parse().ok()?,
            step: step.parse().ok()?,
            direct: cache == "direct",
        })
    }

    /// Does it, and says how many seconds the requests took.
    pub fn run(&self) -> Result<f64, String> {
        match self.peer.as_str() {
            "ours" => ours(self),
            "imago" => imago(self),
            "qcow2-rs" => qcow2_rs(self),
            other => Err(format!("no such library: {other}")),
        }
    }

    /// The offsets of the requests: one step after the other, from the beginning again at the end of the disk.
    fn offsets(&self, size: u64) -> impl Fn() -> Option<u64> + use<> {
        let (count, step) = (self.count, self.step);
        let places = (size - self.bytes as u64) / step + 1;
        let next = Cell::new(0);
        move || {
            let n = next.get();
            next.set(n + 1);
            (n < count).then(|| n % places * step)
        }
    }

    fn check(&self, read: &[u8]) -> Result<(), String> {
        match (read.first(), read.last()) {
            (Some(&PATTERN), Some(&PATTERN)) => Ok(()),
            ends => Err(format!("{} read {ends:?}", self.peer)),
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Runs `lane` as often as requests are to be in flight, until all are over.
async fn lanes<F: Future<Output = Result<(), String>>>(
    depth: usize,
    lane: impl Fn() -> F,
) -> Result<f64, String> {
    let begun = Instant::now();
    let mut all: FuturesUnordered<F> = (0..depth).map(|_| lane()).collect();
    while let Some(result) = all.next().await {
        result?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

fn ours(job: &Job) -> Result<f64, String> {
    use blocklayer::{IoBuf, IoBufMut, OpenOptions, ReadFlags, WriteFlags};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(text)?.block_on(async {
        let disk = OpenOptions::new()
            .format("qcow2")
            .read_only(job.kind == Kind::Read)
            .direct(job.direct)
            .open(&blocklayer::registry(), &job.image)
            .await
            .map_err(text)?;
        let offsets = job.offsets(disk.length());
        let seconds = lanes(job.depth, async || {
            let mut buf = IoBufMut::zeroed(job.bytes);
            let data = IoBuf::from(vec![PATTERN; job.bytes]);
            while let Some(at) = offsets() {
                let none = WriteFlags::empty();
                match job.kind {
                    Kind::Read => {
                        buf = disk
                            .preadv(at, buf, ReadFlags::empty())
                            .await
                            .map_err(text)?;
                        let all = buf.segments_mut().next().ok_or("nothing read")?;
                        job.check(all)?;
                    }
                    Kind::Write => disk.pwritev(at, data.clone(), none).await.map_err(text)?,
                    Kind::Zero => {
                        let zero = disk.pwrite_zeroes(at, job.bytes as u64, none);
                        zero.await.map_err(text)?;
                    }
                }
            }
            Ok(())
        })
        .await?;
        disk.close().await.map_err(text)?;
        Ok(seconds)
    })
}

fn imago(job: &Job) -> Result<f64, String> {
    use imago::file::File;
    use imago::io_buffers::IoBuffer;
    use imago::qcow2::Qcow2;
    use imago::{
        FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(text)?.block_on(async {
        let image = Qcow2::<File>::builder_path(&job.image)
            .storage_open_options(StorageOpenOptions::new().direct(job.direct))
            .write(job.kind != Kind::Read)
            .open(PermissiveImplicitOpenGate::default())
            .await
            .map_err(text)?;
        let image = FormatAccess::new(image);
        let offsets = job.offsets(image.size());
        let seconds = lanes(job.depth, async || {
            let mut buf = IoBuffer::new(job.bytes, 4096).map_err(text)?;
            buf.as_mut().into_slice().fill(PATTERN);
            while let Some(at) = offsets() {
                match job.kind {
                    Kind::Read => {
                        image.read(&mut buf, at).await.map_err(text)?;
                        job.check(buf.as_ref().into_slice())?;
                    }
                    Kind::Write => image.write(&buf, at).await.map_err(text)?,
                    Kind::Zero => {
                        let zero = image.write_zeroes(at, job.bytes as u64);
                        zero.await.map_err(text)?;
                    }
                }
            }
            Ok(())
        })
        .await?;
        if job.kind != Kind::Read {
            image.flush().await.map_err(text)?;
            image.sync().await.map_err(text)?;
        }
        Ok(seconds)
    })
}

fn qcow2_rs(job: &Job) -> Result<f64, String> {
    use qcow2_rs::dev::Qcow2DevParams;
    use qcow2_rs::helpers::Qcow2IoBuf;
    use qcow2_rs::utils::qcow2_setup_dev_uring;
    if job.kind == Kind::Zero {
        return Err("no zero writes".to_owned());
    }
    tokio_uring::start(async {
        let params = Qcow2DevParams::new(9, None, None, job.kind == Kind::Read, job.direct);
        let dev = qcow2_setup_dev_uring(Path::new(&job.image), &params).await;
        let dev = dev.map_err(|e| format!("{e:?}"))?;
        let offsets = job.offsets(dev.info.virtual_size());
        let seconds = lanes(job.depth, async || {
            let mut buf = Qcow2IoBuf::<u8>::new(job.bytes);
            buf.fill(PATTERN);
            while let Some(at) = offsets() {
                match job.kind {
                    Kind::Read => {
                        dev.read_at(&mut buf, at)
                            .await
                            .map_err(|e| format!("{e:?}"))?;
                        job.check(&buf)?;
                    }
                    _ => dev.write_at(&buf, at).await.map_err(|e| format!("{e:?}"))?,
                }
            }
            Ok(())
        })
        .await?;
        if job.kind != Kind::Read {
            dev.flush_meta().await.map_err(|e| format!("{e:?}"))?;
            dev.fsync_range(0, usize::MAX)
                .await
                .map_err(|e| format!("{e:?}"))?;
        }
        Ok(seconds)
    })
}
