// Up to 32 slots of a row that lie side by side, as a warp reads them one after the other: of each
// entry a lane has the elements of some columns. No load hangs on a branch that others wait for.
#pragma once

#include <algorithm>

#include "attend/entries.cuh"

namespace adakv {

/// Slots of any kind of entries: of these a lane has columns lane + 32 j.
template <typename Entry, int kColumns>
class Slots {
 public:
  static constexpr int kAtOnce = Entry::kLoads / kColumns;  // slots that are read at a time

  /// The `count` slots from `first_slot` on, a multiple of 32. By whole warps.
  template <typename Params>
  __device__ Slots(const Params& p, const Query& query, int32_t first_slot, int32_t count)
      : layer_(p.layer) {
    const int32_t lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      key_columns_[j] = min(column(j), p.layer.head_dim - 1);
      value_columns_[j] = min(column(j), p.layer.value_dim - 1);
    }
    if (lane < count) mine_ = Entry(p, query, first_slot + lane);
  }

  /// The j-th column of this lane; where there is none, reads give another one's element.
  static __device__ int32_t column(int j) { return threadIdx.x % kWarpSize + j * kWarpSize; }

  /// Calls the body with what reads key(i, x) and value(i, x) of the i-th slot.
  template <typename Body>
  __device__ void visit(const Body& body) const {
    body(*this);
  }

  __device__ void key(int32_t i, float (&x)[kColumns]) const {
    const auto entry = mine_.of_lane(i);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = entry.key(layer_, key_columns_[j]);
  }

  __device__ void value(int32_t i, float (&x)[kColumns]) const {
    const auto entry = mine_.of_lane(i);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = entry.value(layer_, value_columns_[j]);
  }

  /// What is added to the logit of this lane's slot.
  __device__ float bias() const { return mine_.bias; }

 private:
  const LayerRows& layer_;
  Entry mine_;
  int32_t key_columns_[kColumns], value_columns_[kColumns];
};

/// Slots of a format with tails: a page of codes, or of the tail. Columns come in runs of up to four,
/// of which a key has 16, 4 or 2 bits each; so the codes of a run lie in one word.
template <typename Element, typename Format, bool kMixed, int kColumns>
class Slots<TailedEntry<Element, Format, kMixed>, kColumns> {
 public:
  static constexpr int kAtOnce = kColumns <= 4 ? 8 : 1;  // as registers allow

  template <typename Params>
  __device__ Slots(const Params& p, const Query& query, int32_t first_slot, int32_t)
      : in_tail_(first_slot >= p.tail_begin(query.b, query.length)) {
    const LayerRows& layer = p.layer;
    if (in_tail_) {
      read_tail(layer, layer.tail(query.b, query.h, false, 0, 0));
    } else {
      read_page(layer, query.page(layer, first_slot));
    }
  }

  static __device__ int32_t column(int j) {
    return (j / kRun * kWarpSize + threadIdx.x % kWarpSize) * kRun + j % kRun;
  }

  template <typename Body>
  __device__ void visit(const Body& body) const {
    if (has_16_) return body(Reader<true>{*this});
    body(Reader<false>{*this});
  }

 private:
  static constexpr int kRun = std::min(4, kColumns), kRuns = kColumns / kRun;

  /// A run of the first slot's columns: where the word lies that has the first one, and its bits in it.
  struct Run {
    const char* at;
    int32_t shift, bits;  // 16 bits: a word of its own for each column
  };

  /// Reads keys and values, of which some have 16 bits, or none.
  template <bool kHas16>
  struct Reader {
    const Slots& slots;

    __device__ void key(int32_t i, float (&x)[kColumns]) const {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        const Run& run = slots.keys_[r];
        float codes[kRun], numbers[kRun];
        words(run, run.bits, i * slots.key_bytes_, codes, numbers);
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const float from_code =
              slots.scales_[r * kRun + j] * codes[j] + slots.zeros_[r * kRun + j];
          x[r * kRun + j] = kHas16 && run.bits == 16 ? numbers[j] : from_code;
        }
      }
    }

    __device__ void value(int32_t i, float (&x)[kColumns]) const {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        float codes[kRun], numbers[kRun];
        words(slots.values_[r], Format::kBits, i * slots.value_bytes_, codes, numbers);
        const char* scale = slots.value_scales_[r] + i * slots.scale_bytes_;
        const uint32_t both = __ldg(reinterpret_cast<const uint32_t*>(scale));
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const float from_code =
              bits_to_float<Element>(both) * codes[j] + bits_to_float<Element>(both >> 16);
          x[r * kRun + j] = kHas16 && slots.in_tail_ ? numbers[j] : from_code;
        }
      }
    }

   private:
    /// What the words of a run in another slot are as codes of so many bits, and as numbers.
    static __device__ void words(const Run& run,
                                 int32_t bits,
                                 int32_t offset,
                                 float (&codes)[kRun],
                                 float (&numbers)[kRun]) {
      const uint16_t* at = reinterpret_cast<const uint16_t*>(run.at + offset);
      const uint32_t first = __ldg(at);
      const int32_t step = run.bits == 16 ? 1 : 0;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        codes[j] = first >> (run.shift + j * bits & 15) & ((1u << bits) - 1);
        if constexpr (kHas16) numbers[j] = bits_to_float<Element>(__ldg(at + j * step));
      }
    }
  };

  /// The first column of a run; of none, where keys and values end.
  static __device__ int32_t first_column(const LayerRows& layer, int r) {
    return min(column(r * kRun), layer.head_dim - kRun);
  }

  static __device__ Run run_of(const char* codes, int32_t index, int32_t bits) {
    return {codes + index * bits / 16 * 2, index * bits % 16, bits};
  }

  __device__ void read_tail(const LayerRows& layer, const char* keys) {
    has_16_ = true;
    key_bytes_ = value_bytes_ = layer.head_dim * 2;
    scale_bytes_ = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int32_t d = first_column(layer, r);
      keys_[r] = run_of(keys, d, 16);
      values_[r] = run_of(keys + kPageSlots * key_bytes_, d, 16);
      value_scales_[r] = keys;  // it is read, and not used
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) scales_[j] = zeros_[j] = 0;
  }

  __device__ void read_page(const LayerRows& layer, int32_t page) {
    const int32_t in_16 = kMixed ? layer.key_dims.in_16 : 0;
    const int32_t in_2 = kMixed ? layer.key_dims.in_2 : 0, in_4 = layer.head_dim - in_16 - in_2;
    has_16_ = in_16 > 0;
    key_bytes_ = layer.entry_bytes;
    value_bytes_ = layer.value_bytes;
    scale_bytes_ =
        static_cast<int32_t>(layer.value_scales.at(page, 1) - layer.value_scales.at(page, 0));
    const char* keys = layer.key(page, 0);
    const auto* scales = reinterpret_cast<const Element*>(layer.key_scales.at(page, 0));
    const auto* zeros = reinterpret_cast<const Element*>(layer.key_scales.at(page, 1));
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int32_t d = first_column(layer, r), i = d - in_16;
      const char* codes = keys + in_16 * 2;
      keys_[r] = i < 0      ? run_of(keys, d, 16)
                 : i < in_4 ? run_of(codes, i, 4)
                            : run_of(codes + in_4 / 2, i - in_4, 2);
      values_[r] = run_of(layer.value(page, 0), d, Format::kBits);
      value_scales_[r] = layer.value_scales.at(page, 0) + d / Format::kGroup * 4;
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        scales_[r * kRun + j] = to_float(scales[max(i, 0) + j]);
        zeros_[r * kRun + j] = to_float(zeros[max(i, 0) + j]);
      }
    }
  }

  bool in_tail_, has_16_;
  int32_t key_bytes_, value_bytes_, scale_bytes_;  // from slot to slot
  Run keys_[kRuns], values_[kRuns];
  const char* value_scales_[kRuns];
  float scales_[kColumns], zeros_[kColumns];  // of keys
};

}  // namespace adakv
