//! How ranks of a group find each other where that is not easy.

#[path = "support/ranks.rs"]
mod ranks;

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use ranks::{SOON, Setup, finish, free_port, tell_all};
use rustix::process::Signal;
use shardlift::{Error, Group, GroupOptions, Launch, LaunchOptions, Rank};

/// A process of the other tests.
#[test]
#[ignore = "a rank of other tests"]
fn rank() {
    ranks::run();
}

/// Joins as a rank within this process.
fn join(rank: u32, size: u32, rendezvous: &str, timeouts: [Duration; 2]) -> Result<Group, Error> {
    let mut who = LaunchOptions::default();
    (who.rank, who.size, who.rendezvous) = (Some(Rank(rank)), Some(size), Some(rendezvous.into()));
    let mut options = GroupOptions::default();
    [options.join_timeout, options.fail_timeout] = timeouts;
    Group::join(&Launch::from_vars(&|_| None, &who)?.unwrap(), &options)
}

/// Rank 0 does not run while rank 1 tries again and again: attempts that were given up are nobody's, and the last one hears that
/// all are there.
#[test]
fn attempts_that_were_given_up_do_not_complete_a_group() {
    // Between two attempts, while the second is waiting, and while the third is.
    for stopped in [Duration::from_millis(2100), Duration::from_millis(3500), Duration::from_millis(5000)] {
        let setup = Setup::new(2);
        let mut ranks = setup.start_all(0..2);
        let port: u16 = setup.rendezvous.rsplit_once(':').unwrap().1.parse().unwrap();
        ranks[0].tell("join");
        let until = Instant::now() + SOON;
        // A stranger that goes away at once shows that it listens.
        while TcpStream::connect(("127.0.0.1", port)).is_err() && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        ranks[0].signal(Signal::STOP);
        ranks[1].tell("join");
        thread::sleep(stopped);
        let began = Instant::now();
        ranks[0].signal(Signal::CONT);
        ranks.iter().for_each(|rank| rank.is_ok());
        assert!(began.elapsed() < Duration::from_secs(4), "stopped for {stopped:?}: {:?}", began.elapsed());
        finish(ranks);
    }
}

/// As torchrun restarts ranks: in the same session, where the ones before them met.
#[test]
fn a_group_that_was_killed_meets_again_at_once() {
    let setup = Setup { master: Some(free_port()), session: Some("torchrun/none/29500".into()), ..Setup::new(4) };
    let mut first = setup.joined();
    tell_all(&mut first, "await");
    first[2].signal(Signal::KILL); // a crash, of which the others hear
    for rank in first.iter().filter(|rank| rank.rank != 2) {
        assert!(rank.error(SOON).text.ends_with(", rank 2"));
    }
    first.iter().for_each(|rank| rank.signal(Signal::KILL));
    drop(first);
    let mut second = setup.start_all(0..4);
    let began = Instant::now();
    tell_all(&mut second, "join");
    second.iter().for_each(|rank| rank.is_ok());
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    finish(second);
}

#[test]
fn rank_0_has_a_connection_for_each_rank() {
    const RANKS: u32 = 100;
    let limited = |limit: &str| Setup {
        within: ["sh", "-c", &format!("ulimit {limit}; exec \"$@\""), "sh"].map(str::to_owned).into(),
        join_timeout: Duration::from_secs(20),
        ..Setup::new(RANKS)
    };
    let setup = limited("-Sn 64");
    let mut hub = setup.start(0);
    hub.tell("join");
    let (rendezvous, timeouts) = (&setup.rendezvous, [setup.join_timeout, setup.fail_timeout]);
    let others: Vec<Group> = thread::scope(|scope| {
        let join = |rank| scope.spawn(move || join(rank, RANKS, rendezvous, timeouts));
        let joining: Vec<_> = (1..RANKS).map(join).collect();
        joining.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
    });
    hub.is_ok();
    drop(others);
    hub.tell("drop");
    hub.answer(SOON);
    hub.quit();

    let mut hub = limited("-n 64").start(0);
    hub.tell("join");
    let error = hub.error(SOON).text;
    assert!(
        error.starts_with("io rank 0 has a connection to each rank, and may not open so many: expected "),
        "{error}"
    );
    assert!(error.contains("found 64 (ulimit -n)"), "{error}");
    hub.quit();
}

/// Ranks tell each other whole milliseconds.
#[test]
fn equal_timeouts_are_equal_to_the_last_microsecond() {
    let rendezvous = Setup::new(2).rendezvous;
    let timeouts = [SOON, Duration::from_micros(1_000_500)];
    let join = |rank| join(rank, 2, &rendezvous, timeouts);
    thread::scope(|scope| {
        let other = scope.spawn(move || join(1));
        // Kept: whoever joined first and left would be the other's error.
        let _first = join(0).unwrap();
        other.join().unwrap().unwrap();
    });
}
