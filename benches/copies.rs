//! What copies to a GPU cost, one kind at a time: the figures behind `limits::COPY_COSTS`. Needs a GPU.
//!
//! `cargo bench --bench copies -- [GPU]` prints them beside the figures that the loader decides with.

fn main() {
    let gpu = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(0);
    measure(gpu);
}

#[cfg(feature = "cuda")]
#[expect(clippy::print_stdout, reason = "a bench prints its figures")]
fn measure(gpu: u32) {
    use shardlift::device::{CopyMeasurements, copy_measurements};
    use shardlift::limits::{COPY_COSTS, CopyCosts};

    let CopyMeasurements { link_gb_per_s, call_ns, rows, kernel_gb_per_s, .. } = match copy_measurements(gpu) {
        Ok(measured) => measured,
        Err(error) => {
            println!("SKIPPED: {error}");
            return;
        }
    };
    let CopyCosts { link_gb_per_s: link, row_ns, call_ns: call, kernel_gb_per_s: kernel, .. } = COPY_COSTS;
    println!("long copies: {link_gb_per_s:.1} GB/s (decided with {link})");
    println!("copies of 4 KiB: {call_ns:.0} ns each (decided with {call})");
    println!("cut by a kernel: {kernel_gb_per_s:.0} GB/s (decided with {kernel})");
    for (width, rate) in rows {
        println!("rows of {width} bytes: {rate:.2} GB/s, {:.1} ns each (decided with {row_ns})", width as f64 / rate);
    }
}

#[cfg(not(feature = "cuda"))]
#[expect(clippy::print_stdout, reason = "a skipped bench says so")]
fn measure(_: u32) {
    println!("SKIPPED: not in this build");
}
