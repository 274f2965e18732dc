//! On the driver twin: what tests/gpu.rs asks of hardware. Where the two disagree, the twin is wrong.
#![cfg(feature = "cuda")]

#[path = "support/gpu_cases.rs"]
mod gpu_cases;

fn the_twin_is_loaded() -> bool {
    twins::cuda::load();
    twins::nccl::load();
    twins::cufile::load();
    gpu_cases::driver::init().unwrap();
    true
}

gpu_cases::test_every_case!(the_twin_is_loaded);

#[test]
fn nothing_of_a_load_is_left_with_the_driver() {
    let _alone = gpu_cases::alone();
    assert!(the_twin_is_loaded());
    let before = twins::cuda::live();
    gpu_cases::gpu_loads::loads_of_one_loader_run_at_the_same_time();
    gpu_cases::gpu_loads::other_values_are_loaded_into_the_memory_of_weights();
    gpu_cases::gpu_loads::a_cancelled_load_ends_and_the_next_one_is_whole();
    gpu_cases::gpu_loads::cufile_is_bit_exact_where_it_reads();
    assert_eq!((twins::cuda::live(), twins::cuda::violations()), (before, 0));
    assert_eq!((twins::cufile::live(), twins::cufile::violations()), (0, 0));
}
