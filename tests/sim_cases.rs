//! On the driver twin: what tests/gpu.rs asks of hardware. Where the two disagree, the twin is wrong.
#![cfg(feature = "cuda")]

#[path = "support/cufile_twin.rs"]
mod cufile_twin;
#[path = "support/gpu_cases.rs"]
mod gpu_cases;
#[path = "support/nccl_twin.rs"]
mod nccl_twin;
#[path = "support/twin.rs"]
mod twin;

fn the_twin_is_loaded() -> bool {
    twin::load();
    nccl_twin::load();
    cufile_twin::load();
    gpu_cases::driver::init().unwrap();
    true
}

gpu_cases::test_every_case!(the_twin_is_loaded);

#[test]
fn nothing_of_a_load_is_left_with_the_driver() {
    let _alone = gpu_cases::alone();
    assert!(the_twin_is_loaded());
    let before = twin::live();
    gpu_cases::gpu_loads::loads_of_one_loader_run_at_the_same_time();
    gpu_cases::gpu_loads::other_values_are_loaded_into_the_memory_of_weights();
    gpu_cases::gpu_loads::a_cancelled_load_ends_and_the_next_one_is_whole();
    gpu_cases::gpu_loads::cufile_is_bit_exact_where_it_reads();
    assert_eq!((twin::live(), twin::violations()), (before, 0));
    assert_eq!((cufile_twin::live(), cufile_twin::violations()), (0, 0));
}
