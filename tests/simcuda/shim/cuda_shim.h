// What CUDA C++ has and C++17 lacks, as far as kernels/*.cu use it: a kernel then is a function of the host that one
// simulated thread calls at a time, with thread-local built-in variables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static thread_local

struct dim3 {
    unsigned int x, y, z;
};

struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// Waits until all threads of the block are here. Kernels that call it are registered with BLOCK_KERNEL.
void __syncthreads();

inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(value)); }

inline unsigned long long atomicAdd(unsigned long long *address, unsigned long long value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// One kernel, for the driver twin: `param_bytes` are the sizes of its `params` parameters, and `launch` runs the whole
// grid on the calling thread, `args` being a pointer to each argument.
struct SimKernel {
    const char *name;
    uint32_t params;
    const uint32_t *param_bytes;
    void (*launch)(void **args, const uint32_t grid[3], const uint32_t block[3], uint32_t shared_bytes);
};

// All kernels that are compiled in.
extern "C" const SimKernel *simcuda_kernels(size_t *count);

// Calls thread(context) for every thread of every block of the grid; as fibers, they may meet in __syncthreads.
void simcuda_run(const uint32_t grid[3], const uint32_t block[3], bool fibers, void (*thread)(void *), void *context);

template <auto kernel, bool fibers, typename Signature = decltype(kernel)>
struct KernelOf;

template <auto kernel, bool fibers, typename... Params>
struct KernelOf<kernel, fibers, void (*)(Params...)> {
    static constexpr uint32_t param_bytes[] = {sizeof(Params)...};

    template <size_t... I>
    static void call(void **args, std::index_sequence<I...>) {
        kernel(*static_cast<Params *>(args[I])...);
    }

    static void thread(void *args) { call(static_cast<void **>(args), std::index_sequence_for<Params...>()); }

    static void launch(void **args, const uint32_t grid[3], const uint32_t block[3], uint32_t) {
        simcuda_run(grid, block, fibers, thread, args);
    }

    static constexpr SimKernel entry(const char *name) { return {name, sizeof...(Params), param_bytes, launch}; }
};

#define KERNEL(name) KernelOf<name, false>::entry(#name)
#define BLOCK_KERNEL(name) KernelOf<name, true>::entry(#name)
