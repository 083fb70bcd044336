// Prefill is matrix products, and one kernel makes them all: a tile of kRows x kCols results in
// registers, from rows of x and a panel of w that was packed so that its kCols values of one k lie
// side by side. Queries times keys and weights times values are such products too.
#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace embed {
namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 8;
#else
constexpr int kLanes = 8, kRows = 4;
#endif
constexpr int kCols = 2 * kLanes;
constexpr int64_t kQueries = 64;  // of a block of attend_prompt
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

int64_t num_panels(int64_t n) {
  return (n + kCols - 1) / kCols;
}

Vec load(const float* data) {
  return *reinterpret_cast<const Vec*>(data);
}

void store(float* data, Vec value) {
  *reinterpret_cast<Vec*>(data) = value;
}

float sum(Vec value) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

// panel [k, kCols] = columns [first, first + kCols) of w [n, k]^T; zero behind the last.
void pack(const float* w, int64_t ldw, int64_t n, int64_t k, int64_t first, float* panel) {
  const int64_t cols = std::min<int64_t>(kCols, n - first);
  if (cols < kCols) std::fill_n(panel, k * kCols, 0.f);
  for (int64_t begin = 0; begin < k; begin += kLanes) {  // what is written stays in the L1 cache
    const int64_t end = std::min(begin + kLanes, k);
    for (int64_t j = 0; j < cols; ++j) {
      const float* row = w + (first + j) * ldw;
      for (int64_t i = begin; i < end; ++i) panel[i * kCols + j] = row[i];
    }
  }
}

// y [any, cols] = or += x [any, k] panel [k, kCols]; cols <= kCols.
struct Product {
  const float* x;
  int64_t x_stride;
  const float* panel;
  int64_t k;
  float* y;
  int64_t y_stride, cols;
  bool add;
};

// kTileRows rows of a product, from row `first`.
template <int kTileRows>
void tile(const Product& p, int64_t first) {
  const float* x = p.x + first * p.x_stride;
  Vec low[kTileRows], high[kTileRows];  // in registers: all loops over rows are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) low[r] = high[r] = Vec{};
  for (int64_t i = 0; i < p.k; ++i) {
    const Vec a = load(p.panel + i * kCols), b = load(p.panel + i * kCols + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      low[r] += x[r * p.x_stride + i] * a;
      high[r] += x[r * p.x_stride + i] * b;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    float* y = p.y + (first + r) * p.y_stride;
    if (p.cols == kCols) {
      store(y, p.add ? load(y) + low[r] : low[r]);
      store(y + kLanes, p.add ? load(y + kLanes) + high[r] : high[r]);
    } else {
      float row[kCols];
      store(row, low[r]), store(row + kLanes, high[r]);
      for (int64_t j = 0; j < p.cols; ++j) y[j] = (p.add ? y[j] : 0.f) + row[j];
    }
  }
}

void multiply(const Product& p, int64_t rows) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) tile<kRows>(p, r);
  for (; r < rows; ++r) tile<1>(p, r);
}

float dot(const float* a, const float* b, int64_t k) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sums[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
  }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < k; ++i) total += a[i] * b[i];
  return total;
}

// e^x for x <= 0, to about one unit in the last place: 2^n times a polynomial on what is left.
Vec exp(Vec x) {
  const Vec lowest = Vec{} - 87.f;
  x = x > lowest ? x : lowest;
  const Vec rounder = Vec{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + rounder) - rounder;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * reinterpret_cast<const Vec&>(exponent);
}

// row [n] = e^((row - its largest) * scale) for the first `count`, zero behind; n is a multiple of
// kLanes. Returns the sum.
float exponentials(float* row, int64_t count, int64_t n, float scale) {
  std::fill(row + count, row + n, -INFINITY);  // adds e^-87 to the sum: nothing
  Vec largest = load(row);
  for (int64_t i = kLanes; i < n; i += kLanes) {
    const Vec other = load(row + i);
    largest = other > largest ? other : largest;
  }
  float highest = largest[0];
  for (int i = 1; i < kLanes; ++i) highest = std::max(highest, largest[i]);
  Vec sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exp((load(row + i) - highest) * scale);
    store(row + i, e);
    sums += e;
  }
  std::fill(row + count, row + n, 0.f);
  return sum(sums);
}

}  // namespace

void matmul(const Matrix& x, const float* w, const Matrix& y, bool add) {
  const int64_t n = y.cols, k = x.cols;
  if (x.rows == 1) {
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < n; ++j) {
      y.data[j] = (add ? y.data[j] : 0.f) + dot(w + j * k, x.data, k);
    }
    return;
  }
#pragma omp parallel
  {
    std::vector<float> panel(k * kCols);
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < n; j += kCols) {
      pack(w, k, n, k, j, panel.data());
      multiply({x.data, x.stride, panel.data(), k, y.data + j, y.stride,
                std::min<int64_t>(kCols, n - j), add},
               x.rows);
    }
  }
}

void rms_norm(const float* x, const float* weight, int64_t rows, int64_t n, float eps, float* y) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * n;
    const float scale = 1.f / std::sqrt(dot(row, row, n) / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; ++i) y[r * n + i] = weight[i] * (row[i] * scale);
  }
}

void silu_times(float* gate, const float* up, int64_t size) {
  const int64_t whole = size / kLanes * kLanes;
#pragma omp parallel for schedule(static) if (size > 1 << 14)
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec g = load(gate + i), e = exp(g < 0.f ? g : -g);
    const Vec sigmoid = (g < 0.f ? e : Vec{} + 1.f) / (e + 1.f);
    store(gate + i, g * sigmoid * load(up + i));
  }
  for (int64_t i = whole; i < size; ++i) gate[i] = gate[i] / (1.f + std::exp(-gate[i])) * up[i];
}

void rope(float* x,
          int64_t rows,
          int64_t heads,
          int64_t head_dim,
          int64_t position,
          const float* frequencies) {
  const int64_t half = head_dim / 2;
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position + r) * frequencies[i];
      const float c = std::cos(angle), s = std::sin(angle);
      for (int64_t h = 0; h < heads; ++h) {
        float* head = x + (r * heads + h) * head_dim;
        const float a = head[i], b = head[i + half];
        head[i] = a * c - b * s;
        head[i + half] = b * c + a * s;
      }
    }
  }
}

void attend_prompt(float* queries,
                   const float* keys,
                   const float* values,
                   int64_t tokens,
                   int64_t heads,
                   int64_t kv_heads,
                   int64_t head_dim) {
  const int64_t group = heads / kv_heads, ldq = heads * head_dim, ldk = kv_heads * head_dim;
  const int64_t key_panels = num_panels(tokens), value_panels = num_panels(head_dim);
  const int64_t num_blocks = (tokens + kQueries - 1) / kQueries;
  const float scale = 1.f / std::sqrt(static_cast<float>(head_dim));
  std::vector<float> packed_keys(key_panels * head_dim * kCols);  // of one kv head at a time
  std::vector<float> packed_values(value_panels * tokens * kCols);
  for (int64_t h = 0; h < kv_heads; ++h) {
    const float* head_keys = keys + h * head_dim;
    const float* head_values = values + h * head_dim;
#pragma omp parallel
    {
      std::vector<float> weights(kQueries * key_panels * kCols), sums(kQueries);
#pragma omp for schedule(static)
      for (int64_t p = 0; p < key_panels; ++p) {
        pack(head_keys, ldk, tokens, head_dim, p * kCols, &packed_keys[p * head_dim * kCols]);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t d = 0; d < head_dim; ++d) {
          packed_values[(d / kCols * tokens + t) * kCols + d % kCols] = head_values[t * ldk + d];
        }
      }
      // The last blocks see most and come first.
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < num_blocks * group; ++task) {
        const int64_t first = (num_blocks - 1 - task / group) * kQueries;
        const int64_t rows = std::min(kQueries, tokens - first), seen = first + rows;
        const int64_t ldw = num_panels(seen) * kCols;
        float* block = queries + first * ldq + (h * group + task % group) * head_dim;
        for (int64_t p = 0; p < num_panels(seen); ++p) {
          multiply({block, ldq, &packed_keys[p * head_dim * kCols], head_dim, &weights[p * kCols],
                    ldw, kCols, false},
                   rows);
        }
        for (int64_t r = 0; r < rows; ++r) {
          sums[r] = exponentials(&weights[r * ldw], first + r + 1, ldw, scale);
        }
        for (int64_t p = 0; p < value_panels; ++p) {
          multiply({weights.data(), ldw, &packed_values[p * tokens * kCols], seen,
                    block + p * kCols, ldq, std::min<int64_t>(kCols, head_dim - p * kCols), false},
                   rows);
        }
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t d = 0; d < head_dim; ++d) block[r * ldq + d] /= sums[r];
        }
      }
    }
  }
}

}  // namespace embed
