//! Ranks that load one model, again and again, one of which is to fail; and what the others must say of it.

use std::thread;
use std::time::{Duration, Instant};

use crate::rank_loads::{self, Counts, counts};
use crate::ranks::{Answer, Process, Setup, tell_all};

pub(crate) const COUNT: u32 = 3;
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Ranks that load one model, one of which is to fail.
pub(crate) struct Team {
    pub(crate) setup: Setup,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) host: Vec<String>,
    pub(crate) victim: usize,
    pub(crate) ranks: Vec<Process>,
}

impl Team {
    pub(crate) fn new(victim: usize, setup: Setup) -> Team {
        let folder = tempfile::tempdir().unwrap();
        rank_loads::write(folder.path());
        let host = rank_loads::host_digests(folder.path(), COUNT);
        let ranks = setup.start_all(0..COUNT);
        let mut team = Team { setup, folder, host, victim, ranks };
        team.loads_well(); // the first one makes what stays
        tell_all(&mut team.ranks, "settled");
        team.all_are_ok();
        team
    }

    pub(crate) fn path(&self) -> String {
        self.folder.path().display().to_string()
    }

    pub(crate) fn victim(&mut self) -> &mut Process {
        &mut self.ranks[self.victim]
    }

    pub(crate) fn others(&self) -> impl Iterator<Item = &Process> {
        self.ranks.iter().filter(|rank| rank.rank as usize != self.victim)
    }

    pub(crate) fn tell_others(&mut self, command: &str) {
        let victim = self.victim as u32;
        self.ranks.iter_mut().filter(|rank| rank.rank != victim).for_each(|rank| rank.tell(command));
    }

    pub(crate) fn all_are_ok(&self) {
        self.ranks.iter().for_each(Process::is_ok);
    }

    /// The victim obeys, well.
    pub(crate) fn victim_is_told(&mut self, command: &str) {
        self.victim().tell(command);
        self.victim().is_ok();
    }

    /// Tells some ranks to join: rank 0 a little earlier, so that the others need not try again.
    pub(crate) fn tell_join(ranks: &mut [Process]) {
        for rank in ranks {
            rank.tell("join");
            if rank.rank == 0 {
                thread::sleep(Duration::from_millis(3));
            }
        }
    }

    pub(crate) fn all_join(&mut self) {
        Team::tell_join(&mut self.ranks);
        self.all_are_ok();
    }

    /// All load and check, the victim with flags of its own: what they answered, after they gave everything back.
    pub(crate) fn load(&mut self, flags: &str) -> Vec<Answer> {
        let (path, victim) = (self.path(), self.victim as u32);
        Team::tell_join(&mut self.ranks);
        for rank in &mut self.ranks {
            let flags = if rank.rank == victim { flags } else { "" };
            let all = format!("all always {path} {flags}");
            rank.tell(all.trim());
        }
        let answers = self.ranks.iter().map(|rank| {
            let joined = rank.answer(LONG);
            let loaded = rank.answer(LONG);
            if joined.text == "ok" { loaded } else { joined }
        });
        let answers = answers.collect();
        self.nothing_is_left();
        answers
    }

    /// Groups end, and nothing of the load is left in any rank.
    pub(crate) fn nothing_is_left(&mut self) {
        for command in ["drop", "left"] {
            tell_all(&mut self.ranks, command);
        }
        for rank in &self.ranks {
            rank.answer(LONG);
            assert_eq!(rank.answer(LONG).text, "[0, 0, 0, 0]", "rank {}: live and violations, twice", rank.rank);
        }
    }

    pub(crate) fn loads_well(&mut self) {
        let answers = self.load("");
        let answers: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        assert_eq!(answers, self.host);
    }

    /// What the victim counts in a load.
    pub(crate) fn counted(&mut self) -> Counts {
        self.victim_is_told("uncount");
        self.loads_well();
        counts(self.victim())
    }

    /// The victim failed, and all others returned what it said; or none did. True if they failed.
    pub(crate) fn agreed(&self, what: &str, answers: &[Answer], within: Duration, since: Instant) -> bool {
        if answers.iter().zip(&self.host).all(|(answer, digest)| answer.text == *digest) {
            return false;
        }
        let all: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        let said = all[self.victim].strip_prefix("error ").and_then(|said| said.split_once(' '));
        let (kind, said) = said.unwrap_or_else(|| panic!("{what}: {all:#?}"));
        let named = format!(", rank {}", self.victim);
        let told = format!("error {kind} another rank failed: {}{named}", said.trim_end_matches(&named));
        for (rank, answer) in answers.iter().enumerate() {
            assert!(rank == self.victim || answer.text == told, "{what}, rank {rank}: {all:#?}");
            let took = answer.at - since;
            assert!(took < within, "{what}, rank {rank} took {took:?}: {all:#?}");
        }
        true
    }

    /// The others answer with an error that names the victim, in time.
    pub(crate) fn others_name(&self, what: &str, within: Duration, since: Instant) {
        for rank in self.others() {
            let error = rank.error(LONG);
            assert!(
                error.text.contains(&format!("rank {}", self.victim)),
                "{what}, rank {}: {}",
                rank.rank,
                error.text
            );
            let took = error.at.saturating_duration_since(since);
            assert!(took < within, "{what}, rank {} took {took:?}: {}", rank.rank, error.text);
        }
    }

    pub(crate) fn quit(self) {
        self.ranks.into_iter().for_each(Process::quit); // each holds its threads and descriptors against those before
    }
}
