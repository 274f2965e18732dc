#![no_main]

#[expect(dead_code, reason = "a target uses one of the bodies")]
#[path = "../bodies.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|input: &[u8]| bodies::header(input));
