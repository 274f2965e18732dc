//! On the GPU of this machine: what tests/sim_cases.rs asks of its twin. Without one every test says so and passes, but
//! with `SHARDLIFT_REQUIRE_GPU=1`, which is for machines that are meant to have one, it fails.
#![cfg(feature = "cuda")]

#[path = "support/gpu_cases.rs"]
mod gpu_cases;

fn there_is_a_gpu() -> bool {
    let Err(why) = gpu_cases::driver::init() else { return true };
    #[expect(clippy::disallowed_methods, reason = "the machine's word on what it has")]
    let required = std::env::var_os("SHARDLIFT_REQUIRE_GPU").is_some_and(|value| value == "1");
    assert!(!required, "no GPU: {why}");
    gpu_cases::skip(&format!("no GPU: {why}"));
    false
}

gpu_cases::test_every_case!(there_is_a_gpu);
