// Everything that this runtime has to do with adakv: what a prompt's layer keeps, and attention of
// new tokens to it. One sequence, in float32. Arguments are host memory, wherever the cache is.
#pragma once

#include <adakv/adakv.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "place.h"

namespace embed {

struct Sizes {
  int32_t layers, heads, kv_heads, head_dim;
};

/// Ada-KV's policy with the defaults of its paper; with `critical`, CriticalKV selects within each
/// head's budget.
struct Policy {
  int32_t budget = 0;  // mean entries per kv head, the window included
  int32_t window = 32;
  bool is_critical = false;
};

class Kv {
 public:
  /// Room for what is kept of a prompt of `tokens` tokens, and for `max_new_tokens` after it, in
  /// `place`, which must outlive it.
  Kv(const Place& place,
     const Sizes& sizes,
     const Policy& policy,
     int64_t tokens,
     int64_t max_new_tokens);

  /// What a book holds, which somebody has read before (`adakv compress`), and room for
  /// `max_new_tokens` tokens after it. Throws std::runtime_error for one of another model.
  Kv(const Place& place, const Sizes& sizes, const adakv::CacheFile& book, int64_t max_new_tokens);

  /// Takes a layer's prompt: keeps what the policy chooses and copies it into pages.
  /// queries [T, Hq * D], keys and values [T, Hkv * D], after RoPE; w_o [E, Hq * D].
  void take_prompt(int32_t layer,
                   const float* queries,
                   const float* keys,
                   const float* values,
                   const float* w_o,
                   int64_t width);

  /// Once for each new token, before the layers.
  void begin_step();

  /// Appends a new token's key and value [Hkv * D] to a layer; out [Hq * D] is the attention of its
  /// queries [Hq * D] to all that the layer holds.
  void attend(
      int32_t layer, const float* queries, const float* keys, const float* values, float* out);

  /// Positions that each kv head of a layer holds, ascending.
  std::vector<std::vector<int32_t>> positions(int32_t layer) const;

  /// Bytes of the pages in use.
  size_t bytes() const { return cache_.pool().num_used() * cache_.page_bytes(); }

 private:
  adakv::CacheConfig config(int64_t max_new_tokens) const;
  adakv::CacheConfig config(const adakv::CacheFile& book, int64_t max_new_tokens) const;
  int64_t num_kept() const;
  adakv::TensorView per_head(float* data, int64_t tokens, int64_t heads) const;
  adakv::TensorView floats(float* data, std::initializer_list<int64_t> shape) const;
  adakv::TensorView ints(int32_t* data, std::initializer_list<int64_t> shape) const;
  adakv::TensorView schedules();
  void choose(const float* queries, const float* w_o, int64_t width, adakv::CompactArgs& compact);

  template <typename Args>
  void run(void (*verb)(const Args&), Args& args);

  const Place& place_;
  Sizes sizes_;
  Policy policy_;
  int64_t tokens_;  // of the prompt
  adakv::KVCache cache_;
  int32_t num_workers_;
  Array<float> queries_{place_}, keys_{place_}, values_{place_}, w_o_{place_};  // the model's
  Array<float> out_{place_};                           // [Hq * D] of attend
  Array<float> scores_{place_}, norms_{place_};        // [Hkv, T]
  Array<int32_t> budgets_{place_};                     // [Hkv]
  Array<int32_t> positions_{place_}, indptr_{place_};  // of the layer that was chosen last
  Array<int32_t> page_ids_{place_}, page_indptr_{place_};
  Array<int32_t> schedules_{place_};  // [L, schedule_size]
  Array<int32_t> workspace_{place_};  // the largest that a verb asked for
};

}  // namespace embed
