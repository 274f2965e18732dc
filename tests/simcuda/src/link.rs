//! The model of the links: when a copy starts and ends, as absolute instants.

/// What `SIMCUDA_LINK` asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rates {
    /// Bytes per nanosecond, which is GB/s, of a device's link, in each direction.
    link: f64,
    latency_ns: u64,
    /// What all devices share, in each direction.
    root: Option<f64>,
}

/// Which way bytes go, seen from the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    In,
    Out,
}

/// When one operation runs in the model's time, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// How long the link itself is taken; the rest is waiting for what all devices share.
    pub(crate) busy: u64,
}

/// The links of all devices.
pub(crate) struct Links {
    rates: Rates,
    devices: Vec<[Calendar; 2]>,
    root: [Calendar; 2],
}

/// When something is taken: intervals in order, none touching the next.
#[derive(Clone, Default)]
struct Calendar(Vec<(u64, u64)>);

/// How long the past is kept: a copy behind an operation of another library is booked when that has ended, from then on.
const KEPT_NS: u64 = 1_000_000_000;

impl Calendar {
    /// Takes `length` of the free time from `from` on, in pieces if need be, so that no time is lost to the order in
    /// which copies were submitted. Nothing is asked for long before `now` any more.
    fn book(&mut self, now: u64, from: u64, length: u64) -> (u64, u64) {
        self.0.retain(|(_, end)| *end + KEPT_NS > now);
        let (mut at, mut left) = (from, length);
        let mut start = None;
        let mut taken = Vec::new();
        for (busy, until) in self.0.iter().copied().chain([(u64::MAX, u64::MAX)]) {
            if at < busy {
                let piece = left.min(busy - at);
                start.get_or_insert(at);
                taken.push((at, at + piece));
                left -= piece;
                if left == 0 {
                    break;
                }
            }
            at = at.max(until);
        }
        let end = taken.last().map_or(from, |(_, end)| *end);
        self.0.append(&mut taken);
        self.0.sort_unstable();
        self.0.dedup_by(|next, last| {
            let touches = next.0 <= last.1;
            if touches {
                last.1 = last.1.max(next.1);
            }
            touches
        });
        (start.unwrap_or(from), end)
    }
}

impl Rates {
    pub(crate) fn parse(text: &str) -> Option<Rates> {
        let mut parts = text.split(',').map(str::trim);
        let link = rate(parts.next()?)?;
        let mut rates = Rates { link, latency_ns: 0, root: None };
        for part in parts {
            match part.strip_prefix("root=") {
                Some(root) => rates.root = Some(rate(root)?),
                None => rates.latency_ns = (part.parse::<f64>().ok()? * 1e3) as u64,
            }
        }
        Some(rates)
    }
}

fn rate(text: &str) -> Option<f64> {
    text.parse().ok().filter(|rate: &f64| *rate > 0.0 && rate.is_finite())
}

impl Links {
    pub(crate) fn new(rates: Rates, devices: usize) -> Links {
        Links { rates, devices: vec![Default::default(); devices], root: Default::default() }
    }

    /// Books `bytes` on a device's link: not before `submitted` and the latency, not before `after`, where the stream is.
    pub(crate) fn book(&mut self, device: usize, direction: Direction, bytes: u64, submitted: u64, after: u64) -> Span {
        let way = direction as usize;
        let from = (submitted + self.rates.latency_ns).max(after);
        let busy = (bytes as f64 / self.rates.link) as u64;
        let (start, mut end) = self.devices[device][way].book(submitted, from, busy);
        if let Some(rate) = self.rates.root {
            end = end.max(self.root[way].book(submitted, start, (bytes as f64 / rate) as u64).1);
        }
        Span { start, end, busy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_serves_one_copy_at_a_time_and_the_root_all_devices() {
        assert_eq!(Rates::parse("0.2"), Some(Rates { link: 0.2, latency_ns: 0, root: None }));
        assert_eq!(Rates::parse("x"), None);
        assert_eq!(Rates::parse("-1"), None);
        let mut links = Links::new(Rates::parse("2,5,root=3").unwrap(), 2);
        let span = |start, end| Span { start, end, busy: 3_000 };
        assert_eq!(links.book(0, Direction::In, 6_000, 10_000, 0), span(15_000, 18_000));
        // The same link: after the first, although it was submitted with it.
        assert_eq!(links.book(0, Direction::In, 6_000, 10_000, 0), span(18_000, 21_000));
        // The other way is free.
        assert_eq!(links.book(0, Direction::Out, 6_000, 10_000, 0), span(15_000, 18_000));
        // Another device waits for the root only, which is taken until 17 and from 18 to 20 thousand.
        assert_eq!(links.book(1, Direction::In, 6_000, 10_000, 0), span(15_000, 21_000));
        // What waits for something else leaves the link to those that do not.
        assert_eq!(links.book(0, Direction::Out, 6_000, 10_000, 30_000), span(30_000, 33_000));
        assert_eq!(links.book(0, Direction::Out, 6_000, 10_000, 0), span(18_000, 21_000));
    }
}
