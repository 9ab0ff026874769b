// SPDX-License-Identifier: MIT OR Apache-2.0
//! Benchmarks: ours beside the installed QEMU tools and the crates imago and qcow2-rs. Run by `cargo xtask bench`; docs/TESTING.md says what is measured.
//!
//! Every measurement is a process of its own. A round does every cell once, the contestants of a cell one after the other, so that what the machine does
//! besides hits all of them. Each begins with nothing left to be written back, and in each round another one comes first.

mod report;
mod work;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use report::{Cell, Contestant};
use work::{Job, Kind, PATTERN};

/// What is measured of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    /// What it says itself that its requests took: without opening and closing.
    Said,
    /// From start to end, with the last flush.
    Whole,
    /// The most memory that it had, in KiB.
    Peak,
}

/// What a contestant runs. Before every run the shell script `before` makes the images anew; it isn't measured.
#[derive(Clone, Debug)]
struct Task {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    before: Option<String>,
    stdin: Option<PathBuf>,
    repeat: u32,
}

/// A cell that is to be measured.
struct Plan {
    name: &'static str,
    measure: Measure,
    tasks: Vec<Task>,
    /// A shell script that has to succeed after every first run: that the work was done.
    verify: Option<String>,
    missing: Vec<(&'static str, &'static str)>,
}

struct Bench {
    dir: PathBuf,
    ours: PathBuf,
    qemu: PathBuf,
    me: PathBuf,
    /// How much less is done: 1 is all.
    less: u64,
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let result = match words.split_first() {
        Some((first, rest)) if first == "work" => work(rest),
        _ => run(&words),
    };
    if let Err(why) = result {
        eprintln!("bench: {why}");
        std::process::exit(1);
    }
}

/// One library's work, in this process.
fn work(words: &[String]) -> Result<(), String> {
    let job = Job::parse(words).ok_or("work PEER KIND IMAGE DEPTH COUNT BYTES STEP CACHE")?;
    println!("Run completed in {:.6} seconds.", job.run()?);
    Ok(())
}

fn run(words: &[String]) -> Result<(), String> {
    let (mut rounds, mut less, mut only) = (5, 1, String::new());
    let mut words = words.iter();
    let (Some(ours), Some(dir)) = (words.next(), words.next()) else {
        return Err("OUR_TOOLS_DIR WORK_DIR [--rounds N] [--quick] [--only NAME]".to_owned());
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--rounds" => rounds = value()?.parse().map_err(|e| format!("{word}: {e}"))?,
            "--only" => only = value()?.clone(),
            "--quick" => (rounds, less) = (1, 20),
            _ => return Err(format!("no such option: {word}")),
        }
    }
    let dir = PathBuf::from(dir);
    let images = dir.join("images");
    std::fs::create_dir_all(&images).map_err(|e| format!("{}: {e}", images.display()))?;
    let qemu = std::env::var_os("BLOCKLAYER_QEMU_DIR").unwrap_or_else(|| "/usr/bin".into());
    let bench = Bench {
        dir: images.clone(),
        ours: ours.into(),
        qemu: qemu.into(),
        me: std::env::current_exe().map_err(|e| e.to_string())?,
        less,
    };
    bench.prepare()?;
    let plans: Vec<Plan> = bench.plans();
    let plans: Vec<Plan> = plans
        .into_iter()
        .filter(|p| p.name.contains(&only))
        .collect();
    let mut cells: Vec<Cell> = plans.iter().map(empty_cell).collect();
    for round in 0..rounds {
        for (plan, cell) in plans.iter().zip(&mut cells) {
            eprintln!("round {}: {}", round + 1, plan.name);
            // Another one comes first in each round: what is before leaves its traces in the host's caches.
            for i in 0..plan.tasks.len() {
                let i = (i + round) % plan.tasks.len();
                let (task, contestant) = (&plan.tasks[i], &mut cell.contestants[i]);
                if contestant.excuse.is_some() {
                    continue;
                }
                let measured = bench.measure(task, plan.measure);
                let verified = match (&plan.verify, round) {
                    (Some(script), 0) => measured.and_then(|v| bench.shell(script).map(|()| v)),
                    _ => measured,
                };
                match verified {
                    Ok(value) => contestant.values.push(value),
                    Err(why) => {
                        contestant.values.clear();
                        contestant.excuse = Some(why);
                    }
                }
            }
        }
    }
    let table = report::table(&cells);
    println!("{table}");
    let write = |name: &str, text: &str| {
        std::fs::write(dir.join(name), text).map_err(|e| format!("{name}: {e}"))
    };
    write("bench.txt", &table)?;
    write("bench.csv", &report::csv(&cells))?;
    write("bench.svg", &report::svg(&cells))?;
    std::fs::remove_dir_all(&images).map_err(|e| e.to_string())
}

fn empty_cell(plan: &Plan) -> Cell {
    let contestant = |name, excuse: Option<&str>| Contestant {
        name,
        values: Vec::new(),
        excuse: excuse.map(str::to_owned),
    };
    let tasks = plan.tasks.iter().map(|t| contestant(t.name, None));
    let missing = plan
        .missing
        .iter()
        .map(|(name, why)| contestant(name, Some(why)));
    Cell {
        name: plan.name,
        unit: match plan.measure {
            Measure::Peak => "KiB",
            _ => "s",
        },
        contestants: tasks.chain(missing).collect(),
    }
}

impl Bench {
    fn prepare(&self) -> Result<(), String> {
        let mib = 512 / self.less.min(8);
        self.shell(&format!(
            "set -e; rm -f *
             $QEMU/qemu-img create -q -f qcow2 full.qcow2 {mib}M
             $QEMU/qemu-io -c 'write -q -P {PATTERN} 0 {mib}M' full.qcow2
             $QEMU/qemu-img create -q -f raw half.raw {mib}M
             for i in $(seq 0 8 $(({mib} - 8))); do echo \"write -q -P 7 ${{i}}M 4M\"; done | $QEMU/qemu-io -f raw half.raw > /dev/null
             $QEMU/qemu-img convert -f raw -O qcow2 half.raw half.qcow2
             $QEMU/qemu-img create -q -f qcow2 -o preallocation=metadata big.qcow2 {}G
             $QEMU/qemu-img create -q -f qcow2 scattered.qcow2 {}G
             for i in $(seq 0 {}); do echo \"write -q $((i * 192))k 64k\"; done | $QEMU/qemu-io scattered.qcow2 > /dev/null
             for i in $(seq 1 {}); do echo \"write -q -P $((i % 250 + 1)) $((i * 7919 % 60000))k 4k\"; echo \"read -q $((i * 104729 % 60000))k 4k\"; done > script
             sync",
            128 / self.less,
            4,
            8000 / self.less,
            10_000 / self.less,
        ))
    }

    /// Runs a script in the directory of the images.
    fn shell(&self, script: &str) -> Result<(), String> {
        let output = Command::new("bash")
            .args(["-c", script])
            .current_dir(&self.dir)
            .env("QEMU", &self.qemu)
            .env("OURS", &self.ours)
            .output()
            .map_err(|e| format!("bash: {e}"))?;
        if output.status.success() {
            return Ok(());
        }
        let told = String::from_utf8_lossy(&output.stderr);
        let told = told.lines().last().unwrap_or("no message").to_owned();
        Err(format!("what it left is wrong: {told}"))
    }

    fn measure(&self, task: &Task, measure: Measure) -> Result<f64, String> {
        if let Some(before) = &task.before {
            self.shell(before)?;
        }
        // Nobody pays for what another one left to be written back.
        self.shell("sync")?;
        let begun = Instant::now();
        let (mut said, mut peak) = (0.0, 0.0f64);
        for _ in 0..task.repeat {
            let stdin = match &task.stdin {
                Some(path) => Stdio::from(std::fs::File::open(path).map_err(|e| e.to_string())?),
                None => Stdio::null(),
            };
            let mut child = Command::new(&task.program)
                .args(&task.arguments)
                .current_dir(&self.dir)
                .stdin(stdin)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(|e| format!("{}: {e}", task.program.display()))?;
            if measure == Measure::Peak {
                let status = format!("/proc/{}/status", child.id());
                while let Ok(None) = child.try_wait() {
                    let now = peak_kib(Path::new(&status));
                    peak = peak.max(now.unwrap_or(0.0));
                    std::thread::sleep(Duration::from_micros(500));
                }
            }
            let output = child.wait_with_output().map_err(|e| e.to_string())?;
            let text = String::from_utf8_lossy(&output.stdout);
            if !output.status.success() {
                let told = String::from_utf8_lossy(&output.stderr);
                return Err(told.lines().last().unwrap_or("it failed").to_owned());
            }
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix("Run completed in "));
            let number = line.and_then(|l| l.split_whitespace().next());
            said += number.and_then(|n| n.parse().ok()).unwrap_or(0.0);
        }
        match measure {
            Measure::Whole => Ok(begun.elapsed().as_secs_f64()),
            Measure::Peak => Ok(peak),
            Measure::Said if said > 0.0 => Ok(said),
            Measure::Said => Err("it said no time".to_owned()),
        }
    }

    fn tool(&self, name: &'static str, ours: bool, tool: &str, arguments: &str) -> Task {
        let dir = if ours { &self.ours } else { &self.qemu };
        Task {
            name,
            program: dir.join(tool),
            arguments: arguments.split_whitespace().map(str::to_owned).collect(),
            before: None,
            stdin: None,
            repeat: 1,
        }
    }

    /// The same call of ours and of QEMU's.
    fn both(&self, tool: &str, arguments: &str) -> Vec<Task> {
        vec![
            self.tool("ours", true, tool, arguments),
            self.tool("qemu", false, tool, arguments),
        ]
    }

    fn library(&self, name: &'static str, job: &Job) -> Task {
        let peer = name.trim_end_matches(" (library)").to_owned();
        Task {
            name,
            program: self.me.clone(),
            arguments: Job {
                peer,
                ..job.clone()
            }
            .arguments(),
            before: None,
            stdin: None,
            repeat: 1,
        }
    }

    /// Requests one after the other, by everybody who can.
    fn requests(&self, name: &'static str, measure: Measure, job: Job) -> Plan {
        let mut tasks = Vec::new();
        if job.kind != Kind::Zero {
            let write = match job.kind {
                Kind::Read => String::new(),
                _ => format!("-w --pattern={PATTERN}"),
            };
            let cache = if job.direct { "none" } else { "writeback" };
            let arguments = |aio: &str| {
                format!(
                    "bench -f qcow2 {write} -t {cache} {aio} -c {} -d {} -s {} -S {} {}",
                    job.count, job.depth, job.bytes, job.step, job.image
                )
            };
            tasks.push(self.tool("ours", true, "qemu-img", &arguments("")));
            tasks.push(self.tool(
                "qemu io_uring",
                false,
                "qemu-img",
                &arguments("-i io_uring"),
            ));
            tasks.push(self.tool("qemu threads", false, "qemu-img", &arguments("-i threads")));
        }
        tasks.push(self.library("ours (library)", &job));
        tasks.push(self.library("imago", &job));
        tasks.push(self.library("qcow2-rs", &job));
        Plan {
            name,
            measure,
            tasks,
            verify: None,
            missing: Vec::new(),
        }
    }

    fn plans(&self) -> Vec<Plan> {
        let n = |count: u64| (count / self.less).max(20);
        let read = |depth, count, direct| Job {
            peer: String::new(),
            kind: Kind::Read,
            image: "full.qcow2".to_owned(),
            depth,
            count,
            bytes: 4096,
            step: 4096,
            direct,
        };
        let write = |depth, count, bytes, step| Job {
            kind: Kind::Write,
            image: "new.qcow2".to_owned(),
            bytes,
            step,
            ..read(depth, count, false)
        };
        let tools = |name, measure, tasks| Plan {
            name,
            measure,
            tasks,
            verify: None,
            missing: Vec::new(),
        };
        let said = Measure::Said;
        let mut plans = vec![
            self.requests("cached 4K reads, depth 1", said, read(1, n(200_000), false)),
            self.requests(
                "cached 4K reads, depth 32",
                said,
                read(32, n(200_000), false),
            ),
            self.requests("O_DIRECT 4K reads, depth 1", said, read(1, n(8_000), true)),
            self.requests(
                "O_DIRECT 4K reads, depth 32",
                said,
                read(32, n(60_000), true),
            ),
            self.requests(
                "4K overwrites, depth 1",
                said,
                Job {
                    image: "full.qcow2".to_owned(),
                    ..write(1, n(60_000), 4096, 4096)
                },
            ),
            self.requests(
                "4K overwrites, depth 32",
                said,
                Job {
                    image: "full.qcow2".to_owned(),
                    ..write(32, n(60_000), 4096, 4096)
                },
            ),
        ];
        // Allocating writes count the last flush, and are looked at afterwards.
        for (name, job) in [
            (
                "4K to fresh clusters, depth 1",
                write(1, n(8_000), 4096, 65536),
            ),
            (
                "4K to fresh clusters, depth 32",
                write(32, n(8_000), 4096, 65536),
            ),
            ("whole clusters, depth 1", write(1, n(4_000), 65536, 65536)),
            (
                "whole clusters, depth 32",
                write(32, n(4_000), 65536, 65536),
            ),
            ("sequential 4K, depth 1", write(1, n(60_000), 4096, 4096)),
            ("sequential 4K, depth 32", write(32, n(60_000), 4096, 4096)),
        ] {
            let (bytes, step, count) = (job.bytes, job.step, job.count);
            let mut plan = self.requests(name, Measure::Whole, job);
            for task in &mut plan.tasks {
                task.before = Some(
                    "rm -f new.qcow2; $QEMU/qemu-img create -q -f qcow2 new.qcow2 1G".to_owned(),
                );
            }
            let last = (count - 1) * step;
            plan.verify = Some(format!(
                "set -eo pipefail; $QEMU/qemu-img check -q new.qcow2 >&2
                 for at in 0 {} {last}; do $QEMU/qemu-io -r -c \"read -P {PATTERN} $at {bytes}\" new.qcow2 > out
                 if grep -q failed out; then echo data is missing >&2; exit 1; fi; done",
                last / 2 / step * step
            ));
            plans.push(plan);
        }
        let mut zeroes = self.requests(
            "zero writes of clusters, depth 1",
            Measure::Whole,
            Job {
                kind: Kind::Zero,
                ..write(1, n(8_000), 65536, 65536)
            },
        );
        for task in &mut zeroes.tasks {
            task.before = Some("cp --reflink=auto full.qcow2 new.qcow2".to_owned());
        }
        zeroes.missing.push((
            "qemu",
            "no tool of it writes zeroes in a loop; see the script below",
        ));
        plans.push(zeroes);
        let whole = Measure::Whole;
        let convert = |from: &str, to: &str, file: &str| {
            let mut tasks = self.both(
                "qemu-img",
                &format!("convert -f {from} -O {to} {file} out.{to}"),
            );
            for task in &mut tasks {
                task.before = Some(format!("rm -f out.{to}"));
            }
            tasks
        };
        plans.push(tools(
            "convert raw to qcow2",
            whole,
            convert("raw", "qcow2", "half.raw"),
        ));
        plans.push(tools(
            "convert qcow2 to raw",
            whole,
            convert("qcow2", "raw", "half.qcow2"),
        ));
        plans.push(tools(
            "check, preallocated",
            whole,
            self.both("qemu-img", "check big.qcow2"),
        ));
        plans.push(tools(
            "check, scattered",
            whole,
            self.both("qemu-img", "check scattered.qcow2"),
        ));
        plans.push(tools(
            "map, preallocated",
            whole,
            self.both("qemu-img", "map big.qcow2"),
        ));
        plans.push(tools(
            "map, scattered",
            whole,
            self.both("qemu-img", "map --output=json scattered.qcow2"),
        ));
        let mut script = self.both("qemu-io", "-t writeback script.qcow2");
        for task in &mut script {
            task.stdin = Some(self.dir.join("script"));
            task.before = Some(
                "rm -f script.qcow2; $QEMU/qemu-img create -q -f qcow2 script.qcow2 64M".to_owned(),
            );
        }
        plans.push(tools("qemu-io script of 20,000 lines", whole, script));
        let mut zeroes = self.both("qemu-io", "-t writeback new.qcow2");
        let path = self.dir.join("zeroes");
        let lines: String = (0..n(8_000))
            .map(|i| format!("write -zq {}k 64k\n", i * 64))
            .collect();
        // If it can't be written, the cell says so: there is no script to read.
        let _told_later = std::fs::write(&path, lines);
        for task in &mut zeroes {
            task.stdin = Some(path.clone());
            task.before = Some("cp --reflink=auto full.qcow2 new.qcow2".to_owned());
        }
        plans.push(tools("qemu-io script of zero writes", whole, zeroes));
        for (name, tool, arguments) in [
            (
                "start-up of qemu-img info, x 20",
                "qemu-img",
                "info half.qcow2",
            ),
            ("start-up of qemu-io, x 20", "qemu-io", "-c quit half.qcow2"),
        ] {
            let mut tasks = self.both(tool, arguments);
            for task in &mut tasks {
                task.repeat = 20;
            }
            plans.push(tools(name, whole, tasks));
        }
        plans.push(self.requests(
            "peak memory, cached reads, depth 32",
            Measure::Peak,
            read(32, n(200_000), false),
        ));
        plans.push(tools(
            "peak memory, convert",
            Measure::Peak,
            convert("raw", "qcow2", "half.raw"),
        ));
        plans
    }
}

fn peak_kib(status: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}
