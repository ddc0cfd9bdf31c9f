/* CUDA C as C++ for a host: what daemon/devices/xxh3.cu uses of it, for kernels whose threads do not communicate.
 *
 * A kernel becomes a function that is one thread. The caller is the grid: it sets the indices and calls.
 */

#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index {
    unsigned int x;
};
extern "C" {
Index blockIdx, threadIdx, blockDim;
}

struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};

template <class T> T __ldcs(const T *at) { return *at; }

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
