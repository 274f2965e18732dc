//! Groups of real processes: joining, exchanging, finishing, and every way to fail.

#[path = "support/ranks.rs"]
mod ranks;

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use ranks::{Process, Setup, free_port, tell_all};
use rustix::process::Signal;

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    ranks::run();
}

const SOON: Duration = Duration::from_secs(30);

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
    for rank in ranks.iter().filter(|rank| rank.rank as usize != victim) {
        let error = rank.error(SOON);
        let took = error.at - began;
        assert!(error.text.starts_with("peer "), "{signal:?} {victim} {point:?}: {}", error.text);
        assert!(error.text.ends_with(&format!(", rank {victim}")), "{signal:?} {victim} {point:?}: {}", error.text);
        assert!(took < setup.fail_timeout, "{signal:?} {victim} {point:?}: rank {} took {took:?}", rank.rank);
    }
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
