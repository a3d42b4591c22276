//! Embedded engines side by side under the store's load: `cargo run --release -- [folder]`. Behind decision 0002.
//!
//! Each engine gets the same writers, the same commit thread with the same way of gathering groups, and the same memory
//! above it; `log` is the store itself as it ships. Every (engine, phase) runs in a process of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use coracle_store::{Draft, Embedded, EmbeddedOptions, Precondition, Store};

const OBJECT_BYTES: usize = 3000;
const OBJECTS: usize = 100_000;
const SECONDS: u64 = 4;
const GATHER: Duration = Duration::from_micros(500);

type Pair = (String, Vec<u8>);

trait Engine: Send {
    fn commit(&mut self, group: &[Pair]);
    fn load(&mut self, visit: &mut dyn FnMut(&[u8], &[u8]));
}

struct Redb(redb::Database);
const TABLE: redb::TableDefinition<&str, &[u8]> = redb::TableDefinition::new("objects");

impl Engine for Redb {
    fn commit(&mut self, group: &[Pair]) {
        let write = self.0.begin_write().unwrap();
        let mut table = write.open_table(TABLE).unwrap();
        for (key, value) in group {
            table.insert(key.as_str(), value.as_slice()).unwrap();
        }
        drop(table);
        write.commit().unwrap();
    }

    fn load(&mut self, visit: &mut dyn FnMut(&[u8], &[u8])) {
        use redb::{ReadableDatabase as _, ReadableTable as _};
        let table = self.0.begin_read().unwrap().open_table(TABLE).unwrap();
        for pair in table.iter().unwrap() {
            let (key, value) = pair.unwrap();
            visit(key.value().as_bytes(), value.value());
        }
    }
}

struct Fjall(fjall::Database, fjall::Keyspace);

impl Engine for Fjall {
    fn commit(&mut self, group: &[Pair]) {
        let mut batch = self.0.batch().durability(Some(fjall::PersistMode::SyncData));
        for (key, value) in group {
            batch.insert(&self.1, key.as_str(), value.as_slice());
        }
        batch.commit().unwrap();
    }

    fn load(&mut self, visit: &mut dyn FnMut(&[u8], &[u8])) {
        for pair in self.1.iter() {
            let (key, value) = pair.into_inner().unwrap();
            visit(&key, &value);
        }
    }
}

struct Heed(heed::Env, heed::Database<heed::types::Bytes, heed::types::Bytes>);

impl Engine for Heed {
    fn commit(&mut self, group: &[Pair]) {
        let mut write = self.0.write_txn().unwrap();
        for (key, value) in group {
            self.1.put(&mut write, key.as_bytes(), value).unwrap();
        }
        write.commit().unwrap();
    }

    fn load(&mut self, visit: &mut dyn FnMut(&[u8], &[u8])) {
        let read = self.0.read_txn().unwrap();
        for pair in self.1.iter(&read).unwrap() {
            let (key, value) = pair.unwrap();
            visit(key, value);
        }
    }
}

fn open(name: &str, folder: &Path) -> Box<dyn Engine> {
    std::fs::create_dir_all(folder).unwrap();
    match name {
        "redb" => {
            let mut builder = redb::Builder::new();
            let database = builder.set_cache_size(8 << 20).create(folder.join("db")).unwrap();
            let write = database.begin_write().unwrap();
            write.open_table(TABLE).unwrap();
            write.commit().unwrap();
            Box::new(Redb(database))
        }
        "fjall" => {
            let database = fjall::Database::builder(folder).cache_size(8 << 20).open().unwrap();
            let options = || fjall::KeyspaceCreateOptions::default().max_memtable_size(16 << 20);
            let keyspace = database.keyspace("objects", options).unwrap();
            Box::new(Fjall(database, keyspace))
        }
        "heed" => {
            #[expect(unsafe_code, reason = "a memory map is sound only while nobody else writes the file, as here")]
            let environment = unsafe { heed::EnvOpenOptions::new().map_size(8 << 30).open(folder).unwrap() };
            let mut write = environment.write_txn().unwrap();
            let database = environment.create_database(&mut write, None).unwrap();
            write.commit().unwrap();
            Box::new(Heed(environment, database))
        }
        _ => panic!("unknown engine {name}"),
    }
}

fn object(number: usize) -> Pair {
    let key = format!("/registry/pods/default/pod-{number:08}");
    let mut value = format!("{{\"kind\":\"Pod\",\"metadata\":{{\"name\":\"pod-{number}\",\"resourceVersion\":\"\"}},\"x\":\"");
    let mut random = number as u64 + 1;
    while value.len() < OBJECT_BYTES - 2 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        value.push_str(&format!("{:012x} containerStatuses ", random >> 16));
    }
    value.truncate(OBJECT_BYTES - 2);
    value.push_str("\"}");
    (key, value.into_bytes())
}

type Write = Box<dyn Fn(Pair) + Send + Sync>;

/// A way to write durably from many threads, which share flushes.
fn writer(name: &str, folder: &Path) -> Write {
    if name == "log" {
        let store = Embedded::open(folder, EmbeddedOptions::default()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        return Box::new(move |(key, value)| {
            let _keep = &runtime;
            let splice = value.windows(3).position(|three| three == b"\"\"}").unwrap() + 1;
            let draft = Draft { json: value.into(), splice };
            handle.block_on(store.put(&key, draft, Precondition::Any)).unwrap();
        });
    }
    let mut engine = open(name, folder);
    let (queue, requests) = mpsc::channel::<(Pair, mpsc::SyncSender<()>)>();
    std::thread::spawn(move || {
        let mut last = 1;
        let mut memory = BTreeMap::new();
        while let Ok(first) = requests.recv() {
            let mut group = vec![first];
            let mut until = None;
            while group.len() < 1024 {
                match requests.try_recv() {
                    Ok(request) => group.push(request),
                    Err(_) if group.len() >= last => break,
                    Err(_) => {
                        let until: &mut Instant = until.get_or_insert_with(|| Instant::now() + GATHER);
                        match requests.recv_timeout(until.saturating_duration_since(Instant::now())) {
                            Ok(request) => group.push(request),
                            Err(_) => break,
                        }
                    }
                }
            }
            last = group.len();
            let (pairs, answers): (Vec<Pair>, Vec<_>) = group.into_iter().unzip();
            engine.commit(&pairs);
            memory.extend(pairs);
            for answer in answers {
                answer.send(()).unwrap();
            }
        }
    });
    Box::new(move |pair| {
        let (answer, answered) = mpsc::sync_channel(1);
        queue.send((pair, answer)).unwrap();
        answered.recv().unwrap();
    })
}

fn writes(name: &str, folder: &Path, writers: usize) {
    let write = writer(name, folder);
    let until = Instant::now() + Duration::from_secs(SECONDS);
    let mut times: Vec<f64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers)
            .map(|writer| {
                let write = &write;
                scope.spawn(move || {
                    let mut times = Vec::new();
                    while Instant::now() < until {
                        let pair = object(writer * 1_000_000 + times.len());
                        let begun = Instant::now();
                        write(pair);
                        times.push(begun.elapsed().as_secs_f64() * 1e3);
                    }
                    times
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    times.sort_by(f64::total_cmp);
    let rate = times.len() as f64 / SECONDS as f64;
    print!("{rate:.0}/s p50 {:.1} p99 {:.1} ms", times[times.len() / 2], times[times.len() * 99 / 100]);
    // The process ends as after a crash: nothing is closed.
    std::process::exit(0);
}

fn fill(name: &str, folder: &Path) {
    let write = writer(name, folder);
    std::thread::scope(|scope| {
        for part in 0..64 {
            let write = &write;
            scope.spawn(move || (part..OBJECTS).step_by(64).for_each(|number| write(object(number))));
        }
    });
    print!("{:.0} MB", rss_mb());
    std::process::exit(0);
}

fn start(name: &str, folder: &Path) {
    let begun = Instant::now();
    if name == "log" {
        let store = Embedded::open(folder, EmbeddedOptions::default()).unwrap();
        print!("{:.2} s, {:.0} MB", begun.elapsed().as_secs_f64(), rss_mb());
        std::mem::forget(store);
        return;
    }
    let mut engine = open(name, folder);
    let mut memory = BTreeMap::new();
    engine.load(&mut |key, value| {
        memory.insert(key.to_vec(), value.to_vec());
    });
    assert_eq!(memory.len(), OBJECTS);
    print!("{:.2} s, {:.0} MB", begun.elapsed().as_secs_f64(), rss_mb());
    std::process::exit(0);
}

fn rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, phase, name, folder, count] = &arguments[..] {
        let folder = PathBuf::from(folder);
        return match phase.as_str() {
            "writes" => writes(name, &folder, count.parse().unwrap()),
            "fill" => fill(name, &folder),
            _ => start(name, &folder),
        };
    }
    let folder = PathBuf::from(arguments.get(1).map_or("/var/tmp/coracle-engines", String::as_str));
    let run = |phase: &str, name: &str, folder: &Path, count: &str| {
        let output = Command::new("/proc/self/exe").args([phase, name]).arg(folder).arg(count).output().unwrap();
        assert!(output.status.success(), "{phase} {name}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for name in ["log", "redb", "fjall", "heed"] {
        for writers in ["1", "16", "64"] {
            let _ = std::fs::remove_dir_all(&folder);
            println!("{name}: {writers} writers: {}", run("writes", name, &folder, writers));
        }
        let _ = std::fs::remove_dir_all(&folder);
        println!("{name}: {OBJECTS} objects written, RSS {}", run("fill", name, &folder, "0"));
        println!("{name}: start {}", run("start", name, &folder, "0"));
        let size = Command::new("du").args(["-sm"]).arg(&folder).output().unwrap();
        println!("{name}: MB on disk {}", String::from_utf8_lossy(&size.stdout).split('\t').next().unwrap());
    }
    let _ = std::fs::remove_dir_all(&folder);
}
