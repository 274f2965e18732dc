//! The GPUs of this machine, for `doctor`.

use serde_json::{Value, json};

use crate::output::Output;

#[cfg(feature = "cuda")]
pub(super) use with_cuda::{look, object, print, usable};
#[cfg(not(feature = "cuda"))]
pub(super) use without::{look, object, print, usable};

#[cfg(feature = "cuda")]
mod with_cuda {
    use shardlift::device::{CudaFacts, CudaMachine, cuda_machine, pinned_gb_per_s};

    use super::{Output, Value, json};
    use crate::output::human_bytes;

    /// What there is, and what the links to it carry.
    pub(in super::super) struct Gpus {
        machine: CudaMachine,
        /// For each GPU alone, then for all at once.
        alone: Vec<Result<f64, String>>,
        together: Result<Vec<f64>, String>,
    }

    pub(in super::super) fn look() -> Result<Gpus, String> {
        let machine = cuda_machine().map_err(|error| error.to_string())?;
        if machine.devices.is_empty() {
            return Err("no GPU".into());
        }
        let all: Vec<u32> = machine.devices.iter().map(|device| device.ordinal).collect();
        let rate = |gpus: &[u32]| pinned_gb_per_s(gpus).map_err(|error| error.to_string());
        let alone = all.iter().map(|&gpu| rate(&[gpu]).map(|rates| rates[0])).collect();
        Ok(Gpus { alone, together: rate(&all), machine })
    }

    /// The GPUs that work, at least one.
    pub(in super::super) fn usable(gpus: &Result<Gpus, String>) -> Result<Vec<u32>, String> {
        let gpus = gpus.as_ref().map_err(Clone::clone)?;
        let all = gpus.machine.devices.iter().zip(&gpus.alone);
        let usable: Vec<u32> = all.filter(|(_, rate)| rate.is_ok()).map(|(device, _)| device.ordinal).collect();
        if usable.is_empty() { Err("no GPU works".into()) } else { Ok(usable) }
    }

    pub(in super::super) fn print(gpus: &Result<Gpus, String>, output: &mut Output) {
        let Gpus { machine, alone, together } = match gpus {
            Ok(gpus) => gpus,
            Err(why) => return output.line(format_args!("cuda: not usable: {why}")),
        };
        let (major, minor) = machine.driver_version;
        output.line(format_args!("cuda: driver for CUDA {major}.{minor} and older"));
        for (device, rate) in machine.devices.iter().zip(alone) {
            let CudaFacts { ordinal, name, total_bytes, pci_bus_id, .. } = device;
            output.line(format_args!("cuda:{ordinal}: {name}, {}, {pci_bus_id}", human_bytes(*total_bytes)));
            if let Some(link) = &device.pcie {
                let (width, speed) = (link.width, &link.speed);
                output.line(format_args!("cuda:{ordinal}: link of {width} lanes at {speed}"));
            } else {
                output.line(format_args!("cuda:{ordinal}: link: the system does not say"));
            }
            match device.numa_node {
                Some(node) => output.line(format_args!("cuda:{ordinal}: near NUMA node {node}")),
                None => output.line(format_args!("cuda:{ordinal}: NUMA node: one for all, or the system does not say")),
            }
            match rate {
                Ok(rate) => output.line(format_args!("cuda:{ordinal}: {rate:.1} GB/s from pinned memory")),
                Err(why) => output.line(format_args!("cuda:{ordinal}: not usable: {why}")),
            }
            let mapping = mapping(device);
            output.line(format_args!("cuda:{ordinal}: copies from mappings of files: {mapping}"));
            if !device.peers.is_empty() {
                let peers: Vec<String> = device.peers.iter().map(ToString::to_string).collect();
                output.line(format_args!("cuda:{ordinal}: reaches the memory of {}", peers.join(", ")));
            }
        }
        match together {
            Ok(rates) => {
                let sum: f64 = rates.iter().sum();
                output.line(format_args!("all at once: {sum:.1} GB/s from pinned memory"));
            }
            Err(why) => output.line(format_args!("all at once: not measured: {why}")),
        }
    }

    pub(in super::super) fn object(gpus: &Result<Gpus, String>) -> Value {
        let Gpus { machine, alone, together } = match gpus {
            Ok(gpus) => gpus,
            Err(why) => return json!({ "usable": false, "why": why, "driver_version": null, "devices": [] }),
        };
        let (major, minor) = machine.driver_version;
        let rates = together.as_ref().ok();
        let device = |(at, device): (usize, &CudaFacts)| {
            let (cc_major, cc_minor) = device.compute_capability;
            let pcie = device.pcie.as_ref().map(|link| {
                json!({ "width": link.width, "speed": link.speed, "max_width": link.max_width, "max_speed": link.max_speed })
            });
            json!({
                "ordinal": device.ordinal,
                "name": device.name,
                "memory_bytes": device.total_bytes,
                "compute_capability": format!("{cc_major}.{cc_minor}"),
                "pci_bus_id": device.pci_bus_id,
                "pcie": pcie,
                "numa_node": device.numa_node,
                "peers": device.peers,
                "exportable_memory": device.exportable_memory,
                "registered_mappings": mapping_object(device),
                "h2d_gb_per_s": alone[at].as_ref().ok(),
                "h2d_together_gb_per_s": rates.map(|rates| rates[at]),
                "why": alone[at].as_ref().err(),
            })
        };
        json!({
            "usable": true,
            "why": null,
            "driver_version": format!("{major}.{minor}"),
            "devices": machine.devices.iter().enumerate().map(device).collect::<Vec<_>>(),
        })
    }

    fn mapping(device: &CudaFacts) -> &'static str {
        match (device.host_page_tables, device.registers_read_only) {
            (true, _) => "usable, through the host's page tables",
            (false, true) => "usable, registered",
            (false, false) => "not usable: the driver registers no read-only memory",
        }
    }

    fn mapping_object(device: &CudaFacts) -> Value {
        let usable = device.host_page_tables || device.registers_read_only;
        json!({ "usable": usable, "why": (!usable).then_some("the driver registers no read-only memory") })
    }
}

#[cfg(not(feature = "cuda"))]
mod without {
    use super::{Output, Value, json};

    const WHY: &str = "not in this build";

    pub(in super::super) fn look() -> Result<(), String> {
        Err(WHY.into())
    }

    pub(in super::super) fn usable(_: &Result<(), String>) -> Result<Vec<u32>, String> {
        Err(WHY.into())
    }

    pub(in super::super) fn print(_: &Result<(), String>, output: &mut Output) {
        output.line(format_args!("cuda: {WHY}"));
    }

    pub(in super::super) fn object(_: &Result<(), String>) -> Value {
        json!({ "usable": false, "why": WHY, "driver_version": null, "devices": [] })
    }
}
