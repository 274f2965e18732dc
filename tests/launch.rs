//! Groups of real processes: joining, exchanging, finishing, and every way to fail.

#[path = "support/ranks.rs"]
mod ranks;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::task::Wake;
use std::time::{Duration, Instant};
use std::{fs, thread};

use ranks::{Process, SOON, Setup, free_port, tell_all};
use rustix::process::Signal;
use safetensors::tensor::{Dtype, TensorView};
use shardlift::plan::DeviceSpec;
use shardlift::{
    Checkpoint, Error, ErrorKind, Group, GroupOptions, Launch, LaunchOptions, Loader, Monitor, Plan, Rank, Rules,
    World, limits,
};

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    ranks::run();
}

fn quit(ranks: Vec<Process>) {
    ranks.into_iter().for_each(Process::quit);
}

#[test]
fn groups_join_exchange_and_finish() {
    for size in [1, 2, 4, 8] {
        let setup = Setup::new(size);
        let mut ranks = setup.joined();
        for round in 0..3 {
            for rank in &mut ranks {
                let part = format!("{}:{round}", rank.rank);
                rank.tell(&format!("exchange plan {part}"));
            }
            let all: Vec<String> = (0..size).map(|rank| format!("{rank}:{round}")).collect();
            ranks.iter().for_each(|rank| assert_eq!(rank.answer(SOON).text, all.join(",")));
        }
        tell_all(&mut ranks, "finish");
        ranks.iter().for_each(|rank| rank.is_ok());
        tell_all(&mut ranks, "finish");
        ranks.iter().for_each(|rank| assert_eq!(rank.error(SOON).text, "usage this group has finished"));
        tell_all(&mut ranks, "drop");
        for rank in &ranks {
            let millis: u64 = rank.answer(SOON).text.parse().unwrap();
            assert!(millis < 400, "rank {} took {millis} ms to leave", rank.rank);
        }
        quit(ranks); // each holds its threads and descriptors against those before
    }
}

#[test]
fn nobody_is_done_before_all_are() {
    let mut ranks = Setup::new(3).joined();
    tell_all(&mut ranks[..2], "finish");
    thread::sleep(Duration::from_millis(500));
    assert!(ranks.iter().all(Process::is_silent));
    ranks[2].tell("finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    quit(ranks);
}

#[test]
fn missing_ranks_are_named_by_all() {
    let setup = Setup { join_timeout: Duration::from_secs(2), ..Setup::new(5) };
    let mut ranks = setup.start_all([0, 2, 3]);
    let began = Instant::now();
    tell_all(&mut ranks, "join");
    for rank in &ranks {
        let error = rank.error(SOON);
        assert_eq!(error.text, "peer not all ranks arrived within 2.0 s: ranks 1, 4 missing, rank 1");
        assert!(error.at - began >= Duration::from_millis(1900), "{:?}", error.at - began);
    }
    quit(ranks);

    let mut ranks = Setup { join_timeout: Duration::from_secs(1), ..Setup::new(3) }.start_all([1, 2]);
    tell_all(&mut ranks, "join");
    for rank in &ranks {
        let error = rank.error(SOON).text;
        assert!(error.starts_with("peer rank 0 missing: it did not answer at tcp://127.0.0.1:"), "{error}");
        assert!(error.ends_with(", rank 0"), "{error}");
    }
    quit(ranks);
}

#[test]
fn a_rank_of_another_session_is_not_let_in() {
    let setup = Setup { session: Some("one".into()), join_timeout: Duration::from_secs(3), ..Setup::new(3) };
    let other = Setup { session: Some("other".into()), join_timeout: Duration::from_secs(1), ..setup.clone() };
    let mut ranks = setup.start_all([0, 1]);
    ranks.push(other.start(2));
    tell_all(&mut ranks, "join");
    let error = ranks[2].error(SOON).text;
    assert!(error.contains("rank 0 of another session"), "{error}");
    for rank in &ranks[..2] {
        assert!(rank.error(SOON).text.contains("rank 2 missing"));
    }
    quit(ranks);
}

#[test]
fn groups_on_neighbouring_ports_find_their_own() {
    // As two runs of torchrun on one machine: the ports that the second tries begin among those of the first.
    let port = free_port();
    let setup = |session: &str, port| Setup { master: Some(port), session: Some(session.into()), ..Setup::new(3) };
    let (one, other) = (setup("one", port), setup("other", port + 1));
    let agent = TcpListener::bind(("127.0.0.1", port + 1)).unwrap(); // the second run's own port, which never answers
    let mut ranks = thread::scope(|scope| {
        let one = scope.spawn(|| one.joined());
        let other = scope.spawn(|| other.joined());
        [one.join().unwrap(), other.join().unwrap()]
    });
    for (group, name) in ranks.iter_mut().zip(["one", "other"]) {
        tell_all(group, &format!("exchange who {name}"));
    }
    for (group, name) in ranks.iter().zip(["one", "other"]) {
        group.iter().for_each(|rank| assert_eq!(rank.answer(SOON).text, [name; 3].join(",")));
    }
    for mut group in ranks {
        tell_all(&mut group, "finish");
        group.iter().for_each(|rank| rank.is_ok());
        quit(group);
    }
    drop(agent);
}

#[test]
fn what_one_rank_says_all_return() {
    for failing in [0, 2] {
        let mut ranks = Setup::new(4).joined();
        for (index, rank) in ranks.iter_mut().enumerate().filter(|(index, _)| *index != failing) {
            rank.tell(["await", "finish", "finish", "await"][index]);
        }
        let began = Instant::now();
        ranks[failing].tell("fail short");
        ranks[failing].is_ok();
        for rank in ranks.iter().filter(|rank| rank.rank as usize != failing) {
            let error = rank.error(SOON);
            assert_eq!(error.text, format!("truncated another rank failed: short, tensor w, rank {failing}"));
            assert!(error.at - began < Duration::from_secs(1), "{:?}", error.at - began);
        }
        // The first failure is the group's, whatever comes after it.
        ranks[1].tell("fail later");
        ranks[1].is_ok();
        tell_all(&mut ranks, "finish");
        for rank in &ranks {
            let error = rank.error(SOON).text;
            assert!(error.contains("short") && error.ends_with(&format!("rank {failing}")), "{error}");
        }
        quit(ranks);
    }
}

#[test]
fn one_that_is_cancelled_cancels_all() {
    let mut ranks = Setup::new(3).joined();
    tell_all(&mut ranks[..2], "finish");
    ranks[2].tell("cancel");
    ranks[2].is_ok();
    for rank in &ranks[..2] {
        assert_eq!(rank.error(SOON).text, "cancelled another rank failed: the load was cancelled, rank 2");
    }
    quit(ranks);
}

#[test]
fn one_that_leaves_early_fails_all() {
    for leaving in [0, 1] {
        let mut ranks = Setup::new(3).joined();
        let other = 1 - leaving;
        ranks[other].tell("finish");
        ranks[2].tell("await");
        ranks[leaving].tell("drop");
        for rank in [&ranks[other], &ranks[2]] {
            let error = rank.error(SOON).text;
            assert_eq!(error, format!("peer a rank left before all had finished, rank {leaving}"));
        }
        quit(ranks);
    }
}

#[test]
fn ranks_at_different_points_are_named() {
    let mut ranks = Setup::new(3).joined();
    ranks[1].tell("exchange plan x");
    thread::sleep(Duration::from_millis(200));
    ranks[0].tell("exchange plan x");
    ranks[2].tell("finish");
    for rank in &ranks {
        let error = rank.error(SOON).text;
        assert!(error.contains("different points of the program: expected \"plan\", found the end"), "{error}");
    }
    quit(ranks);

    let setup = Setup { join_timeout: Duration::from_secs(2), ..Setup::new(3) };
    let mut ranks = setup.joined();
    tell_all(&mut ranks[..2], "exchange plan x");
    ranks[2].tell("await");
    for rank in &ranks {
        let error = rank.error(SOON).text;
        let expected =
            "peer not all ranks came to \"plan\" within 2.0 s: expected all ranks, found rank 2 missing, rank 2";
        assert_eq!(error.replace("this rank was given up by the others: ", ""), expected);
    }
    quit(ranks);
}

#[test]
fn processes_that_do_not_belong_together_fail_at_once() {
    let setup = Setup::new(3);
    let larger = Setup { size: 4, ..setup.clone() };
    let slower = Setup { fail_timeout: Duration::from_secs(9), ..setup.clone() };
    for (other, rank, expected) in [
        (&larger, 2, "usage ranks disagree about how many they are: expected 3, found 4, rank 2"),
        (&slower, 2, "how soon a silent one has failed: expected 2.5 s, found 9 s, rank 2"),
        (&setup, 1, "two processes say that they are rank 1, rank 1"),
    ] {
        let setup = Setup { rendezvous: Setup::new(3).rendezvous, ..setup.clone() };
        let mut ranks = setup.start_all([0, 1]);
        tell_all(&mut ranks, "join");
        thread::sleep(Duration::from_secs(1));
        ranks.push(Setup { rendezvous: setup.rendezvous, ..other.clone() }.start(rank));
        ranks[2].tell("join");
        for rank in &ranks {
            let error = rank.error(SOON).text;
            assert!(error.contains(expected), "{error}");
        }
        quit(ranks);
    }
}

#[test]
fn strangers_neither_stop_nor_stall_a_group() {
    let setup = Setup::new(3);
    let port: u16 = setup.rendezvous.rsplit_once(':').unwrap().1.parse().unwrap();
    let mut ranks = setup.start_all(0..3);
    tell_all(&mut ranks[..2], "join");
    let until = Instant::now() + SOON;
    let connect = || loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            Err(error) => panic!("{error}"),
        }
    };
    let hello = [&17_u32.to_le_bytes()[..], &[1], b"shrdlft\x01", &[0, 0, 0, 0]].concat();
    let sayings: [&[u8]; 9] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0; 4],
        &[0xff; 64],
        &[4, 0, 0],
        &[0xff, 0xff, 0xff, 0x7f, 1],
        &[1, 0, 0, 0, 6],
        &hello,
        &hello[..9],
    ];
    // They stay, more than the group puts up with, and one more sends without end.
    let mut strangers: Vec<TcpStream> = (0..90).map(|_| connect()).collect();
    for (index, stranger) in strangers.iter_mut().enumerate() {
        // Some have been sent away.
        let _ = stranger.write_all(sayings[index % sayings.len()]);
    }
    let mut endless = connect();
    let flood = thread::spawn(move || while endless.write_all(&[7; 4096]).is_ok() {});
    let began = Instant::now();
    ranks[2].tell("join");
    ranks.iter().for_each(|rank| rank.is_ok());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    flood.join().unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "nobody is let in once all are there");
    tell_all(&mut ranks, "exchange plan x");
    ranks.iter().for_each(|rank| assert_eq!(rank.answer(SOON).text, "x,x,x"));
    drop(strangers);
    tell_all(&mut ranks, "finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    quit(ranks);
}

#[test]
fn somebody_else_on_the_port_is_not_taken_for_rank_0() {
    let port = free_port();
    let silent = TcpListener::bind(("127.0.0.1", port + 1)).unwrap();
    let chatty = TcpListener::bind(("127.0.0.1", port + 2)).unwrap();
    thread::spawn(move || {
        for stream in chatty.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(b"SSH-2.0-x\r\n"));
        }
    });
    let setup = Setup { master: Some(port), session: Some("s".into()), ..Setup::new(2) };
    let began = Instant::now();
    let mut ranks = setup.joined();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    tell_all(&mut ranks, "finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    drop(silent);
    quit(ranks);
}

#[test]
fn a_rank_0_that_speaks_another_language_is_given_up() {
    let setup = Setup::new(2);
    let hub = TcpListener::bind(setup.rendezvous.strip_prefix("tcp://").unwrap()).unwrap();
    let mut rank = setup.start(1);
    for nonsense in [&[0xff; 8][..], &[1, 0, 0, 0, 99], &[1, 0, 0, 0, 3]] {
        rank.tell("join");
        let (mut stream, _) = hub.accept().unwrap();
        let session = setup.rendezvous.as_bytes();
        let length = (session.len() as u32).to_le_bytes();
        let welcome = [&[2][..], b"shrdlft\x01", &length, session].concat();
        let length = (welcome.len() as u32).to_le_bytes();
        stream.write_all(&[&length[..], &welcome, nonsense].concat()).unwrap();
        let error = rank.error(SOON).text;
        assert_eq!(error, "peer a rank sent what is no message of this version, rank 0");
    }
    rank.quit();
}

#[test]
fn a_rendezvous_file_is_gone_when_all_are_there_and_when_they_will_not_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("meet");
    let setup = Setup { rendezvous: format!("file://{}", path.display()), ..Setup::new(3) };
    let left = || fs::read_dir(folder.path()).unwrap().count();

    // What an earlier run left leads nowhere, and is replaced.
    fs::write(&path, "shardlift rendezvous 1\nsession x\ntoken 0\naddress 127.0.0.1:9\n").unwrap();
    let mut ranks = setup.joined();
    assert_eq!(left(), 0);
    tell_all(&mut ranks, "finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    quit(ranks);

    let short = Setup { join_timeout: Duration::from_secs(2), ..setup.clone() };
    let mut ranks = short.start_all([0, 1]);
    tell_all(&mut ranks, "join");
    ranks.iter().for_each(|rank| assert!(rank.error(SOON).text.contains("rank 2 missing")));
    quit(ranks);
    assert_eq!(left(), 0);

    // Rank 0 is killed: the others remove what it wrote.
    let mut ranks = setup.start_all([0, 1]);
    tell_all(&mut ranks, "join");
    let until = Instant::now() + SOON;
    while left() == 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(left(), 1);
    thread::sleep(Duration::from_secs(1));
    ranks[0].signal(Signal::KILL);
    assert!(ranks[1].error(SOON).text.ends_with("rank 0"));
    ranks.remove(1).quit();
    assert_eq!(left(), 0);

    let nowhere = Setup { rendezvous: "file:///no/such/folder/meet".into(), ..short };
    let mut ranks = nowhere.start_all([0]);
    tell_all(&mut ranks, "join");
    let error = ranks[0].error(SOON).text;
    assert!(error.starts_with("not-found cannot write the rendezvous file"), "{error}");
    quit(ranks);
}

/// What a rank is doing when it is killed or stopped.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Point {
    Joining,
    Idle,
    Exchanging,
    Finishing,
}

/// One rank of four is killed or stopped: all others return an error that names it in time, and so does the stopped one
/// when it wakes.
fn hit(signal: Signal, victim: usize, point: Point) {
    let setup = Setup::new(4);
    let mut ranks = if point == Point::Joining {
        let mut ranks = setup.start_all(0..3); // the last one never starts
        tell_all(&mut ranks, "join");
        thread::sleep(Duration::from_secs(2)); // they find each other within milliseconds
        ranks
    } else {
        let mut ranks = setup.joined();
        let command = match point {
            Point::Exchanging => "exchange plan x",
            Point::Finishing => "finish",
            _ => "await",
        };
        tell_all(&mut ranks[..3], command);
        ranks[3].tell("await"); // so that nobody gets past it
        thread::sleep(Duration::from_millis(300));
        ranks
    };
    let began = Instant::now();
    ranks[victim].signal(signal);
    let mut slowest = Duration::ZERO;
    for rank in ranks.iter().filter(|rank| rank.rank as usize != victim) {
        let error = rank.error(SOON);
        let took = error.at - began;
        assert!(error.text.starts_with("peer "), "{signal:?} {victim} {point:?}: {}", error.text);
        assert!(error.text.ends_with(&format!(", rank {victim}")), "{signal:?} {victim} {point:?}: {}", error.text);
        assert!(took < setup.fail_timeout, "{signal:?} {victim} {point:?}: rank {} took {took:?}", rank.rank);
        slowest = slowest.max(took);
    }
    let line = format!("{signal:?} of rank {victim} {point:?}: told after {slowest:.3?} of {:?}\n", setup.fail_timeout);
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    if signal == Signal::STOP {
        assert!(ranks[victim].is_silent());
        ranks[victim].signal(Signal::CONT);
        let woken = Instant::now();
        let error = ranks[victim].error(SOON);
        assert!(error.text.starts_with("peer "), "{signal:?} {victim} {point:?}: {}", error.text);
        assert!(error.at - woken < setup.fail_timeout, "{victim} {point:?}: {:?}", error.at - woken);
    } else {
        ranks.remove(victim); // reaps it
    }
    quit(ranks);
}

#[test]
fn every_death_is_told_in_time() {
    for point in [Point::Joining, Point::Idle, Point::Exchanging, Point::Finishing] {
        thread::scope(|scope| {
            for signal in [Signal::KILL, Signal::STOP] {
                for victim in [0, 2] {
                    scope.spawn(move || hit(signal, victim, point));
                }
            }
        });
    }
}

/// A rank of a group within this process.
fn launch(rank: u32, size: u32, rendezvous: &str) -> Launch {
    let mut options = LaunchOptions::default();
    options.rank = Some(Rank(rank));
    options.size = Some(size);
    options.rendezvous = Some(rendezvous.into());
    Launch::from_vars(&|_| None, &options).unwrap().unwrap()
}

struct Woken(Sender<Option<String>>, Mutex<Option<Arc<Group>>>);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        // It may hold, and give up, the last handle of its group.
        let group = self.1.lock().unwrap().take();
        let failure = group.and_then(|group| group.failure());
        self.0.send(failure.map(|failure| failure.to_string())).unwrap();
    }
}

#[test]
fn a_failure_wakes_whoever_asked_for_it() {
    let rendezvous = Setup::new(2).rendezvous;
    let (group, other) = thread::scope(|scope| {
        let join = |rank| Group::join(&launch(rank, 2, &rendezvous), &GroupOptions::default()).unwrap();
        let other = scope.spawn(move || join(1));
        (Arc::new(join(0)), other.join().unwrap())
    });
    let (sender, woken) = mpsc::channel();
    group.wake_on_failure(Arc::new(Woken(sender.clone(), Mutex::new(None))).into());
    group.wake_on_failure(Arc::new(Woken(sender.clone(), Mutex::new(Some(Arc::clone(&group))))).into());
    assert!(group.failure().is_none() && woken.try_recv().is_err());
    other.fail(&Error::new(ErrorKind::Io, "x"));
    let expected = Some("another rank failed: x, rank 1".to_owned());
    assert_eq!(woken.recv_timeout(SOON).unwrap(), None);
    assert_eq!(woken.recv_timeout(SOON).unwrap(), expected);
    // Too late to wait.
    group.wake_on_failure(Arc::new(Woken(sender, Mutex::new(Some(Arc::clone(&group))))).into());
    assert_eq!(woken.recv_timeout(SOON).unwrap(), expected);
    assert_eq!(group.exchange("x", vec![]).unwrap_err().kind(), ErrorKind::Io);
}

/// Cancels a load.
struct Cancels(Mutex<Option<Monitor>>);

impl Wake for Cancels {
    fn wake(self: Arc<Self>) {
        self.0.lock().unwrap().take().unwrap().cancel();
    }
}

#[test]
fn whoever_is_woken_by_a_failing_load_may_cancel_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = vec![1; 8 << 20];
    let view = TensorView::new(Dtype::U8, vec![bytes.len()], &bytes).unwrap();
    safetensors::serialize_to_file([("a", view)], None, &path).unwrap();
    let whole = fs::metadata(&path).unwrap().len();
    for size in [1, 2] {
        fs::File::options().write(true).open(&path).unwrap().set_len(whole).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let rendezvous = Setup::new(size).rendezvous;
        let plan = |rank| {
            let world = World::member(Rank(rank), size, DeviceSpec::Host);
            Plan::new(&checkpoint, &Rules::replicate_all(), &world).unwrap()
        };
        thread::scope(|scope| {
            let (path, rendezvous, plan) = (&path, &rendezvous, &plan);
            let ranks: Vec<_> = (0..size)
                .map(|rank| {
                    scope.spawn(move || {
                        let group = Group::join(&launch(rank, size, rendezvous), &GroupOptions::default()).unwrap();
                        let group = Arc::new(group);
                        let load =
                            Loader::new().group(Some(&group)).throttle(Some(1 << 20)).start(&plan(rank)).unwrap();
                        group.wake_on_failure(Arc::new(Cancels(Mutex::new(Some(load.monitor())))).into());
                        if rank == 0 {
                            fs::File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
                        }
                        load.finish().unwrap_err()
                    })
                })
                .collect();
            for rank in ranks {
                let error = rank.join().unwrap();
                // What the other one reads may have been cut before it opened it.
                assert!(matches!(error.kind(), ErrorKind::Truncated | ErrorKind::Changed), "{error}");
            }
        });
    }
}

#[test]
fn joining_can_be_cancelled_and_others_hear_of_it() {
    let rendezvous = Setup::new(3).rendezvous;
    let cancelled = AtomicBool::new(false);
    thread::scope(|scope| {
        let join = |rank| {
            let launch = launch(rank, 3, &rendezvous);
            Group::join_unless(&launch, &GroupOptions::default(), &|| rank == 1 && cancelled.load(Relaxed)).unwrap_err()
        };
        let ranks = [0, 1].map(|rank| scope.spawn(move || join(rank)));
        thread::sleep(Duration::from_secs(1));
        cancelled.store(true, Relaxed);
        let began = Instant::now();
        for rank in ranks {
            let error = rank.join().unwrap();
            assert_eq!((error.kind(), error.at().rank), (ErrorKind::Cancelled, Some(Rank(1))), "{error}");
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    });
}

#[test]
fn what_makes_no_group_is_refused() {
    let wrong = |change: fn(&mut GroupOptions)| {
        let mut options = GroupOptions::default();
        change(&mut options);
        Group::join(&launch(0, 1, "tcp://127.0.0.1:1"), &options).unwrap_err().kind()
    };
    assert_eq!(wrong(|options| options.fail_timeout = Duration::from_millis(1)), ErrorKind::Usage);
    assert_eq!(wrong(|options| options.join_timeout = Duration::MAX), ErrorKind::Usage);
    let group = Group::join(&launch(0, 1, "tcp://127.0.0.1:1"), &GroupOptions::default()).unwrap();
    let large = group.exchange("x", vec![0; limits::EXCHANGE_PART + 1]).unwrap_err();
    assert_eq!((large.kind(), large.at().rank), (ErrorKind::Usage, Some(Rank(0))));
    assert!(group.finish().is_err(), "the first failure stays");
}

#[test]
fn a_job_that_is_stopped_and_continued_as_a_whole_goes_on() {
    let setup = Setup { fail_timeout: Duration::from_millis(1500), ..Setup::new(3) };
    let mut ranks = setup.joined();
    tell_all(&mut ranks, "await");
    ranks.iter().for_each(|rank| rank.signal(Signal::STOP));
    thread::sleep(Duration::from_secs(3));
    ranks.iter().for_each(|rank| rank.signal(Signal::CONT));
    thread::sleep(Duration::from_secs(2));
    assert!(ranks.iter().all(Process::is_silent));
    ranks[1].signal(Signal::KILL);
    for rank in [&ranks[0], &ranks[2]] {
        assert!(rank.error(SOON).text.ends_with(", rank 1"));
    }
    ranks.remove(1);
    quit(ranks);
}

#[test]
fn a_long_silence_of_the_program_is_not_that_of_the_rank() {
    let setup = Setup { fail_timeout: Duration::from_secs(1), ..Setup::new(2) };
    let mut ranks = setup.joined();
    ranks[0].tell("finish");
    thread::sleep(Duration::from_secs(3));
    assert!(ranks[0].is_silent());
    ranks[1].tell("finish");
    ranks.iter().for_each(|rank| rank.is_ok());
    quit(ranks);
}
