//! What is on disk: after kills, cuts and damage, on a full disk, compacted, encrypted, saved and restored.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_store::{
    Draft, Embedded, EmbeddedOptions, Error, EventKind, ListOptions, OpenError, Precondition, Store, restore, save,
    verify,
};
use coracle_testkit::assert_eventually;
use rand::prelude::*;
use serde_json::json;

fn draft(text: &str) -> Draft {
    Draft::encode(&json!({"metadata": {"name": "n"}, "text": text})).unwrap()
}

/// Small files and a short history, so that little work passes through all of it.
fn small() -> EmbeddedOptions {
    EmbeddedOptions {
        history: Duration::from_secs(60),
        history_events: 300,
        segment_bytes: 16 << 10,
        ..EmbeddedOptions::default()
    }
}

fn files(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix))
        .collect();
    files.sort();
    files
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
    }
    to
}

/// This program again, running only the ignored test `name`.
fn child(name: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]).env("STORE_FOLDER", folder);
    command
}

/// Kills a writing process at random moments; what it said was acknowledged is there, and the history has no gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_kills() {
    let most: usize = std::env::var("STORE_CRASH_ROUNDS").map_or(usize::MAX, |rounds| rounds.parse().unwrap());
    let until = if most == usize::MAX {
        Instant::now() + Duration::from_secs(6)
    } else {
        Instant::now() + Duration::from_secs(3600)
    };
    let folder = tempfile::tempdir().unwrap();
    let mut random = StdRng::from_rng(&mut rand::rng());
    let mut acknowledged: BTreeMap<u64, (String, String)> = BTreeMap::new();
    let (mut rounds, mut total, mut last_revision) = (0, 0, 1);
    while Instant::now() < until && rounds < most {
        let mut writer = child("crash_writer", folder.path())
            .env("STORE_ROUND", rounds.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        // Not always the same place: after some number of answers, plus some time.
        let answers = random.random_range(0..200);
        let pause = Duration::from_micros(random.random_range(0..3000));
        let mut text = Vec::new();
        for _ in 0..answers {
            text.extend(lines.next().map(Result::unwrap));
        }
        std::thread::sleep(pause);
        writer.kill().unwrap();
        writer.wait().unwrap();
        text.extend(lines.map_while(Result::ok));
        for line in &text {
            // A line cut by the kill lacks its end mark; test harness lines are not ours.
            let parts: Vec<&str> = line.split(' ').collect();
            if let ["ack", revision, key, value, "."] = parts[..] {
                acknowledged.insert(revision.parse().unwrap(), (key.to_owned(), value.to_owned()));
                total += 1;
            }
        }

        let store = Embedded::open(folder.path(), small()).unwrap_or_else(|error| panic!("round {rounds}: {error}"));
        let oldest = store.compacted().await.unwrap();
        let newest = store.revision().await.unwrap();
        assert!(newest >= last_revision, "the revision went back from {last_revision} to {newest}");
        last_revision = newest;
        let mut watch = store.watch("/", oldest).await.unwrap();
        let then = ListOptions { revision: Some(oldest), ..ListOptions::default() };
        let mut state: BTreeMap<Arc<str>, _> =
            store.list("/", then).await.unwrap().entries.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        let mut at = oldest;
        while let Some(batch) = watch.try_next().unwrap() {
            for event in batch.events {
                assert_eq!(event.revision(), at + 1, "a gap in the history of round {rounds}");
                at += 1;
                if let Some((key, value)) = acknowledged.get(&at) {
                    assert_eq!(&*event.entry.key, key);
                    assert_eq!(event.kind == EventKind::Delete, value == "-");
                    assert!(value == "-" || std::str::from_utf8(&event.entry.value).unwrap().contains(value));
                }
                match event.kind {
                    EventKind::Put => state.insert(event.entry.key.clone(), event.entry.clone()),
                    EventKind::Delete => state.remove(&event.entry.key),
                };
            }
        }
        assert_eq!(at, newest, "the history ends before the newest revision");
        assert!(acknowledged.last_key_value().is_none_or(|(last, _)| *last <= newest), "an acknowledged write is lost");
        let listed = store.list("/", ListOptions::default()).await.unwrap().entries;
        assert_eq!(listed, state.into_values().collect::<Vec<_>>());
        // The last acknowledged write of each key, unless a later one replaced it.
        for (revision, (key, value)) in &acknowledged {
            let now = listed.iter().find(|entry| *entry.key == **key);
            if value != "-" {
                let replaced = now.is_none_or(|entry| entry.revision > *revision);
                assert!(
                    replaced || now.is_some_and(|entry| entry.revision == *revision),
                    "{key} at {revision} is lost"
                );
            }
        }
        acknowledged.retain(|revision, _| *revision > oldest);
        rounds += 1;
    }
    println!(
        "{rounds} kills, {total} acknowledged writes, {last_revision} revisions, files {:?}",
        files(folder.path(), "").len()
    );
    assert!(rounds >= 5 && total > 100, "too little happened: {rounds} kills, {total} writes");
}

/// Writes until it is killed, and says what was acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of acknowledged_writes_survive_kills"]
async fn crash_writer() {
    let folder = std::env::var_os("STORE_FOLDER").unwrap();
    let round = std::env::var("STORE_ROUND").unwrap();
    let store = Arc::new(Embedded::open(folder, small()).unwrap());
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let (store, round) = (store.clone(), round.clone());
            tokio::spawn(async move {
                let mut random = StdRng::from_rng(&mut rand::rng());
                for number in 0.. {
                    let key = format!("/registry/pods/ns/{}", random.random_range(0..40));
                    let value = format!("r{round}t{task}n{number}{}", "x".repeat(random.random_range(0..400)));
                    let (revision, value) = if random.random_bool(0.2) {
                        match store.delete(&key, Precondition::Any).await {
                            Ok(deleted) => (deleted.revision, "-".to_owned()),
                            Err(Error::Conflict { .. }) => continue,
                            Err(error) => panic!("{error}"),
                        }
                    } else {
                        let entry = store.put(&key, draft(&value), Precondition::Any).await.unwrap();
                        (entry.revision, value)
                    };
                    let line = format!("ack {revision} {key} {value} .\n");
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// A folder with `count` writes, properly closed.
async fn filled(count: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let store = Embedded::open(folder.path(), EmbeddedOptions::default()).unwrap();
    for number in 0..count {
        store.put(&format!("/a/{number:04}"), draft("x"), Precondition::Absent).await.unwrap();
    }
    folder
}

#[tokio::test]
async fn a_torn_tail_is_cut_anywhere() {
    let folder = filled(5).await;
    let log = files(folder.path(), "log-").pop().unwrap();
    let whole = fs::metadata(&log).unwrap().len();
    let mut counts = Vec::new();
    for length in (32..whole).step_by(3).chain([whole]) {
        let copy = copy(folder.path());
        let path = copy.path().join(log.file_name().unwrap());
        fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
        let store = Embedded::open(copy.path(), EmbeddedOptions::default()).unwrap();
        counts.push(store.list("/", ListOptions::default()).await.unwrap().entries.len());
        store.put("/after", draft("y"), Precondition::Absent).await.unwrap();
        drop(store);
        let store = Embedded::open(copy.path(), EmbeddedOptions::default()).unwrap();
        assert!(store.get("/after").await.unwrap().is_some());
    }
    assert!(counts.is_sorted() && counts[0] == 0 && *counts.last().unwrap() == 5, "{counts:?}");
}

#[tokio::test]
async fn damage_is_named_and_stops_the_start() {
    let folder = filled(5).await;
    let log = files(folder.path(), "log-").pop().unwrap();
    let bytes = fs::read(&log).unwrap();
    // The close of the log follows its last frame, so damage to any write is told from a torn tail.
    for at in (0..bytes.len() - 16).step_by(7) {
        let copy = copy(folder.path());
        let path = copy.path().join(log.file_name().unwrap());
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        fs::write(&path, damaged).unwrap();
        let error = Embedded::open(copy.path(), EmbeddedOptions::default()).expect_err("a damaged byte");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        let advice = error.to_string().contains("coracle snapshot restore");
        assert!(at < 32 || (matches!(error, OpenError::Damaged { .. }) && advice), "byte {at}: {error}");
    }
    // A log file that is missing is damage too.
    let copy = copy(folder.path());
    let store = Embedded::open(copy.path(), EmbeddedOptions::default()).unwrap();
    store.put("/b", draft("x"), Precondition::Absent).await.unwrap();
    drop(store);
    fs::remove_file(copy.path().join(log.file_name().unwrap())).unwrap();
    let error = Embedded::open(copy.path(), EmbeddedOptions::default()).expect_err("a missing file");
    assert!(error.to_string().contains("are missing"), "{error}");
}

#[tokio::test]
async fn compaction_reclaims_space_and_keeps_the_history() {
    let folder = tempfile::tempdir().unwrap();
    let options = EmbeddedOptions { history: Duration::from_millis(500), ..small() };
    let store = Embedded::open(folder.path(), options.clone()).unwrap();
    let size =
        || files(folder.path(), "").iter().map(|path| fs::metadata(path).map_or(0, |data| data.len())).sum::<u64>();
    for round in 0..2500 {
        let key = format!("/registry/pods/ns/{:03}", round % 50);
        if round % 7 == 6 {
            let _ = store.delete(&key, Precondition::Any).await;
        } else {
            store.put(&key, draft(&format!("{round}{}", "x".repeat(200))), Precondition::Any).await.unwrap();
        }
    }
    // 2,500 writes are more than 600 KB; 50 objects, 300 changes and the files not full yet are far less.
    assert_eventually!(10, size() < 200 << 10, "{} bytes are left", size());
    assert_eventually!(10, files(folder.path(), "snapshot-").len() == 1);
    let now = store.list("/", ListOptions::default()).await.unwrap();
    drop(store);
    let store = Embedded::open(folder.path(), options).unwrap();
    let again = store.list("/", ListOptions::default()).await.unwrap();
    assert_eq!((again.entries, again.revision), (now.entries, now.revision));
    let oldest = store.compacted().await.unwrap();
    assert!(oldest > 1 && store.watch("/", oldest - 1).await.is_err());
    assert!(store.watch("/", oldest).await.is_ok());
}

#[tokio::test]
async fn snapshots_are_saved_verified_and_restored() {
    let folder = tempfile::tempdir().unwrap();
    let options = EmbeddedOptions::default();
    let store = Embedded::open(folder.path(), options.clone()).unwrap();
    for number in 0..100 {
        store.put(&format!("/a/{number:03}"), draft("x"), Precondition::Absent).await.unwrap();
    }
    // Of the running store.
    let file = folder.path().join("backup");
    let summary = save(folder.path(), &file, &options).unwrap();
    assert_eq!((summary.revision, summary.objects), (101, 100));
    assert_eq!(verify(&file, &options).unwrap(), summary);
    let listed = store.list("/", ListOptions::default()).await.unwrap().entries;
    assert!(restore(&file, folder.path(), 0, &options).is_err(), "not over a store that is open");

    let other = tempfile::tempdir().unwrap();
    let target = other.path().join("new");
    restore(&file, &target, 1000, &options).unwrap();
    assert!(restore(&file, &target, 0, &options).unwrap_err().to_string().contains("holds a store already"));
    let restored = Embedded::open(&target, options.clone()).unwrap();
    assert_eq!(restored.revision().await.unwrap(), 1101);
    assert_eq!(restored.list("/", ListOptions::default()).await.unwrap().entries, listed);
    assert!(restored.watch("/", 101).await.is_err(), "clients of the old store have to list again");
    let entry = restored.put("/b", draft("x"), Precondition::Absent).await.unwrap();
    assert_eq!(entry.revision, 1102);

    let bytes = fs::read(&file).unwrap();
    for at in (0..bytes.len()).step_by(97) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        fs::write(&file, &damaged).unwrap();
        verify(&file, &options).expect_err("a damaged snapshot");
        fs::write(&file, &bytes[..at]).unwrap();
        verify(&file, &options).expect_err("half a snapshot");
    }
}

#[tokio::test]
async fn secrets_are_encrypted_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let key_file = |name: &str, text: &str, mode: u32| {
        let path = other.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        EmbeddedOptions { key_file: Some(path), ..EmbeddedOptions::default() }
    };
    let right = key_file("right", &format!("{}\n", "0123456789abcdef".repeat(4)), 0o600);
    let wrong = key_file("wrong", &"fedcba9876543210".repeat(4), 0o600);
    let store = Embedded::open(folder.path(), right.clone()).unwrap();
    let secret = store.put("/registry/secrets/ns/s", draft("hush-hush"), Precondition::Absent).await.unwrap();
    store.put("/registry/configmaps/ns/c", draft("loud-and-clear"), Precondition::Absent).await.unwrap();
    drop(store);
    let backup = other.path().join("backup");
    save(folder.path(), &backup, &right).unwrap();
    let mut all = fs::read(&backup).unwrap();
    for path in files(folder.path(), "") {
        all.extend(fs::read(path).unwrap());
    }
    let holds = |text: &str| all.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds("loud-and-clear") && !holds("hush-hush"));
    for options in [EmbeddedOptions::default(), wrong] {
        let error = Embedded::open(folder.path(), options).expect_err("not the key");
        assert!(matches!(error, OpenError::Key { .. }), "{error}");
    }
    for (text, mode) in [("short", 0o600), (&*"0123456789abcdef".repeat(4), 0o644)] {
        Embedded::open(folder.path(), key_file("bad", text, mode)).expect_err("no good key file");
    }
    let store = Embedded::open(folder.path(), right).unwrap();
    assert_eq!(store.get("/registry/secrets/ns/s").await.unwrap(), Some(secret));
}

/// A real full disk: a small tmpfs in a mount namespace of its own.
#[test]
fn reads_go_on_while_the_disk_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["-m", "sh", "-ec"])
        .arg("mount --make-rprivate /; mount -t tmpfs -o size=6m none \"$STORE_FOLDER\"; exec \"$0\" \"$@\"")
        .arg(program)
        .args(["--exact", "full_disk", "--ignored", "--nocapture"])
        .env("STORE_FOLDER", folder.path())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
    assert!(String::from_utf8_lossy(&text).contains("1 passed"), "{}", String::from_utf8_lossy(&text));
}

#[tokio::test]
#[ignore = "the child of reads_go_on_while_the_disk_is_full"]
async fn full_disk() {
    let folder = PathBuf::from(std::env::var_os("STORE_FOLDER").unwrap());
    let options = EmbeddedOptions { segment_bytes: 1 << 20, ..EmbeddedOptions::default() };
    let ballast = folder.join("ballast");
    fs::write(&ballast, vec![1; 2 << 20]).unwrap();
    let store = Embedded::open(folder.join("store"), options.clone()).unwrap();
    let mut written = Vec::new();
    let error = loop {
        let key = format!("/a/{:05}", written.len());
        match store.put(&key, draft(&"x".repeat(20_000)), Precondition::Absent).await {
            Ok(entry) => written.push(entry),
            Err(error) => break error,
        }
        assert!(written.len() < 1000, "the disk does not fill");
    };
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert_eq!(store.list("/", ListOptions::default()).await.unwrap().entries, written);
    fs::remove_file(&ballast).unwrap();
    written.push(store.put("/b", draft("there is room"), Precondition::Absent).await.unwrap());
    drop(store);
    let store = Embedded::open(folder.join("store"), options).unwrap();
    assert_eq!(store.list("/", ListOptions::default()).await.unwrap().entries, written);
}

/// One change reaches ten thousand watchers, without ten thousand copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_watchers_share_a_change() {
    const WATCHERS: usize = 10_000;
    let folder = tempfile::tempdir().unwrap();
    let store = Embedded::open(folder.path(), EmbeddedOptions::default()).unwrap();
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..WATCHERS {
        let mut watch = store.watch("/registry/pods/", 1).await.unwrap();
        let sender = sender.clone();
        tokio::spawn(async move {
            loop {
                let Ok(batch) = watch.next().await else { return };
                for event in batch.events {
                    sender.send(event.entry.value.as_ptr() as usize).unwrap();
                }
            }
        });
    }
    for round in 0..3 {
        let begun = Instant::now();
        let entry = store.put("/registry/pods/ns/a", draft(&round.to_string()), Precondition::Any).await.unwrap();
        for _ in 0..WATCHERS {
            let address = tokio::time::timeout(Duration::from_secs(20), received.recv()).await.unwrap().unwrap();
            assert_eq!(address, entry.value.as_ptr() as usize, "all see the same bytes");
        }
        println!("{WATCHERS} watchers in {:?}", begun.elapsed());
    }
}
