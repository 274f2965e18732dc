//! What there is to say about a machine's GPUs without using them: no context is created.

use std::fs;

use super::context;
use super::driver::{self, Attribute, RawDevice};
use crate::error::{Error, ErrorKind, Result};

/// The driver and the GPUs that it shows to this process.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CudaMachine {
    /// The newest CUDA version that the driver knows, for instance (12, 9).
    pub driver_version: (u32, u32),
    /// The GPUs, by number.
    pub devices: Vec<CudaFacts>,
}

/// One GPU.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CudaFacts {
    /// Its number, as in `cuda:0`.
    pub ordinal: u32,
    /// What its maker calls it.
    pub name: String,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// For instance (9, 0).
    pub compute_capability: (u32, u32),
    /// Where it is plugged in, as `0000:3b:00.0`.
    pub pci_bus_id: String,
    /// The link that it is reached over, where the system says.
    pub pcie: Option<PcieLink>,
    /// The NUMA node that it is nearest to, where the machine has several.
    pub numa_node: Option<u32>,
    /// The other GPUs whose memory it can reach directly.
    pub peers: Vec<u32>,
    /// Whether read-only host memory can be pinned: then a mapping of a file can be copied from directly.
    pub registers_read_only: bool,
    /// Whether it reads pageable host memory through the host's own page tables.
    pub host_page_tables: bool,
    /// Whether blocks of its memory can be exported to other processes.
    pub exportable_memory: bool,
}

/// A PCIe link, now and at best. An idle link may be slower than one in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PcieLink {
    /// Lanes.
    pub width: u32,
    /// The speed of each lane as the system words it, for instance `32.0 GT/s PCIe`.
    pub speed: String,
    /// Most lanes.
    pub max_width: u32,
    /// The highest speed.
    pub max_speed: String,
}

/// The driver and its GPUs.
///
/// # Errors
/// [`ErrorKind::Device`] if there is no driver, or it refuses.
pub fn cuda_machine() -> Result<CudaMachine> {
    let count = context::device_count()?;
    // SAFETY: the driver is loaded.
    let version = unsafe { driver::version() }.map_err(|failure| Error::new(ErrorKind::Device, failure.to_string()))?;
    // As the driver's header says: 1000 * major + 10 * minor.
    let driver_version = (version as u32 / 1000, version as u32 % 1000 / 10);
    let raw = (0..count).map(context::device).collect::<Result<Vec<_>>>()?;
    let devices = (0..count).map(|ordinal| facts(ordinal, &raw)).collect::<Result<Vec<_>>>()?;
    Ok(CudaMachine { driver_version, devices })
}

fn facts(ordinal: u32, all: &[RawDevice]) -> Result<CudaFacts> {
    let device = all[ordinal as usize];
    let located = |failure| context::error(ordinal, failure);
    // SAFETY: the driver is loaded and the device exists, here and below.
    let attribute = |attribute| unsafe { driver::attribute(device, attribute) }.map_err(located);
    let has = |which| attribute(which).is_ok_and(|value| value != 0);
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: as above.
    let pci_bus_id = unsafe { driver::pci_bus_id(device) }.map_err(located)?;
    let reaches = |&(_, &peer): &(u32, &RawDevice)| {
        // SAFETY: as above.
        peer != device && unsafe { driver::can_access_peer(device, peer) }.unwrap_or(false)
    };
    Ok(CudaFacts {
        ordinal,
        // SAFETY: as above.
        name: unsafe { driver::device_name(device) }.map_err(located)?,
        // SAFETY: as above.
        total_bytes: unsafe { driver::total_bytes(device) }.map_err(located)? as u64,
        compute_capability: (major as u32, minor as u32),
        pcie: pcie(&pci_bus_id),
        numa_node: numa_node(device),
        pci_bus_id,
        peers: (0..).zip(all).filter(reaches).map(|(peer, _)| peer).collect(),
        registers_read_only: has(Attribute::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED),
        host_page_tables: has(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES),
        exportable_memory: has(Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
            && has(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
    })
}

/// The NUMA node of a device; `None` where the system does not say, or has but one.
pub(super) fn numa_node(device: RawDevice) -> Option<u32> {
    if !fs::exists("/sys/devices/system/node/node1").unwrap_or(false) {
        return None;
    }
    // SAFETY: the driver is loaded and the device exists.
    let id = unsafe { driver::pci_bus_id(device) }.ok()?;
    // -1 where the system does not know.
    sysfs(&id, "numa_node")?.parse().ok()
}

fn pcie(id: &str) -> Option<PcieLink> {
    Some(PcieLink {
        width: sysfs(id, "current_link_width")?.parse().ok()?,
        speed: sysfs(id, "current_link_speed")?,
        max_width: sysfs(id, "max_link_width")?.parse().ok()?,
        max_speed: sysfs(id, "max_link_speed")?,
    })
}

fn sysfs(id: &str, what: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/bus/pci/devices/{}/{what}", id.to_ascii_lowercase())).ok()?;
    Some(text.trim().to_owned())
}
