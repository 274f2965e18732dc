// The kernels of the library, compiled for the host, and what runs their threads.

// Fortified longjmp takes a jump to another stack for an overflow.
#undef _FORTIFY_SOURCE

#include "cuda_shim.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <ucontext.h>
#include <vector>

#include "../../../kernels/shardlift.cu"

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

[[noreturn]] void violation(const char *what) {
    std::fprintf(stderr, "simcuda: VIOLATION: %s\n", what);
    std::abort();
}

// The threads of one block, each on its own stack. A fiber starts through its ucontext; from then on setjmp switches,
// which unlike swapcontext makes no system call.
class Block {
  public:
    // Runs the threads until all have returned.
    void run(uint32_t threads, void (*thread)(void *), void *context) {
        while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
        thread_ = thread;
        context_ = context;
        running_ = this;
        for (uint32_t i = 0; i < threads; i++) fibers_[i]->state = Fiber::Fresh;
        for (uint32_t returned = 0; returned < threads;) {
            returned = 0;
            for (uint32_t i = 0; i < threads; i++) {
                current_ = fibers_[i].get();
                threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
                resume();
                returned += current_->state == Fiber::Returned;
            }
            if (returned != 0 && returned != threads) violation("a thread returned where others call __syncthreads");
        }
        running_ = nullptr;
    }

    // Called on a fiber: goes on when all the others have come as far.
    static void sync() {
        if (running_ == nullptr) violation("__syncthreads in a kernel that is not registered with BLOCK_KERNEL");
        running_->suspend();
    }

  private:
    struct Fiber {
        enum State { Fresh, Waiting, Returned } state = Fresh;
        ucontext_t start;
        jmp_buf jump;
        std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    };

    void resume() {
        if (_setjmp(scheduler_) != 0) return;
        if (current_->state == Fiber::Waiting) _longjmp(current_->jump, 1);
        getcontext(&current_->start);
        current_->start.uc_stack.ss_sp = current_->stack.get();
        current_->start.uc_stack.ss_size = STACK_BYTES;
        current_->start.uc_link = nullptr;
        makecontext(&current_->start, begin, 0);
        setcontext(&current_->start);
    }

    void suspend() {
        current_->state = Fiber::Waiting;
        if (_setjmp(current_->jump) == 0) _longjmp(scheduler_, 1);
    }

    static void begin() {
        Block *block = running_;
        block->thread_(block->context_);
        block->current_->state = Fiber::Returned;
        _longjmp(block->scheduler_, 1);
    }

    static constexpr size_t STACK_BYTES = 64 << 10;
    static thread_local Block *running_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    Fiber *current_ = nullptr;
    void (*thread_)(void *) = nullptr;
    void *context_ = nullptr;
    jmp_buf scheduler_;
};

thread_local Block *Block::running_ = nullptr;

} // namespace

void __syncthreads() { Block::sync(); }

void simcuda_run(const uint32_t grid[3], const uint32_t block[3], bool fibers, void (*thread)(void *), void *context) {
    static thread_local Block stacks;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++) {
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++) {
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
                if (fibers) {
                    stacks.run(block[0] * block[1] * block[2], thread, context);
                    continue;
                }
                for (threadIdx.z = 0; threadIdx.z < block[2]; threadIdx.z++)
                    for (threadIdx.y = 0; threadIdx.y < block[1]; threadIdx.y++)
                        for (threadIdx.x = 0; threadIdx.x < block[0]; threadIdx.x++) thread(context);
            }
        }
    }
}

extern "C" const SimKernel *simcuda_kernels(size_t *count) {
    static constexpr SimKernel kernels[] = {
        KERNEL(shardlift_gather_1),
        KERNEL(shardlift_gather_2),
        KERNEL(shardlift_gather_4),
        KERNEL(shardlift_gather_8),
        KERNEL(shardlift_gather_16),
        BLOCK_KERNEL(shardlift_transpose_1),
        BLOCK_KERNEL(shardlift_transpose_2),
        BLOCK_KERNEL(shardlift_transpose_4),
        BLOCK_KERNEL(shardlift_transpose_8),
        KERNEL(shardlift_cast_f32_f16),
        KERNEL(shardlift_cast_f32_bf16),
        KERNEL(shardlift_cast_f16_f32),
        KERNEL(shardlift_cast_f16_bf16),
        KERNEL(shardlift_cast_bf16_f32),
        KERNEL(shardlift_cast_bf16_f16),
        KERNEL(shardlift_cast_f8_e4m3_f32),
        KERNEL(shardlift_cast_f8_e4m3_f16),
        KERNEL(shardlift_cast_f8_e4m3_bf16),
        KERNEL(shardlift_cast_f8_e5m2_f32),
        KERNEL(shardlift_cast_f8_e5m2_f16),
        KERNEL(shardlift_cast_f8_e5m2_bf16),
        BLOCK_KERNEL(shardlift_digest),
    };
    *count = sizeof kernels / sizeof kernels[0];
    return kernels;
}
