//! Every default and every bound, each with its reason.
//!
//! Sizes are bytes unless the name says otherwise. A figure that a bench chose names the bench; the measurements are
//! in `docs/performance.md`.

use std::time::Duration;

/// Largest header that is accepted: the limit of the reference implementation (safetensors 0.8.0,
/// `MAX_HEADER_SIZE`).
pub const HEADER_MAX: u64 = 100_000_000;

/// Bytes of the first read of a file: the header of most is smaller, and it costs no more than a page.
pub const HEADER_FIRST_READ: u64 = 64 << 10;

/// Deepest JSON nesting that is accepted: serde_json's own recursion limit. A header needs 3 levels.
pub const JSON_DEPTH: usize = 128;

/// Largest index that is accepted: one of 92,000 tensors takes 10 MB.
pub const INDEX_MAX: u64 = 100_000_000;

/// Largest configuration that is accepted, a model's or an adapter's: one that lists each of the 45,000 linear layers of
/// DeepSeek-V3 takes 3 MB. As a tree of values it may take nearly a hundred times as much memory.
pub const CONFIG_MAX: u64 = 4 << 20;

/// Largest rules file, or file of a split, that is accepted: a rule for each of 92,000 tensors takes 10 MB.
pub const RULES_MAX: u64 = 16 << 20;

/// Most expressions that one rules file makes, those of `each` counted as often as they are: three tensors with three
/// operations each of 256 experts, in 100 layers that all differ.
pub const EXPRESSIONS_MAX: usize = 1 << 18;

/// Deepest nesting of expressions in a rules file, a step counted as one; each level takes some stack. Those of known
/// models need fewer than 10.
pub const EXPRESSION_DEPTH: usize = 64;

/// Most parts of destinations that rules have several of, those of all tensors that they match together: ten times what
/// DeepSeek-V3 has of experts, with their scales. So many take 4 seconds for one rank and 20 for 8, and a short file could
/// ask for ten thousand times as many.
pub const PARTS_MAX: u64 = 1 << 20;

/// Most threads that read headers at once: beyond this storage answers no faster.
pub const HEADER_THREADS_MAX: usize = 32;

/// Staging memory of one [`Loader`](crate::Loader), shared by its loads: half of what the strongest rival pins, and
/// enough for 64 slots in flight.
pub const STAGING: usize = 256 << 20;

/// Smallest staging budget: two slots of the smallest size, so that a read and a copy can overlap.
pub const STAGING_MIN: usize = 2 << 20;

/// NUMA nodes that staging memory can be asked to lie on: the most that Linux can be built for.
#[cfg(target_os = "linux")]
pub(crate) const NUMA_NODES: usize = 1024;

/// Start of each tensor in a block. 256 bytes is what `cuMemAlloc` guarantees.
pub const TENSOR_ALIGNMENT: u64 = 256;

/// Largest block of destination memory: large enough to need few allocations, small enough to find room for.
pub const BLOCK_MAX: u64 = 1 << 30;

/// What O_DIRECT reads start and end on: the page size, a multiple of every logical block size in use. A file that asks
/// for more (statx says) is read through the page cache.
pub const DIRECT_ALIGNMENT: u64 = 4096;

/// What any read costs, however short, in bytes that the storage could have moved instead: its bandwidth over the reads
/// that it answers per second. Between the 6 and 8 KB of fast NVMe (6 GB/s and 1 million reads per second, 12 GB/s and
/// 1.5 million) and the 40 KB of a slow one (12 GB/s, 0.3 million); all from sharding.md 13.
pub const READ_COST: u64 = 16 << 10;

/// What a read of so many bytes costs beside others, in bytes that the storage could have moved instead: the parts of
/// pages at both its ends are read, too, one page together in the mean.
pub const fn read_cost(bytes: u64) -> u64 {
    let paged = bytes.saturating_add(DIRECT_ALIGNMENT);
    if paged > READ_COST { paged } else { READ_COST }
}

/// Whether `gap` unneeded bytes before `next` needed ones are skipped rather than read: the decision rule of sharding.md
/// 13, by which pieces of `next` bytes every `gap + next` are read one by one where that costs less than all of it. What
/// repeats within a page never is.
pub const fn is_skipped(gap: u64, next: u64) -> bool {
    read_cost(next) < gap.saturating_add(next)
}

/// Fewest bytes of storage that reading together has to save in all before ranks do: setting up communicators takes about as
/// long as reading so many.
pub const COOPERATE_MIN: u64 = 256 << 20;

/// What passing on bytes between GPUs costs, in bytes that the storage could have moved instead: storage of 6 GB/s beside
/// peers that exchange 24 GB/s over PCIe 4. Over NVLink it is less.
pub const fn exchange_cost(bytes: u64) -> u64 {
    bytes / 4
}

/// Smallest stripe of a tensor that several ranks read together: below it one of them reads the whole.
pub const STRIPE_MIN: u64 = 1 << 20;

/// Device memory in which a rank exchanges bytes with others: for each of [`EXCHANGE_ROUNDS`] a chunk that it sends, and one
/// from everybody else. Ranks are given smaller chunks to stay within it, but for [`EXCHANGE_CHUNK_MIN`].
pub const EXCHANGE: u64 = 256 << 20;

/// Largest chunk of such a round: half a slot of the staging ring for GPUs.
pub const EXCHANGE_CHUNK: u64 = 8 << 20;

/// Smallest: with less, starting an exchange costs more than its bytes.
pub const EXCHANGE_CHUNK_MIN: u64 = 64 << 10;

/// Rounds of an exchange that are under way at a time: while one travels the next lands on the device and the one before
/// is put in place.
pub const EXCHANGE_ROUNDS: usize = 4;

/// Most strided loops of a copy descriptor (design invariant 4).
pub const LOOPS_MAX: usize = 5;

/// Smallest block of FP8 that scales are repeated for: as vLLM, whose kernels know no smaller ones.
pub const REFINED_BLOCK_MIN: u64 = 32;

/// Most ranks of a world. The largest deployments of one model are a few thousand ranks, and a plan holds a few hundred
/// bytes for each destination of each of them.
pub const RANKS_MAX: u32 = 8192;

/// Divisors that an error lists where one was expected: most counts of heads, blocks and experts have fewer, and more
/// would hide the rest of the message.
pub const DIVISORS_SHOWN: usize = 16;

/// Most ranges of numbers that a line about layers or experts shows: more do not fit a line.
pub const SPANS_SHOWN: usize = 4;

/// Most spelled-out alternatives of one pattern of the rules: each is tried against each name.
pub const PATTERN_FORMS: usize = 256;

/// Deepest nesting of alternatives in a pattern; each level takes some stack.
pub const PATTERN_DEPTH: usize = 32;

/// Copies that a descriptor deeper than [`LOOPS_MAX`] may be unrolled into (design invariant 4).
pub const UNROLL_MAX: u64 = 4096;

/// A read without progress for this long is reported as a warning that names the file.
pub const STALL_WARNING: Duration = Duration::from_secs(5);

/// A read without progress for this long fails the load. Network file systems recover within a minute or not at all.
pub const STALL_ERROR: Duration = Duration::from_secs(60);

/// Largest staging slot of loads into host memory. A slot is what one read fills.
pub const SLOT: usize = 4 << 20;

/// Largest staging slot of loads into GPUs. A slot is what one read fills and one event guards: calls of the driver for
/// each of them should be few (`benches/pipeline.rs`).
pub const DEVICE_SLOT: usize = 16 << 20;

/// How many of these a staging budget should make, so that reads, copies and what waits between them overlap.
pub const DEVICE_SLOTS: usize = 16;

/// Most bytes of a read that lands straight in host memory. Chosen by `benches/engines.rs` (`--sweep chunk`): from here on
/// larger ones gain no more than runs differ, and more reads share the work at the end.
pub const DIRECT_CHUNK: u64 = 2 << 20;

/// Most bytes of a read that is cut on its way to host memory: it should still be in the L2 cache when it is cut.
/// Chosen by `benches/throughput.rs`.
pub const CUT_CHUNK: u64 = 512 << 10;

/// Shortest run, and fewest bytes of a copy, that are written past the processor's caches: what a load copies is not looked
/// at soon, but of shorter runs too many lines are written in part. Chosen by `benches/throughput.rs`.
pub const STREAM_RUN: u64 = 512;
/// See [`STREAM_RUN`].
pub const STREAM_MIN: u64 = 32 << 10;

/// Most bytes of short runs that are gathered for one write of a rank's output file: beyond this a system call costs
/// little beside its bytes, and a hundred ranks must not take more than a few MiB.
pub const WRITE_GATHER: usize = 64 << 10;

/// Temporary names beside an output that are tried before giving up: each one taken is a leftover of a killed process.
pub const TEMPORARY_NAMES: u32 = 10_000;

/// Symbolic links that are followed one by one from a name to its file: the bound of Linux.
pub const LINKS_MAX: usize = 40;

/// Smallest read that lands straight in a destination; below this one larger read and a copy are cheaper.
pub const DIRECT_MIN: u64 = 64 << 10;

/// Files that a load keeps open at most, besides those that its reads use at the moment: with a second descriptor each
/// for O_DIRECT, an eighth of the usual limit of 1024.
pub const OPEN_FILES: usize = 64;

/// Bytes of a file that one thread of a check holds: enough that a read costs more than its call.
pub const CHECK_WINDOW: u64 = 1 << 20;

/// Bytes of a permuted tensor that one thread of a check puts in order at once: enough that what it reads for them in
/// one piece is worth the call, a kilobyte for each of 16,000 rows.
pub const CHECK_BAND: u64 = 16 << 20;

/// Fewest threads that read: two keep the storage busy while one of them copies. Chosen by `benches/engines.rs` (`--sweep
/// threads`): one alone has half of their speed, warm and cold.
pub const READ_THREADS_MIN: usize = 2;

/// Most threads that read: above this, storage of one machine gains nothing.
pub const READ_THREADS_MAX: usize = 16;

/// How often the supervisor of a load looks for stalled reads and samples memory.
pub const SUPERVISE_EVERY: Duration = Duration::from_millis(50);

/// How long a thread that waits for a slot, or for work, sleeps before it looks again: a lost wake-up costs this much.
pub const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Soonest that a thread wakes to ask which of the copies in flight are done, while somebody waits for slots: they are
/// needed back in time, not one by one, and each wake costs as much as all else that is done for one.
pub const COPY_POLL: Duration = Duration::from_millis(1);

/// Latest that it does then.
pub const COPY_POLL_MAX: Duration = Duration::from_millis(20);

/// How often it asks while there are slots, and whoever submits asks too: what a tensor may be handed out later than it
/// lands.
pub const COPY_TICK: Duration = Duration::from_millis(50);

/// Into how many groups the slots of a load are divided, each of which comes back with one event of a device: recording
/// and asking cost a call of the driver each, and while one group comes back the others are under way.
pub const GROUPS: usize = 4;

/// Most slots of such a group: with more, calls other than these are nearly all that there are.
pub const GROUP_MAX: usize = 4;

/// How soon a throttled read notices that its load was stopped.
pub const THROTTLE_SLEEP: Duration = Duration::from_millis(10);

/// How much lateness of its threads a throttled engine makes up for: several turns of a busy machine's scheduler.
pub const THROTTLE_CREDIT: Duration = Duration::from_millis(50);

/// Reads in flight of one io_uring: with half a megabyte each, 4 to 16 make no difference on two threads, and more are
/// slower. Chosen by `benches/engines.rs` (`--sweep depth`).
pub const URING_DEPTH: u32 = 8;

/// Most reads in flight of one io_uring: the kernel has no larger rings (`IORING_MAX_ENTRIES`).
pub const URING_DEPTH_MAX: u32 = 32_768;

/// Most slots that one io_uring registers: a table of this size costs a page, and more slots are never in flight.
pub const URING_SLOTS: u16 = 1024;

/// How long a thread waits whose io_uring took no more reads for now.
pub const URING_BUSY: Duration = Duration::from_millis(1);

/// Most threads with a ring of their own: beyond it, completions are handled faster than storage produces them. Four are no
/// faster than two (`benches/engines.rs --sweep depth`, on two cores).
pub const URING_THREADS_MAX: usize = 4;

/// `auto` reads less than this through the page cache whatever the storage: setting up rings would take as long.
pub const AUTO_SMALL: u64 = 64 << 20;

/// `auto` reads through the page cache if it holds at least this share of the files: copying what is there beats
/// reading it again, five times over on a disk of 2 GB/s (`benches/engines.rs`).
pub const AUTO_RESIDENT: f64 = 0.5;

/// How many files `auto` looks at.
pub const AUTO_FILES: usize = 8;

/// Most events of a [`Trace`](crate::observe::Trace): three for each read of 150 GB in pieces of [`CUT_CHUNK`], or 50 MB
/// of memory.
pub const TRACE_EVENTS: usize = 1 << 20;

/// Events that a thread gets room for at once: 12 KiB, which costs little beside recording so many.
pub const TRACE_CHUNK: usize = 256;

/// Shortest wait for a lock, or for what may be there already, that is a wait in a trace.
pub const TRACE_WAIT_MIN: Duration = Duration::from_micros(1);

/// Memory that holds a value many times, for places of destinations that no tensor fills: few copies, and in the cache.
pub const FILL_BYTES: usize = 256 << 10;

/// What memory of a GPU is taken in multiples of: the granularity of mapped memory and of its pool.
pub const DEVICE_GRANULARITY: u64 = 2 << 20;

/// Rows narrower than this may be cut by a kernel rather than copied as rows: then it should be ready.
pub const NARROW_ROW: u64 = 512;

/// Streams of one device: while a kernel of one puts bytes in place, the other copies.
pub const STREAMS: usize = 2;

/// Soonest that a thread which has nothing but a device to wait for asks again: less than what a slot takes on a link.
pub const EVENT_POLL: Duration = Duration::from_micros(200);

/// How long a device that answers nothing but errors is given to stop copying before its slots are used again: its
/// driver has ended what was queued before it says so, and this is for what was under way.
pub const LOST_DEVICE: Duration = Duration::from_millis(20);

/// How often a stream is asked in a row whether it is done before its asker sleeps: a digest of a small tensor is over in
/// the time of a few calls, and a sleep takes ten times as long.
pub const ASK_AT_ONCE: u32 = 16;

/// Pinned memory of a GPU's context through which bytes come back: they pass it in pieces, each of which takes longer than
/// asking for it.
pub const RETURN_BYTES: usize = 1 << 20;

/// Oldest driver that takes our kernels' PTX 8.0, as `cuDriverGetVersion` has it: CUDA 12.0.
pub const DRIVER_MIN: i32 = 12_000;

/// Oldest NCCL with communicators whose calls do not block, as `ncclGetVersion` has it: 2.14.
pub const NCCL_MIN: i32 = 21_400;

/// How soon a call of NCCL is first asked for how it went, twice as late each time: most are done then.
pub const NCCL_POLL_FIRST: Duration = Duration::from_micros(20);

/// How often it is asked at last: far less than what ranks take to meet, and than what a failure may take to be heard of.
pub const NCCL_POLL: Duration = Duration::from_millis(5);

/// How long `ncclCommAbort` is waited for: less than the 5 seconds within which a failure is to be heard of. It takes
/// milliseconds, but has been seen to hang where a driver or a network was broken.
pub const NCCL_ABORT: Duration = Duration::from_secs(2);

/// After how long a thread that was about to call `ncclGroupEnd` is in it, where it may be aborted: far longer than a
/// scheduler takes, and far less than what an abort waits for.
pub const NCCL_ENTERED: Duration = Duration::from_millis(200);

/// Slots that are pinned before the first read: enough to begin with while others are pinned.
pub const FIRST_SLOTS: usize = 2;

/// Widest pitch of a 2-D copy: what drivers report as the attribute MAX_PITCH.
pub const PITCH_MAX: u64 = i32::MAX as u64;

/// Most 2-D copies that one piece is unrolled into before a kernel cuts it instead: each costs a call.
pub const RECTS_MAX: u64 = 16;

/// Bytes of the widest access of a kernel; scratch memory starts on more.
pub const KERNEL_ACCESS: usize = 16;

/// How long ranks wait for each other to arrive: a scheduler starts the processes of a job within minutes, and what is
/// later than that does not come.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(300);

/// How long it takes at most until every rank knows that one failed, died or fell silent. Three fifths of it are waited for
/// a sign of life ([`silence`]), the rest is for telling and for giving up what is under way.
pub const FAIL_TIMEOUT: Duration = Duration::from_secs(5);

/// Shortest of these timeouts: below it a busy machine's scheduler looks like death.
pub const TIMEOUT_MIN: Duration = Duration::from_millis(500);

/// Longest of them: nobody waits longer, and sums with it are still moments of a clock.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);

/// How long nothing at all may come from a rank that lives.
pub const fn silence(fail_timeout: Duration) -> Duration {
    Duration::from_nanos((fail_timeout.as_nanos() as u64 / 5).saturating_mul(3))
}

/// How often a rank says that it lives: six times within the silence that would be its death, so that a few late turns of a
/// busy machine cost nothing. A beat is 5 bytes.
pub const fn beat_every(fail_timeout: Duration) -> Duration {
    Duration::from_nanos(fail_timeout.as_nanos() as u64 / 10)
}

/// How long somebody who connected, or a port that was tried, has to say the right thing: an exchange of two small packets,
/// with room for a packet that is sent again.
pub const HANDSHAKE: Duration = Duration::from_secs(2);

/// How soon a rank tries again to find rank 0, which may not have started yet.
pub const RENDEZVOUS_RETRY: Duration = Duration::from_millis(100);

/// Ports that rank 0 may listen on where no single one was named: several groups of one node find one each.
pub const RENDEZVOUS_PORTS: u16 = 16;

/// First port where the number of the job chooses: above those that Linux gives to outgoing connections.
pub const RENDEZVOUS_FIRST_PORT: u16 = 61_000;

/// Largest rendezvous file that is read: one line for each address of a machine.
pub const RENDEZVOUS_FILE_MAX: u64 = 64 << 10;

/// Longest name of a session.
pub const SESSION_MAX: usize = 256;

/// Longest text of a control message, such as an error's; more is cut.
pub const CONTROL_TEXT: usize = 4096;

/// Longest first message of whoever connects.
pub const HELLO_MAX: usize = 1024;

/// Connections that have not said who they are, beside one for each rank; of more the oldest is dropped.
pub const STRANGERS: usize = 64;

/// Files that rank 0 may open besides those of its group, at least where the system allows it: those of a checkpoint, a few of
/// each device, and what a program has itself.
pub const DESCRIPTORS_SPARE: u64 = 256;

/// Largest part of a rank in an exchange: digests, sizes and identities of some thousands of files.
pub const EXCHANGE_PART: usize = 1 << 20;

/// Most bytes of all parts together, which rank 0 sends to every rank.
pub const EXCHANGE_MAX: usize = 64 << 20;

/// How long a rank that leaves waits until the others have its last words.
pub const LEAVE: Duration = Duration::from_millis(500);

/// Most runs of ranks that an error lists as missing.
pub const MISSING_SHOWN: usize = 16;

/// Threads that read through cuFile: each waits for one read, and with slots of 16 MiB so many keep 128 MiB of storage's work
/// queued. An estimate until a machine with GPUDirect Storage measured it.
pub const CUFILE_THREADS: usize = 8;

/// By how much of the staged rate reading through cuFile must have been faster for `auto` to choose it: less than runs
/// differ is nothing.
pub const CUFILE_GAIN: f64 = 1.05;

/// What copies to a GPU cost, for the choice among ways that all work. `benches/copies.rs` measures them anew.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct CopyCosts {
    /// Bytes per nanosecond of the link to one device.
    pub link_gb_per_s: f64,
    /// Nanoseconds of the copy engine for each row of a 2-D copy: what bounds narrow ones.
    pub row_ns: f64,
    /// Nanoseconds of a call to the driver, and of the device to begin.
    pub call_ns: f64,
    /// Bytes per nanosecond that a kernel puts in place.
    pub kernel_gb_per_s: f64,
    /// Bytes per nanosecond that the reading threads together pack.
    pub pack_gb_per_s: f64,
    /// Nanoseconds for each row that they pack, divided by their number.
    pub pack_row_ns: f64,
}

/// The costs that [`CopyCosts`] stands for: a PCIe 4 x16 link (25 of its 31.5 GB/s), a copy engine that moves 80
/// million rows per second, and four threads that pack.
pub const COPY_COSTS: CopyCosts = CopyCosts {
    link_gb_per_s: 25.0,
    row_ns: 12.0,
    call_ns: 3000.0,
    kernel_gb_per_s: 500.0,
    pack_gb_per_s: 20.0,
    pack_row_ns: 2.0,
};

/// The same of copies within a GPU: nothing passes a link, and what a kernel cuts does not have to land before.
pub const DEVICE_COPY_COSTS: CopyCosts = CopyCosts { link_gb_per_s: 1000.0, ..COPY_COSTS };
