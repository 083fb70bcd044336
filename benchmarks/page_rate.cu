// How fast a GPU reads pages in random order into shared memory: the ceiling of attend on sm_90.
//
//     nvcc -O3 -arch=sm_90a benchmarks/page_rate.cu -o page_rate && ./page_rate
//
// Blocks, warps and pipelines are those of cuda/attend: one block for each multiprocessor, and each
// warp keeps some tiles under way. But a tile is one bulk copy of contiguous bytes, it is known
// without a look-up where it lies, and nothing is done with it but some matrix products with what
// was read (16 of them are a tile's of 16 entries, 128 dimensions and up to 8 queries). One line for
// each variant: 512 MiB of a buffer of 8 GiB, other pages in each launch; the median of 10. The
// buffer holds zeros, and then random bits, which cost the memory more power; a copy of 4 GiB within
// it is timed beside.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

constexpr size_t kBuffer = size_t{8} << 30, kRead = size_t{512} << 20;
constexpr int kRounds = 10, kWarmUp = 4, kLaunches = 4;  // of each round

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void start_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  uint64_t read_once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(read_once));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(read_once)
      : "memory");
}

__device__ void wait_for_copy(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

/// A product of 16 x 16 elements that lie at an address with any 16 x 8.
__device__ void multiply(uint32_t from, float (&sums)[4]) {
  uint32_t a[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[0]), "r"(a[1]));
}

__global__ void fill_with_random(uint4* pages, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t words[4];
    for (uint32_t j = 0; j < 4; ++j) {  // the finaliser of MurmurHash3
      uint32_t x = static_cast<uint32_t>(4 * i + j) + 1;
      x = (x ^ x >> 16) * 0x85ebca6b;
      x = (x ^ x >> 13) * 0xc2b2ae35;
      words[j] = x ^ x >> 16;
    }
    pages[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Tiles `first` on of the pages, which an odd factor puts in another order.
template <int kWarps, int kStages, int kTile>
__global__ void __launch_bounds__(kWarps * 32, 1)
    read_pages(const uint8_t* pages, uint32_t first, int num_tiles, int products, float* out) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ uint64_t barriers[kWarps][kStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = gridDim.x * kWarps;
  if (lane < kStages) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[warp][lane])));
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncwarp();
  const uint32_t mine = shared_address(memory) + warp * kStages * kTile;
  const int begin = blockIdx.x * kWarps + warp, count = (num_tiles - begin + stride - 1) / stride;
  const auto start = [&](int i) {
    if (i >= count || lane > 0) return;
    const uint32_t tile = first + begin + i * stride;
    const uint32_t page = tile * 2654435761u % static_cast<uint32_t>(kBuffer / kTile);
    start_copy(mine + i % kStages * kTile, pages + size_t{page} * kTile, kTile,
               shared_address(&barriers[warp][i % kStages]));
  };
  float sums[4] = {};
  for (int i = 0; i < kStages; ++i) start(i);
  for (int i = 0; i < count; ++i) {
    wait_for_copy(shared_address(&barriers[warp][i % kStages]), i / kStages % 2);
    for (int j = 0; j < products; ++j) {
      multiply(mine + i % kStages * kTile + (j * 512 + lane * 16) % kTile, sums);
    }
    __syncwarp();
    start(i + kStages);
  }
  if (products > 0 && sums[0] == 1) out[0] = sums[1] + sums[2] + sums[3];  // so that all is needed
}

/// Microseconds of a launch: the median of rounds of some.
template <typename Launch>
float time_launches(const Launch& launch) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < kWarmUp + kRounds; ++round) {
    check(cudaEventRecord(begin));
    for (int i = 0; i < kLaunches; ++i) launch();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (round >= kWarmUp) times.push_back(ms * 1e3f / kLaunches);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

template <int kWarps, int kStages, int kTile>
void time_pages(const uint8_t* pages, float* out, int products) {
  const auto kernel = read_pages<kWarps, kStages, kTile>;
  constexpr int kBytes = kWarps * kStages * kTile, kTiles = kRead / kTile;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  int blocks;
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0));
  uint32_t first = 0;
  const float us = time_launches([&] {
    kernel<<<blocks, kWarps * 32, kBytes>>>(pages, first, kTiles, products, out);
    first += kTiles;
  });
  std::printf("%2d warps x %2d tiles of %5d bytes, %2d products: %.1f us, %.2f TB/s\n", kWarps,
              kStages, kTile, products, us, kRead / us / 1e6);
}

void time_all(uint8_t* pages, float* out) {
  constexpr size_t kCopied = kBuffer / 2;
  const float us = time_launches(
      [&] { check(cudaMemcpyAsync(pages + kCopied, pages, kCopied, cudaMemcpyDeviceToDevice)); });
  std::printf("copy: %.2f TB/s\n", 2 * kCopied / us / 1e6);
  for (int products : {0, 16, 32}) {
    time_pages<8, 1, 8192>(pages, out, products);
    time_pages<8, 2, 8192>(pages, out, products);
    time_pages<8, 3, 8192>(pages, out, products);
    time_pages<12, 2, 8192>(pages, out, products);
    time_pages<16, 3, 4096>(pages, out, products);
    time_pages<8, 13, 2048>(pages, out, products);
    time_pages<4, 3, 16384>(pages, out, products);
  }
}

int main() {
  uint8_t* pages;
  float* out;
  check(cudaMalloc(&pages, kBuffer));
  check(cudaMalloc(&out, sizeof(float)));
  check(cudaMemset(pages, 0, kBuffer));
  std::printf("zeros\n");
  time_all(pages, out);
  fill_with_random<<<1024, 256>>>(reinterpret_cast<uint4*>(pages), kBuffer / sizeof(uint4));
  std::printf("random bits\n");
  time_all(pages, out);
  check(cudaGetLastError());
}
