//! The cases that a planner must get right, with numbers worked out by hand from what engines do with released models:
//! through the command line, over headers without data. Conventions of engines that are no target are written as rules.
#![cfg(feature = "cli")]

mod support {
    pub(crate) mod acceptance;
    pub(crate) mod released;
}

use support::acceptance::{check, dense, experts, fused, quantised, refusals};

#[test]
fn linear_layers() {
    check(dense::linear());
}

#[test]
fn biases_that_are_added_once() {
    check(dense::biases());
}

#[test]
fn vocabularies() {
    check(dense::vocabularies());
}

#[test]
fn tied_heads_adapters_and_partitions() {
    check(dense::others());
}

#[test]
fn inputs_before_outputs() {
    check(dense::transposed());
}

#[test]
fn fused_tensors() {
    check(fused::cases());
}

#[test]
fn gated_heads_and_linear_attention() {
    check(fused::qwen3_next());
}

#[test]
fn experts_of_their_own() {
    check(experts::separate());
}

#[test]
fn flat_and_stacked_experts() {
    check(experts::flat_and_stacked());
}

#[test]
fn gpt_oss() {
    check(experts::gpt_oss_rules());
}

#[test]
fn which_experts_a_rank_has() {
    check(experts::placed());
}

#[test]
fn blocks_of_fp8() {
    check(quantised::fp8_blocks());
}

#[test]
fn packed_layouts() {
    check(quantised::packed());
}

#[test]
fn refusals() {
    check(refusals::cases());
}
