//! Slurm's short hand: host lists such as `a[1-3,5],b07`, and counts per node such as `2(x3),1`.

/// The first host of a list; `None` if it is none.
pub(super) fn first(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.trim();
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        host.push_str(&rest[..end]);
        let Some(inside) = rest[end..].strip_prefix('[') else { break };
        let (numbers, after) = inside.split_once(']')?;
        let first = numbers.split([',', '-']).next().filter(|number| !number.is_empty())?;
        host.push_str(first);
        rest = after;
    }
    let is_name = |char: char| char.is_ascii_alphanumeric() || "-._:%".contains(char);
    (!host.is_empty() && host.chars().all(is_name)).then_some(host)
}

/// How many tasks the node of this number has; `None` if the text does not say.
pub(super) fn tasks_on(text: &str, node: u32) -> Option<u32> {
    let mut nodes = 0_u32;
    for part in text.split(',') {
        let (tasks, times) = match part.trim().split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (part.trim(), 1),
        };
        nodes = nodes.checked_add(times)?;
        if node < nodes {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list() {
        for (list, expected) in [
            ("node01", "node01"),
            ("node[01-03]", "node01"),
            ("a[1-3,5],b07", "a1"),
            ("a[007,9]", "a007"),
            ("b07,a[1-3]", "b07"),
            ("rack[2-3]node[04-07]-ib", "rack2node04-ib"),
            ("x[3]y,z", "x3y"),
            ("10.0.0.7,10.0.0.8", "10.0.0.7"),
        ] {
            assert_eq!(first(list).as_deref(), Some(expected), "{list}");
        }
        for bad in ["", ",a", "a[", "a[]", "a[1-3", "a b", "(null)", "a;b"] {
            assert_eq!(first(bad), None, "{bad}");
        }
    }

    #[test]
    fn tasks_of_each_node() {
        let of = |text, nodes| (0..nodes).map(|node| tasks_on(text, node)).collect::<Vec<_>>();
        assert_eq!(of("2(x2),1", 4), [Some(2), Some(2), Some(1), None]);
        assert_eq!(of("3", 2), [Some(3), None]);
        assert_eq!(of("4,2(x2)", 3), [Some(4), Some(2), Some(2)]);
        assert_eq!(of("2(x4294967295),1(x2)", 1), [Some(2)]);
        assert_eq!(tasks_on("2(x4294967295),1(x2)", u32::MAX), None);
        assert_eq!(of("2(y3)", 1), [None]);
        assert_eq!(of("", 1), [None]);
    }
}
