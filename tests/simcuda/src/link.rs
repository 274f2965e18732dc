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
}

/// The links of all devices: until when each is taken.
pub(crate) struct Links {
    rates: Rates,
    devices: Vec<[u64; 2]>,
    root: [u64; 2],
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
        Links { rates, devices: vec![[0; 2]; devices], root: [0; 2] }
    }

    /// Books `bytes` on a device's link: not before `submitted` and the latency, not before `after`, where the stream is.
    pub(crate) fn book(&mut self, device: usize, direction: Direction, bytes: u64, submitted: u64, after: u64) -> Span {
        let way = direction as usize;
        let start = (submitted + self.rates.latency_ns).max(after).max(self.devices[device][way]);
        let mut end = start + (bytes as f64 / self.rates.link) as u64;
        if let Some(rate) = self.rates.root {
            let taken = self.root[way].max(start) + (bytes as f64 / rate) as u64;
            self.root[way] = taken;
            end = end.max(taken);
        }
        self.devices[device][way] = end;
        Span { start, end }
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
        let first = links.book(0, Direction::In, 6_000, 10_000, 0);
        assert_eq!(first, Span { start: 15_000, end: 18_000 });
        // The same link: after the first, although it was submitted with it.
        assert_eq!(links.book(0, Direction::In, 6_000, 10_000, 0), Span { start: 18_000, end: 21_000 });
        // The other way is free.
        assert_eq!(links.book(0, Direction::Out, 6_000, 10_000, 0), Span { start: 15_000, end: 18_000 });
        // Another device waits for the root only: 2000 ns for each of three.
        assert_eq!(links.book(1, Direction::In, 6_000, 10_000, 0), Span { start: 15_000, end: 22_000 });
    }
}
