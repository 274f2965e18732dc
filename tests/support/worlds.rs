//! The same ranks on every kind of device: host memory, host memory behind a queue, and GPUs of the driver twin.

use shardlift::World;

/// GPUs that the twin has unless it is told otherwise.
const GPUS: u32 = 4;

/// This many ranks on every kind of device.
pub(crate) fn of(ranks: u32) -> [World; 3] {
    twins::cuda::load();
    [World::host(ranks), World::host_staged(ranks), World::local((0..ranks).map(|rank| rank % GPUS))]
}
