//! What must hold on GPUs as on their twin: one list of tests, for whichever driver there is.

#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "driver.rs"]
pub(crate) mod driver;
#[path = "gpu_driver.rs"]
pub(crate) mod gpu_driver;
#[path = "gpu_loads.rs"]
pub(crate) mod gpu_loads;
#[path = "transform.rs"]
mod transform;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One at a time: they count memory and contexts.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that something cannot be tested here.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// Says what was measured on the way, for whoever keeps it.
#[expect(clippy::print_stderr, reason = "scripts/gpu-check reads it")]
pub(crate) fn measured(name: &str, value: f64) {
    eprintln!("MEASURED: {name} {value:.1}");
}

/// A test for each case, which runs if `$ready()` is true.
macro_rules! test_every_case {
    ($ready:ident) => {
        gpu_cases::test_every_case! {
            $ready:
            gpu_driver: refusals_have_their_codes;
            gpu_driver: the_driver_knows_cuda_12;
            gpu_driver: primary_contexts_are_shared_and_counted;
            gpu_driver: host_memory_is_registered_once;
            gpu_driver: copies_from_registered_memory_are_under_way_until_the_event_says_otherwise;
            gpu_driver: streams_wait_for_events_of_others;
            gpu_driver: rows_are_copied_from_pitch_to_pitch;
            gpu_driver: allocations_take_free_memory;
            gpu_driver: memory_of_the_pool_is_there_in_the_order_of_its_stream;
            gpu_driver: virtual_memory_is_mapped_and_taken_apart;
            gpu_driver: mappings_of_files_are_registered_where_the_attribute_says_so;
            gpu_driver: every_kernel_is_in_the_module;
            gpu_driver: gathers_copy_each_run;
            gpu_driver: transpositions_swap_rows_and_columns;
            gpu_driver: casts_are_those_of_the_host;
            gpu_driver: digests_are_those_of_the_host;
            gpu_loads: the_facts_are_the_drivers;
            gpu_loads: every_engine_and_number_of_ranks_is_bit_exact;
            gpu_loads: cufile_is_bit_exact_where_it_reads;
            gpu_loads: digests_are_taken_where_the_bytes_are;
            gpu_loads: members_of_a_world_get_what_one_process_gives_them;
            gpu_loads: a_tensor_that_was_given_is_complete_for_every_stream;
            gpu_loads: destinations_may_be_memory_of_the_callers;
            gpu_loads: other_values_are_loaded_into_the_memory_of_weights;
            gpu_loads: too_little_memory_is_told_before_anything_moves;
            gpu_loads: a_device_that_is_not_there_is_an_error;
            gpu_loads: a_cancelled_load_ends_and_the_next_one_is_whole;
            gpu_loads: a_load_that_is_dropped_leaves_nothing_behind;
            gpu_loads: the_current_context_stays_what_it_was;
            gpu_loads: the_first_tensor_comes_before_the_load_is_over;
            gpu_loads: contexts_are_made_where_the_plan_needs_them_and_kept_until_released;
            gpu_loads: loads_of_one_loader_run_at_the_same_time;
            gpu_loads: nccl_passes_bytes_to_itself;
            gpu_loads: mappings_are_lent_in_windows_where_devices_can_copy_from_them;
        }
    };
    ($ready:ident: $($module:ident: $case:ident;)*) => {
        $(
            #[test]
            fn $case() {
                let _alone = gpu_cases::alone();
                if $ready() {
                    gpu_cases::$module::$case();
                }
            }
        )*
    };
}
pub(crate) use test_every_case;
