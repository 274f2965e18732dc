//! What `doctor --json` measured, for `plan --doctor FILE` and `load --doctor FILE`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use shardlift::{CufileMeasurement, Direct, Error, ErrorKind, Result, limits};

/// Rates in GB/s, where they were measured.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Rates {
    /// Reads past the page cache.
    pub(crate) storage: Option<f64>,
    /// Copies to the slowest device, while all copy.
    pub(crate) link: Option<f64>,
    /// Reads through cuFile, beside those through memory of the host.
    pub(crate) cufile: Vec<CufileMeasurement>,
}

/// Reads the object that `doctor --json` printed.
pub(crate) fn measured(path: &Path) -> Result<Rates> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(limits::CONFIG_MAX).read_to_end(&mut text));
    read.map_err(|error| Error::io("cannot read rates", path, error))?;
    let object = serde_json::from_slice(&text).unwrap_or_default();
    rates(&object).ok_or_else(|| {
        Error::new(ErrorKind::Usage, "no rates in this file")
            .with_expected("what `doctor --json` printed", "something else")
            .with_file(path)
    })
}

fn rates(object: &Value) -> Option<Rates> {
    if object["command"] != "doctor" || object["ok"] != true {
        return None;
    }
    let devices = object["cuda"]["devices"].as_array().map_or(&[][..], Vec::as_slice);
    let links = devices
        .iter()
        .filter_map(|device| rate(&device["h2d_together_gb_per_s"]).or_else(|| rate(&device["h2d_gb_per_s"])));
    let storage = rate(&object["storage_gb_per_s"]);
    Some(Rates { storage, link: links.reduce(f64::min), cufile: cufile(&object["cufile"]) })
}

fn rate(value: &Value) -> Option<f64> {
    value.as_f64().filter(|rate| *rate > 0.0)
}

fn cufile(object: &Value) -> Vec<CufileMeasurement> {
    let direct = if object["direct"] == "known" { Direct::Known } else { Direct::Unknown };
    let measurement = |one: &Value| {
        Some(CufileMeasurement {
            file_system: one["file_system"].as_u64()?,
            gpu: one["gpu"].as_u64()?.try_into().ok()?,
            direct,
            cufile_gb_per_s: rate(&one["cufile_gb_per_s"])?,
            staged_gb_per_s: rate(&one["staged_gb_per_s"])?,
        })
    };
    let measured = object["measured"].as_array().map_or(&[][..], Vec::as_slice);
    measured.iter().filter_map(measurement).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_slowest_link_counts() {
        let device =
            |alone: Value, together: Value| json!({ "h2d_gb_per_s": alone, "h2d_together_gb_per_s": together });
        let devices =
            [device(json!(25.0), json!(12.5)), device(json!(11.0), Value::Null), device(json!(26), json!(13))];
        let doctor =
            json!({ "command": "doctor", "ok": true, "storage_gb_per_s": 6.5, "cuda": { "devices": devices } });
        assert_eq!(rates(&doctor), Some(Rates { storage: Some(6.5), link: Some(11.0), cufile: Vec::new() }));
        let bare = json!({ "command": "doctor", "ok": true, "storage_gb_per_s": null });
        assert_eq!(rates(&bare), Some(Rates::default()));
        assert_eq!(rates(&json!({ "command": "load", "ok": true })), None);
        assert_eq!(rates(&Value::Null), None);
    }

    #[test]
    fn every_gpu_has_a_measurement_of_its_own() {
        let one = |gpu: u32, rate: f64| json!({ "gpu": gpu, "file_system": 2049, "cufile_gb_per_s": rate, "staged_gb_per_s": 5 });
        let doctor = |direct| {
            let cufile = json!({ "direct": direct, "measured": [one(0, 6.0), one(3, 4.0), { "gpu": 5 }] });
            rates(&json!({ "command": "doctor", "ok": true, "cufile": cufile })).unwrap().cufile
        };
        let expected = |gpu, direct, rate| CufileMeasurement {
            file_system: 2049,
            gpu,
            direct,
            cufile_gb_per_s: rate,
            staged_gb_per_s: 5.0,
        };
        for (name, direct) in [("known", Direct::Known), ("unknown", Direct::Unknown)] {
            assert_eq!(doctor(name), [expected(0, direct, 6.0), expected(3, direct, 4.0)]);
        }
    }
}
